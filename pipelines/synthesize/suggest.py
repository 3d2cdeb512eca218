"""A compatibility map as a model proposes it, for a person to edit: what goes with what, value by value."""

from collections.abc import Iterator
from typing import Any

import yaml

from pipelines.errors import InputError
from pipelines.synthesize.asking import ask, is_complete, read_answers
from pipelines.synthesize.grid import Grid
from pipelines.synthesize.heat_map import MOST_VALUES
from pipelines.synthesize.ledger import read_index
from pipelines.synthesize.questions import Request, key_of
from pipelines.synthesize.section import Sampling, Synthesize
from pipelines.synthesize.shapes import read_json
from pipelines.workspace import Workspace

PROMPT = """要用下面这样的提示词批量生成文本：
“{example}”

每条文本由几个维度的取值组合而成。现在看维度 {axis} 的取值“{value}”。其他维度的取值有：
{others}

哪些取值和“{value}”放在一起明显不合情理（例如给爷爷的新婚祝福）？拿不准的算合理。
只回答 JSON，每个维度一个列表，列出不合理的取值，没有就给空列表：
{form}"""


class Suggestion:
    """For each value of each dimension, the question which values of the dimensions behind it do not go with it."""

    response_format = None

    def __init__(self, grid: Grid) -> None:
        self.section: Synthesize = grid.section.model_copy(
            update={"generation": Sampling(max_tokens=max(1024, grid.section.generation.max_tokens))}
        )
        self.axes = {name: values for name, values in grid.axes.items() if 1 < len(values) <= MOST_VALUES}
        self._example = grid.request(0).messages[-1]["content"]
        names = list(self.axes)
        self._asked = [
            (name, value, names[number + 1 :]) for number, name in enumerate(names[:-1]) for value in self.axes[name]
        ]

    @property
    def size(self) -> int:
        """One position for each value that is asked about."""
        return len(self._asked)

    def positions(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """All of them."""
        yield from range(start, self.size if stop is None else stop)

    def request(self, pos: int) -> Request:
        """The question about one value."""
        axis, value, others = self._asked[pos]
        listed = "\n".join(f"- {name}：{'、'.join(self.axes[name])}" for name in others)
        form = "{" + ", ".join(f'"{name}": […]' for name in others) + "}"
        prompt = PROMPT.format(example=self._example, axis=axis, value=value, others=listed, form=form)
        messages = [{"role": "user", "content": prompt}]
        cell = {"suggest": axis, "value": value}
        return Request(pos, cell, 0, messages, "", key_of(self.section, messages, cell, 0))

    def check(self, request: Request, text: str) -> None:
        """Raise MalformedError where an answer is not an object of lists."""
        self._read(request.pos, text)

    def misfits(self, pos: int, text: str) -> dict[str, tuple[str, ...]]:
        """By dimension, the values that an answer names; words that are no values are left out."""
        found = self._read(pos, text)
        return {
            name: tuple(value for value in self.axes[name] if value in found.get(name, []))
            for name in self._asked[pos][2]
        }

    def about(self, pos: int) -> tuple[str, str]:
        """The dimension and the value that a position asks about."""
        return self._asked[pos][:2]

    def _read(self, pos: int, text: str) -> dict[str, list[str]]:
        lists = {name: {"type": "array", "items": {"type": "string"}} for name in self._asked[pos][2]}
        answer: dict[str, list[str]] = read_json(text, {"type": "object", "properties": lists})
        return answer


def suggest_map(workspace: Workspace, grid: Grid) -> tuple[str, list[str]]:
    """Ask the model what does not go together; returns the map as YAML for a recipe, and the values without an answer.

    The answers are kept in the ledger, so that asking again costs nothing.
    """
    if not grid.section.endpoints:
        raise InputError("synthesize.endpoints: the map is asked of an API; name one")
    questions = Suggestion(grid)
    if not is_complete(workspace, questions):
        ask(workspace, questions, lambda state: state.pending)
    rules: dict[tuple[str, str, tuple[str, ...]], list[str]] = {}
    unanswered = []
    requests = list(map(questions.request, questions.positions()))
    for request, known in read_answers(workspace, read_index(workspace), requests):
        axis, value = questions.about(request.pos)
        if "reason" in known:
            unanswered.append(f"{value} ({known['reason']})")
            continue
        for other, values in questions.misfits(request.pos, known["text"]).items():
            if values:
                rules.setdefault((axis, other, values), []).append(value)
    where = [
        {"where": {axis: _one_or_all(values), other: _one_or_all([*misfits])}}
        for (axis, other, misfits), values in rules.items()
    ]
    text = yaml.safe_dump({"compatibility": where}, allow_unicode=True, default_flow_style=None, width=1000)
    return text, unanswered


def _one_or_all(values: list[str]) -> Any:
    return values[0] if len(values) == 1 else values
