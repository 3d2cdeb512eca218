"""A compatibility map as a model proposes it, for a person to edit: what goes with what, value by value."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import InputError
from pipelines.llm.dispatch import answers_to
from pipelines.llm.json_answers import read_json
from pipelines.llm.requests import RequestList
from pipelines.recipe.llm import Sampling
from pipelines.synthesize.grid import Grid, drawn_axes

PROMPT = """要用下面这样的提示词批量生成文本：
“{example}”

每条文本由几个维度的取值组合而成。现在看维度 {axis} 的取值“{value}”。其他维度的取值有：
{others}

哪些取值和“{value}”放在一起明显不合情理（例如给爷爷的新婚祝福）？拿不准的算合理。
只回答 JSON，每个维度一个列表，列出不合理的取值，没有就给空列表：
{form}"""


@dataclass(frozen=True)
class Value:
    """One value of a dimension, and the dimensions behind that one with their values."""

    axis: str
    value: str
    others: dict[str, list[str]]


def values_of(grid: Grid) -> list[Value]:
    """Every value that has a request, so that each pair of values is weighed once."""
    axes = drawn_axes(grid)
    names = list(axes)
    behind = {name: {other: axes[other] for other in names[number + 1 :]} for number, name in enumerate(names)}
    return [Value(name, value, behind[name]) for name in names[:-1] for value in axes[name]]


def requests_about(grid: Grid, values: Sequence[Value]) -> RequestList:
    """For each value a request that asks which values of the dimensions behind it do not go with it."""
    section = grid.section.model_copy(
        update={"generation": Sampling(max_tokens=max(1024, grid.section.generation.max_tokens))}
    )
    example = grid.request(0).messages[-1]["content"]
    entries = [
        ({"suggest": value.axis, "value": value.value}, {"example": example, **_fields(value)}) for value in values
    ]
    return RequestList(
        section, grid.section_key, PROMPT, entries, lambda request, text: misfits(values[request.pos], text)
    )


def _fields(value: Value) -> dict[str, str]:
    return {
        "axis": value.axis,
        "value": value.value,
        "others": "\n".join(f"- {name}：{'、'.join(values)}" for name, values in value.others.items()),
        "form": "{" + ", ".join(f'"{name}": […]' for name in value.others) + "}",
    }


def misfits(value: Value, text: str) -> dict[str, tuple[str, ...]]:
    """By dimension, the values that an answer names; words that are no values are left out.

    MalformedError where an answer is not an object of lists.
    """
    lists = {name: {"type": "array", "items": {"type": "string"}} for name in value.others}
    found: dict[str, list[str]] = read_json(text, {"type": "object", "properties": lists})
    return {
        name: tuple(other for other in values if other in found.get(name, [])) for name, values in value.others.items()
    }


def suggest_map(workspace: Workspace, grid: Grid) -> tuple[str, list[str]]:
    """Ask the model what does not go together; returns the map as YAML for a recipe, and the values without an answer.

    The answers are kept in the ledger, so that asking again costs nothing.
    """
    if not grid.section.endpoints:
        raise InputError("synthesize.endpoints: the map is asked of an API; name one")
    values = values_of(grid)
    rules: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    unanswered = []
    for request, known in answers_to(workspace, requests_about(grid, values)):
        about = values[request.pos]
        if "reason" in known:
            unanswered.append(f"{about.value} ({known['reason']})")
            continue
        for other, named in misfits(about, known["text"]).items():
            if named:
                rules.setdefault((about.axis, other, named), []).append(about.value)
    where = [
        {"where": {axis: _one_or_all(alike), other: _one_or_all([*named])}}
        for (axis, other, named), alike in rules.items()
    ]
    text = yaml.safe_dump({"compatibility": where}, allow_unicode=True, default_flow_style=None, width=1000)
    return text, unanswered


def _one_or_all(values: list[str]) -> Any:
    return values[0] if len(values) == 1 else values
