"""How much of a known text stands in another: the share of its runs of letters that the other holds too.

As evaluation sets are looked for in training data: Brown et al., Language Models are Few-Shot Learners (2020),
appendix C. Runs are of ten letters and digits, which in Chinese are a clause; marks, blanks and case do not count.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.similarity.simhash import without_characters
from pipelines.similarity.sketch import ignored_characters
from pipelines.similarity.utf8 import Bytes, Indices, folded, utf8

Hashes = npt.NDArray[np.uint64]
RUN = 10
FEWEST_RUNS = 3
"""A known text of fewer runs tells nothing: it is a common phrase, or a number."""


class KnownTexts:
    """Texts to look for in others."""

    def __init__(self, texts: Sequence[str]) -> None:
        hashes, ends = _runs(*_letters(pa.array(texts, pa.large_string())), RUN)
        parts = [np.unique(part) for part in np.split(hashes, ends[1:-1])]
        self.sizes = np.array([len(part) for part in parts], dtype=np.int64)
        """Different runs of each text."""
        looked_for = np.flatnonzero(self.sizes >= FEWEST_RUNS)
        every = np.concatenate([np.zeros(0, np.uint64), *(parts[number] for number in looked_for)])
        order = np.argsort(every, kind="stable")
        self._hashes: Hashes = every[order]
        self._owners: Indices = np.repeat(looked_for, self.sizes[looked_for])[order]

    @property
    def too_short(self) -> int:
        """How many of the texts are not looked for."""
        return int((self.sizes < FEWEST_RUNS).sum())

    def found_in(self, texts: pa.Array) -> dict[int, tuple[int, float]]:
        """Of an array of strings those that share runs with a known text: which one, and the share of its runs."""
        hashes, ends = _runs(*_letters(texts), RUN)
        at = np.minimum(np.searchsorted(self._hashes, hashes), max(len(self._hashes) - 1, 0))
        shared = self._hashes[at] == hashes if len(self._hashes) else np.zeros(len(hashes), np.bool_)
        rows = np.unique(np.searchsorted(ends, np.flatnonzero(shared), side="right") - 1)
        return {int(row): self._most(hashes[ends[row] : ends[row + 1]]) for row in rows}

    def _most(self, hashes: Hashes) -> tuple[int, float]:
        found = np.unique(hashes)
        begin, end = (np.searchsorted(self._hashes, found, side=side) for side in ("left", "right"))
        owners = Counter[int]()
        for first, last in zip(begin[begin < end], end[begin < end], strict=True):
            owners.update(self._owners[first:last].tolist())
        return max(((owner, count / int(self.sizes[owner])) for owner, count in owners.items()), key=lambda one: one[1])


def _letters(array: pa.Array) -> tuple[Bytes, Indices]:
    data, offsets = without_characters(*utf8(array), ignored_characters())
    return data, offsets


@nb.njit(cache=True, nogil=True)
def _runs(data: Any, offsets: Any, size: int) -> Any:  # pragma: no cover - compiled
    """The hashes of all runs of `size` code points, ASCII in lower case, and the offsets of the rows' among them."""
    hashes = np.empty(offsets[-1] - offsets[0], dtype=np.uint64)
    ends = np.zeros(len(offsets), dtype=np.int64)
    total = 0
    for row in range(len(offsets) - 1):
        points = folded(data, offsets[row], offsets[row + 1])
        for begin in range(len(points) - size + 1):
            value = np.uint64(0xCBF29CE484222325)
            for at in range(begin, begin + size):
                value = (value ^ np.uint64(points[at])) * np.uint64(0x9E3779B97F4A7C15)
                value ^= value >> np.uint64(29)
            hashes[total] = value
            total += 1
        ends[row + 1] = total
    return hashes[:total], ends
