"""The grid: which cells have a request, and with which words.

A cell is one value per dimension and a style. What is drawn for a sample (an injection, examples, the phrasing of
its training input) follows from the seed, the cell's values and the sample's number alone, so that the same recipe
gives the same prompts, and adding a value to a dimension leaves all other prompts as they were.
"""

import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from pipelines.artifacts.reports.synthesize import CompatibilityMap
from pipelines.llm.ledger import Keys
from pipelines.llm.requests import ChatRequest, Positions, key_of
from pipelines.recipe.synthesize import PASSAGE, Synthesize, matches
from pipelines.synthesize.passages import StoredTexts
from pipelines.synthesize.shapes import Conversation, conversations, response_format

CHUNK = 8192
"""Positions that are looked at together."""
MAX_DRAWN_VALUES = 60
"""Dimensions of more values than this, such as passages, are left out of the map."""


class Grid:
    """The requests of a recipe, made one by one when they are needed."""

    section_key = "synthesize"

    def __init__(self, section: Synthesize, seed: int, passages: StoredTexts | None = None) -> None:
        self.section = section
        self.seed = seed
        self.passages = passages
        self.response_format = response_format(section.answer)
        self._more = {"response_format": self.response_format} if self.response_format else {}
        self.axes: dict[str, Sequence[str]] = {} if passages is None else {PASSAGE: passages}
        self.axes |= {**section.dimensions, "style": list(section.styles)}
        self._matching = [
            {
                name: np.array([matches(value, patterns) for value in self.axes[name]], np.bool_)
                for name, patterns in rule.where.items()
            }
            for rule in section.compatibility
        ]

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

    def positions(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """The positions from `start` up to `stop` whose cells fit, in order."""
        end = self.size if stop is None else stop
        for first in range(start, end, CHUNK):
            yield from self.fitting(first, min(first + CHUNK, end)).tolist()

    def indices(self, positions: Positions) -> dict[str, Positions]:
        """Of each axis the number of its value at each position."""
        numbers = positions // self.section.samples_per_cell
        found: dict[str, Positions] = {}
        for name, values in reversed(self.axes.items()):
            numbers, found[name] = np.divmod(numbers, len(values))
        return {name: found[name] for name in self.axes}

    def fitting(self, start: int, stop: int) -> Positions:
        """The positions whose cells fit; the rules are looked up in whole columns."""
        positions = np.arange(start, stop)
        if not self.section.compatibility:
            return positions
        indices = self.indices(positions)
        is_asked = np.ones(len(positions), np.bool_)
        for rule, matching in zip(self.section.compatibility, self._matching, strict=True):
            matched = [matching[name][indices[name]] for name in matching]
            is_asked[np.logical_and.reduce(matched)] = rule.fits
        return positions[is_asked]

    def keys(self, start: int, stop: int) -> tuple[Positions, Keys]:
        """The positions whose cells fit with the keys of their requests, as `request` makes them."""
        positions = self.fitting(start, stop)
        section, escape = self.section, json.encoder.encode_basestring
        draws = len(section.injections) > 1 or any(style.picked for style in section.styles.values())
        system = [{"role": "system", "content": section.system}] if section.system else []
        head = json.dumps(
            [section.model, [*system, {"content": "", "role": "user"}]], ensure_ascii=False, sort_keys=True
        )
        before, after = head.removesuffix('"", "role": "user"}]]'), ', "role": "user"}], '
        parameters = {**section.generation.model_dump(exclude_none=True), **self._more}
        after += json.dumps(parameters, ensure_ascii=False, sort_keys=True) + ", {"
        names = list(self.axes)
        written = [(name, escape(name)) for name in sorted(names)]
        columns = [column.tolist() for column in self.indices(positions).values()]
        samples = (positions % section.samples_per_cell).tolist()
        keys = bytearray()
        of_cell, last = hashlib.sha256(), None
        for row, sample in zip(zip(*columns, strict=True), samples, strict=True):
            if draws or row != last:  # else all but the sample's number is as it was
                cell = {name: self.axes[name][number] for name, number in zip(names, row, strict=True)}
                prompt = escape(self._prompt(cell, self._draw(cell, sample) if draws else None))
                told = ", ".join([f"{label}: {escape(cell[name])}" for name, label in written])
                of_cell, last = hashlib.sha256(f"{before}{prompt}{after}{told}}}, ".encode()), row
            of_sample = of_cell.copy()
            of_sample.update(b"%d]" % sample)
            keys += of_sample.digest()[:16]
        return positions, np.frombuffer(bytes(keys), "V16")

    def _draw(self, cell: Mapping[str, str], sample: int) -> random.Random:
        return random.Random("\0".join([str(self.seed), *cell.values(), str(sample)]))

    def _prompt(self, cell: Mapping[str, str], draw: random.Random | None) -> str:
        """The prompt of a cell; without `draw` nothing in it is drawn."""
        style = self.section.styles[cell["style"]]
        injections = self.section.injections
        fields = {
            **cell,
            "injection": draw.choice(injections) if draw else injections[0],
            "examples": "\n".join(draw.sample(style.pool, style.picked)) if draw else "",
            "max_length": style.max_length or "",
        }
        return style.template.format_map(fields).strip()

    def request(self, pos: int) -> ChatRequest:
        """The request at `pos`."""
        cell = self.cell(pos)
        sample = pos % self.section.samples_per_cell
        draw = self._draw(cell, sample)
        prompt = self._prompt(cell, draw)
        suffix = self.section.styles[cell["style"]].query_suffix
        query = draw.choice(self.section.queries or [""]).format_map(cell) + suffix
        system = [{"role": "system", "content": self.section.system}] if self.section.system else []
        messages = [*system, {"role": "user", "content": prompt}]
        key = key_of(self.section, messages, cell, sample, **self._more)
        return ChatRequest(pos, cell, sample, messages, query, key)

    def check_answer(self, request: ChatRequest, text: str) -> None:
        """Raise MalformedError where an answer is not of the shape that the recipe asks for."""
        if self.section.answer.shape != "text":
            self.conversations(request, text)

    def conversations(self, request: ChatRequest, text: str) -> list[Conversation]:
        """The conversations that an answer holds; MalformedError where it is not of its shape."""
        return conversations(text, request.query, self.section.answer, request.cell)


def drawn_axes(grid: Grid) -> dict[str, list[str]]:
    """The dimensions, and the styles, with more than one value and not too many, in order."""
    return {name: list(values) for name, values in grid.axes.items() if 1 < len(values) <= MAX_DRAWN_VALUES}


def compatibility_map(grid: Grid) -> CompatibilityMap | None:
    """Of the two dimensions with the most values, which pairs are asked; None where there are not two."""
    axes = drawn_axes(grid)
    if len(axes) < 2:
        return None
    down, across = sorted(sorted(axes, key=lambda name: -len(axes[name]))[:2], key=list(axes).index)
    fitting = np.zeros((len(axes[down]), len(axes[across])), np.int64)
    for start in range(0, grid.size, CHUNK):
        indices = grid.indices(grid.fitting(start, min(start + CHUNK, grid.size)))
        np.add.at(fitting, (indices[down], indices[across]), 1)
    each = grid.size // (len(axes[down]) * len(axes[across]))
    return CompatibilityMap(
        dimensions=[down, across],
        rows=axes[down],
        columns=axes[across],
        shares=(fitting / each).tolist(),
    )
