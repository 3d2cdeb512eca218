"""The grid: which cells are asked, and with which words.

A cell is one value per dimension and a style. What is drawn for a sample (an injection, examples, the phrasing of
its training input) follows from the seed, the cell's values and the sample's number alone, so that the same recipe
gives the same prompts, and adding a value to a dimension leaves all other prompts as they were.
"""

import itertools
import random
import string
from collections import Counter
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from pipelines.errors import nearest
from pipelines.synthesize.questions import Request, key_of
from pipelines.synthesize.section import Compatibility, Style, Synthesize

PASSAGE = "passage"
"""The dimension of pieces of documents."""
DRAWN = ("style", "injection", "examples", "max_length")
"""Fields of a template besides the dimensions."""


class Grid:
    """The requests of a recipe, made one by one when they are needed."""

    section_key = "synthesize"

    def __init__(self, section: Synthesize, seed: int) -> None:
        self.section = section
        self.seed = seed
        self.response_format = _response_format(section)
        self._more = {"response_format": self.response_format} if self.response_format else {}
        self.axes = {**section.dimensions, "style": list(section.styles)}

    @property
    def size(self) -> int:
        """Positions in the grid, those that do not fit included; `pos` runs from 0 to `size` - 1."""
        cells = 1
        for values in self.axes.values():
            cells *= len(values)
        return cells * self.section.samples_per_cell

    def cell(self, pos: int) -> dict[str, str]:
        """The cell that position `pos` belongs to; the last axis, style, runs fastest."""
        number = pos // self.section.samples_per_cell
        cell = {}
        for name, values in reversed(self.axes.items()):
            number, index = divmod(number, len(values))
            cell[name] = values[index]
        return {name: cell[name] for name in self.axes}

    def cells(self) -> Iterator[dict[str, str]]:
        """The cells that fit, in order."""
        cells = (self.cell(pos) for pos in range(0, self.size, self.section.samples_per_cell))
        return (cell for cell in cells if fits(self.section.compatibility, cell))

    def positions(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """The positions from `start` up to `stop` whose cells fit, in order."""
        samples = self.section.samples_per_cell
        end = self.size if stop is None else stop
        for first in range(start - start % samples, end, samples):
            if fits(self.section.compatibility, self.cell(first)):
                yield from range(max(first, start), min(first + samples, end))

    def request(self, pos: int) -> Request:
        """The request at `pos`."""
        cell = self.cell(pos)
        sample = pos % self.section.samples_per_cell
        style = self.section.styles[cell["style"]]
        draw = random.Random("\0".join([str(self.seed), *cell.values(), str(sample)]))
        prompt = style.template.format_map(
            {
                **cell,
                "injection": draw.choice(self.section.injections),
                "examples": "\n".join(draw.sample(style.examples, style.num_examples)),
                "max_length": style.max_length or "",
            }
        )
        query = draw.choice(self.section.queries or [""]).format_map(cell) + style.query_suffix
        system = [{"role": "system", "content": self.section.system}] if self.section.system else []
        messages = [*system, {"role": "user", "content": prompt.strip()}]
        key = key_of(self.section, messages, cell, sample, **self._more)
        return Request(pos, cell, sample, messages, query, key)

    def check(self, request: Request, text: str) -> None:
        """Raise MalformedError where an answer is not of the shape that the recipe asks for."""
        if self.section.answer.shape != "text":
            self.conversations(request, text)

    def conversations(self, request: Request, text: str) -> list[list[dict[str, str]]]:
        """The conversations that an answer holds; MalformedError where it is not of its shape."""
        from pipelines.synthesize.shapes import conversations  # an extra that checking a recipe does without

        return conversations(text, request.query, self.section.answer, request.cell)


def _response_format(section: Synthesize) -> dict[str, Any] | None:
    if section.answer.response_format is None:
        return None
    from pipelines.synthesize.shapes import response_format

    return response_format(section.answer)


def fits(rules: list[Compatibility], cell: Mapping[str, str]) -> bool:
    """Whether a cell is asked; the last rule that matches it decides, and without one it is."""
    for rule in reversed(rules):
        if all(_matches(cell[name], patterns) for name, patterns in rule.where.items()):
            return rule.fits
    return True


def _matches(value: str, patterns: str | list[str]) -> bool:
    return any(fnmatchcase(value, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))


def check_grid(section: Synthesize) -> None:
    """Raise ValueError, naming them all, for fields, names and values that do not exist and cells that never fit."""
    passage = {PASSAGE: ["…"]} if section.passages else {}
    axes = {**passage, **section.dimensions, "style": list(section.styles)}
    problems = [problem for name, style in section.styles.items() for problem in _template_problems(name, style, axes)]
    for number, query in enumerate(section.queries):
        problems += _field_problems(f"queries[{number}]", query, [*axes])
    templates = {"query_system": section.query_system or "", "answer.user": section.answer.user}
    for where, template in {**templates, "answer.assistant": section.answer.assistant}.items():
        problems += _field_problems(where, template, [*axes])
    if section.answer.shape in ("text", "json") and not section.queries:
        problems.append("queries: at least one is needed, for answers that are not conversations of their own")
    if not section.dimensions and section.passages is None:
        problems.append("dimensions: at least one is needed, or passages")
    for name in section.dimensions:
        if name in (*DRAWN, PASSAGE):
            problems.append(f"dimensions.{name}: the name is taken; templates have {', '.join(DRAWN)}, and {PASSAGE}")
    for name, values in axes.items():
        repeated = sorted(value for value, count in Counter(values).items() if count > 1)
        if repeated:
            problems.append(f"dimensions.{name}: given twice: {', '.join(repeated)}")
    for number, rule in enumerate(section.compatibility):
        problems += _rule_problems(f"compatibility[{number}].where", rule, axes)
    if not problems and not any(
        fits(section.compatibility, dict(zip(axes, values, strict=True)))
        for values in itertools.product(*axes.values())
    ):
        problems.append("compatibility: no cell fits")
    if problems:
        raise ValueError("; ".join(problems))


def _template_problems(name: str, style: Style, axes: Mapping[str, list[str]]) -> list[str]:
    where = f"styles.{name}.template"
    problems = _field_problems(where, style.template, [*axes, *DRAWN])
    if not problems and style.num_examples and "examples" not in _fields(style.template):
        problems.append(f"{where}: has no {{examples}}, but num_examples is {style.num_examples}")
    return problems


def _field_problems(where: str, template: str, valid: list[str]) -> list[str]:
    try:
        fields = _fields(template)
    except ValueError as error:
        return [f"{where}: {error}; a literal brace is written twice"]
    return [f"{where}: unknown field {{{field}}}; {nearest(field, valid)}" for field in fields if field not in valid]


def _fields(template: str) -> list[str]:
    parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    for _, field, specification, conversion in parts:
        if specification or conversion:
            raise ValueError(f"field {{{field}}} takes no format")
    return [str(field) for _, field, _, _ in parts]


def _rule_problems(where: str, rule: Compatibility, axes: Mapping[str, list[str]]) -> list[str]:
    problems = []
    for name, patterns in rule.where.items():
        if name not in axes:
            problems.append(f"{where}.{name}: no such dimension; {nearest(name, axes)}")
            continue
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if name != PASSAGE and not any(fnmatchcase(value, pattern) for value in axes[name]):
                problems.append(f"{where}.{name}: {pattern} matches no value; {nearest(pattern, axes[name])}")
    return problems
