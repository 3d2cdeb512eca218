"""The recipe's sections `analyze` and `clean`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from pipelines.recipe.base import Count, ReadPath, Section


class Analyze(Section):
    """The statistics of clean's filters over all rows, before clean and after it, as table and plots in the report."""

    concurrency: Count | None = Field(None, description="tasks at a time; null: what the cluster has")


def _without_checksum(section: "Clean", place: str) -> str:
    return place.partition("#")[0]


class Clean(Section):
    """Operators by data-juicer's names and parameters, in order."""

    process: list[Any] = Field(min_length=1, description="operators, in order: a name, or one name with its parameters")
    dialect: Literal["zh", "data_juicer"] = Field("zh", description="zh: right for Chinese; data_juicer: bit-equal")
    text_keys: str = Field("response", pattern=r"\S", description="column that operators read")
    assets: Annotated[dict[str, str], ReadPath(_without_checksum)] = Field(
        default_factory=dict, description="model files by name, such as lid.176.ftz: path or URL#sha256=…"
    )
    custom_operators: Annotated[list[str], ReadPath()] = Field(
        default_factory=list, description="Python files with operators of your own"
    )
    decontaminate: bool = Field(
        True, description="drop rows that hold a text of evaluate.datasets with a path, or of split.test_source"
    )
    edited: Annotated[str | None, ReadPath()] = Field(
        None, description="rows edited by hand: the file that clean --export wrote"
    )
    concurrency: Count | None = Field(None, description="tasks at a time; null: what the cluster has")
