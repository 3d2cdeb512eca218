"""The grid: which cells have a request, and with which words.

A cell is one value per dimension and a style. What is drawn for a sample (an injection, examples, the phrasing of
its training input) follows from the seed, the cell's values and the sample's number alone, so that the same recipe
gives the same prompts, and adding a value to a dimension leaves all other prompts as they were.
"""

import random
from collections import Counter
from collections.abc import Iterator

from pipelines.artifacts.reports.synthesize import CompatibilityMap
from pipelines.llm.requests import ChatRequest, key_of
from pipelines.recipe.synthesize import Synthesize, fits
from pipelines.synthesize.shapes import Conversation, conversations, response_format

MAX_DRAWN_VALUES = 60
"""Dimensions of more values than this, such as passages, are left out of the map."""


class Grid:
    """The requests of a recipe, made one by one when they are needed."""

    section_key = "synthesize"

    def __init__(self, section: Synthesize, seed: int) -> None:
        self.section = section
        self.seed = seed
        self.response_format = response_format(section.answer)
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

    def request(self, pos: int) -> ChatRequest:
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
    return {name: values for name, values in grid.axes.items() if 1 < len(values) <= MAX_DRAWN_VALUES}


def compatibility_map(grid: Grid) -> CompatibilityMap | None:
    """Of the two dimensions with the most values, which pairs are asked; None where there are not two."""
    axes = drawn_axes(grid)
    if len(axes) < 2:
        return None
    down, across = sorted(sorted(axes, key=lambda name: -len(axes[name]))[:2], key=list(axes).index)
    fitting = Counter((cell[down], cell[across]) for cell in grid.cells())
    each = grid.size // grid.section.samples_per_cell // (len(axes[down]) * len(axes[across]))
    return CompatibilityMap(
        dimensions=[down, across],
        rows=axes[down],
        columns=axes[across],
        shares=[[fitting[row, column] / each for column in axes[across]] for row in axes[down]],
    )
