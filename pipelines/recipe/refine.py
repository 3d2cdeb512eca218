"""The recipe's section `refine`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.recipe.base import Count, Ratio, ReadPath, Section
from pipelines.recipe.llm import ModelRequests
from pipelines.recipe.synthesize import RuleName, Style


class StyleDemands(Section):
    """What answers of one style look like."""

    min_length: int = Field(1, ge=0, description="characters an answer has at least")
    max_length: Count | None = Field(None, description="characters an answer has at most; null: any number")
    emoji: Literal["any", "needed", "forbidden"] = Field("any", description="whether answers hold emoji")
    foreign: Literal["any", "forbidden"] = Field("any", description="whether answers hold words of other languages")
    lines: bool = Field(False, description="whether answers may have several lines")
    rules: list[RuleName] | None = Field(None, description="defects looked for; null: those of refine.rules")

    def as_style(self) -> Style:
        """The same as a style of a grid."""
        return Style(template="", **self.model_dump())


class RefineJudge(ModelRequests):
    """A model that scores every answer that is left."""

    rubric: str = Field(description="what a good answer is, in words")
    min_score: float = Field(6, ge=1, le=10, description="answers below it are dropped; 1 is worst, 10 best")


class Refine(Section):
    """The second cleaning: what models get wrong when they synthesize, dropped or mended by name."""

    rules: list[str] = Field(
        [],
        description="defects looked for: empty, non_answer, explanation, quotes, particle, opening, length, emoji, "
        "foreign, mismatch; empty: all",
    )
    fix: list[Literal["quotes", "particle"]] = Field([], description="defects that are mended instead of dropped")
    aliases: dict[str, list[str]] = Field({}, description="other words for a value of the grid, such as 妈妈 for 母亲")
    near_duplicates: Ratio | None = Field(
        0.8, description="answers that share so much of their character pairs are one; the first stays; null: keep all"
    )
    judge: RefineJudge | None = Field(None, description="null: no model looks at the answers")
    edited: Annotated[str | None, ReadPath()] = Field(
        None, description="the exported rows, edited by hand: .jsonl or .csv; rows that are not in it are dropped"
    )
    dimensions: dict[str, Annotated[list[str], Field(min_length=1)]] = Field(
        {}, description="values to be found in the query of rows that were not synthesized here"
    )
    styles: dict[str, StyleDemands] = Field(
        {}, description="demands by a word in the query, for such rows; the last one is for queries without any"
    )

    @model_validator(mode="after")
    def _grid_is_whole(self) -> "Refine":
        if self.dimensions and not self.styles:
            raise ValueError("dimensions needs styles")
        return self
