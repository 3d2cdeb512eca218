"""The recipe's sections `analyze` and `clean`."""

from typing import Any, Literal

from pydantic import Field

from pipelines.recipe.base import Count, Section


class Analyze(Section):
    """The statistics of clean's filters over all rows, before clean and after it, as table and plots in the report."""

    concurrency: Count | None = Field(None, description="tasks at a time; null: what the cluster has")


class Clean(Section):
    """Operators by data-juicer's names and parameters, in order."""

    process: list[Any] = Field(min_length=1, description="operators, in order: a name, or one name with its parameters")
    dialect: Literal["zh", "data_juicer"] = Field("zh", description="zh: right for Chinese; data_juicer: bit-equal")
    text_keys: str = Field("response", description="column that operators read")
    assets: dict[str, str] = Field(
        default_factory=dict, description="model files by name, such as lid.176.ftz: path or URL#sha256=…"
    )
    custom_operators: list[str] = Field(default_factory=list, description="Python files with operators of your own")
    edited: str | None = Field(None, description="rows edited by hand: the file that clean --export wrote")
    concurrency: Count | None = Field(None, description="tasks at a time; null: what the cluster has")
