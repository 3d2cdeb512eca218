"""The recipe's sections `export` and `split`."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.recipe.base import Count, ReadPath, Section, WrittenPath


class Export(Section):
    """The rows as one file for people and other tools, in data-set order."""

    path: Annotated[str, Field(pattern=r"\.(jsonl|json|parquet)$"), WrittenPath()] = Field(
        description="a .jsonl, .json or .parquet file or URL"
    )
    format: Literal["rows", "messages", "alpaca", "sharegpt", "swift", "llamafactory", "xtuner"] = Field(
        "rows",
        description="what reads the file: rows: danlu again, with every column; messages: whatever reads OpenAI's; "
        "alpaca: single questions and answers; sharegpt; swift: ms-swift; llamafactory: LLaMA-Factory; xtuner",
    )
    statistics: bool = Field(
        False, description="add data-juicer's column __dj__stats__: what clean's filters measured of each row"
    )
    overwrite: bool = Field(
        False,
        description="replace a file there that this workspace did not write, or that was changed since; "
        "what the recipe reads is never written over",
    )

    @model_validator(mode="after")
    def _is_written_as_lines(self) -> "Export":
        if self.format != "rows" and not self.path.endswith(".jsonl"):
            raise ValueError(f"format {self.format} is written as .jsonl; name export.path so")
        if self.format != "rows" and self.statistics:
            raise ValueError("statistics: only format rows has a column for them")
        return self


class Split(Section):
    """Which rows are held out: by a seeded hash of a group, the first ones, or those of a source of their own."""

    test_ratio: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="share of groups held out, between 0 and 1"
    )
    first: Count | None = Field(
        None, description="hold out the first rows instead, in data-set order, and the rest of their groups"
    )
    group: str | None = Field(
        None,
        description="column whose equal values stay on one side; near_duplicates: rows of nearly the same text, "
        "clean.text_keys or else response; null: each row by itself",
    )
    test_source: Annotated[str | None, ReadPath()] = Field(
        None, description="the rows held out lie here, as in ingest.source; all others are to train"
    )
    concurrency: Count | None = Field(None, description="tasks at a time; null: what the cluster has")

    @model_validator(mode="after")
    def _one_rule(self) -> "Split":
        if [self.test_ratio, self.first, self.test_source].count(None) != 2:
            raise ValueError("give one of test_ratio, first and test_source")
        if self.test_source is not None and self.group is not None:
            raise ValueError("test_source says which rows are held out; remove group, which goes with the other two")
        return self
