"""The recipe: one YAML that is the whole experiment.

Every field carries its meaning and unit. Unknown keys are refused. A section that is absent means that its stage does
not run. The recipe knows nothing of the stages: what only a stage can judge, such as the names of operators, its own
`check` judges, which load.py calls where it is given.
"""

import re
from typing import Annotated

from pydantic import (
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from pipelines.recipe.base import Section, Seed
from pipelines.recipe.clean import Analyze, Clean
from pipelines.recipe.evaluate import Compare, Evaluate
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.publish import Publish
from pipelines.recipe.refine import Refine
from pipelines.recipe.serve import Serve
from pipelines.recipe.split import Export, Split
from pipelines.recipe.synthesize import Synthesize
from pipelines.recipe.train import Merge, Train, not_servable

RECIPE_NAME = re.compile(r"(?!base\Z)(?!.*\.\.)(?!.*\.\Z)[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
"""Names become folders, adapters' names, with a version or step behind them, and parts of URLs; `base` is taken."""
NAME_RULE = "use at most 100 ASCII letters, digits, '.', '_' and '-', no '..', and not base, which is the base model"


TemplateArgument = StrictBool | StrictInt | StrictFloat | StrictStr | list[StrictStr]


class Recipe(Section):
    """One experiment, from rows to scores."""

    name: str
    seed: Seed = Field(42, description="every random choice follows from it")
    chat_template_kwargs: dict[str, TemplateArgument] = Field(
        {},
        description="what the chat template of the recipe's own model is given, such as {enable_thinking: false}: to "
        "train, serve, evaluate and compare it, and where engine vllm synthesizes",
    )
    synthesize: Synthesize | None = None
    ingest: Annotated[Ingest | None, Field(validate_default=True)] = None
    refine: Refine | None = None
    analyze: Analyze | None = None
    clean: Clean | None = None
    export: Export | None = None
    split: Split | None = None
    train: Train | None = None
    merge: Merge | None = None
    serve: Serve = Serve()
    evaluate: Evaluate | None = None
    compare: Compare | None = None
    publish: Publish | None = None

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not RECIPE_NAME.fullmatch(name):
            raise ValueError(f"{NAME_RULE}: {name[:120]!r}")
        return name

    @field_validator("ingest")
    @classmethod
    def _rows_come_from_somewhere(cls, ingest: Ingest | None, info: ValidationInfo) -> Ingest | None:
        if "synthesize" not in info.data:  # given, but wrong
            return ingest
        if ingest is None and info.data["synthesize"] is None:
            raise PydanticCustomError("missing", "neither ingest nor synthesize")
        return ingest

    @field_validator("chat_template_kwargs")
    @classmethod
    def _can_be_given(cls, given: dict[str, TemplateArgument]) -> dict[str, TemplateArgument]:
        for name, value in given.items():
            if not name.isidentifier():
                raise ValueError(f"{name!r} is no name of a variable; templates have names such as enable_thinking")
            if isinstance(value, str) and value.lower() in ("true", "false", "yes", "no"):
                raise ValueError(
                    f"{name} is the text {value!r}, which templates take for true; write it without quotes"
                )
        return given

    @model_validator(mode="after")
    def _has_a_model_of_its_own(self) -> "Recipe":
        is_local = self.synthesize is not None and self.synthesize.engine == "vllm"
        if self.chat_template_kwargs and self.train is None and not is_local:
            raise ValueError(
                "chat_template_kwargs is for the recipe's own model, and it has none: add a section train; requests to "
                "an API have synthesize.endpoints[].chat_template_kwargs"
            )
        return self

    @model_validator(mode="after")
    def _stages_have_what_they_read(self) -> "Recipe":
        needs = {"merge": "train", "evaluate": "train", "compare": "train", "publish": "train", "train": "split"}
        needs |= {"analyze": "clean"}
        for stage, needed in needs.items():
            if getattr(self, stage) is not None and getattr(self, needed) is None:
                raise ValueError(f"{stage} needs a section {needed}")
        if self.refine and not self.synthesize and not self.refine.styles:
            raise ValueError("refine needs a section synthesize, or refine.styles and refine.dimensions")
        if self.publish and self.publish.weights == "merged" and self.merge is None:
            raise ValueError("publish.weights merged needs a section merge")
        if self.train and self.train.method == "full":
            if self.publish and self.publish.weights == "adapter":
                raise ValueError("train.method full leaves no adapter; publish.weights: merged, with a section merge")
            if self.compare and self.compare.checkpoints:
                raise ValueError("compare.checkpoints asks adapters, and train.method full leaves none; remove it")
        return self

    @model_validator(mode="after")
    def _what_is_asked_can_be_served(self) -> "Recipe":
        reason = not_servable(self.train) if self.train else None
        asked = [stage for stage in ("evaluate", "compare") if getattr(self, stage) is not None]
        if reason and asked and self.merge is None:
            raise ValueError(f"{reason}; {' and '.join(asked)} can ask the merged model: add a section merge")
        if reason and self.compare and self.compare.checkpoints:
            raise ValueError(f"{reason}; remove compare.checkpoints, which asks them")
        return self
