"""Texts of a batch as one Arrow column, with the views that operators share, each computed once when asked for."""

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.clean.kernels.characters import BLANK, CLASSES, class_table
from pipelines.clean.kernels.han_pairs import pair_counts
from pipelines.similarity.utf8 import Bytes, Indices, Mask, decode, utf8

__all__ = ["Column", "Indices", "Mask", "decode", "utf8"]


@nb.njit(cache=True, nogil=True)
def _count(data: Any, offsets: Any, table: Any) -> Any:  # pragma: no cover - compiled
    counts = np.zeros((5, len(offsets) - 1), dtype=np.int64)
    for row in range(len(offsets) - 1):
        total = first = second = third = fourth = np.int64(0)
        i = offsets[row]
        while i < offsets[row + 1]:
            point, i = decode(data, i)
            bits = np.int64(table[point])
            total += 1
            first += bits & 1
            second += bits >> 1 & 1
            third += bits >> 2 & 1
            fourth += bits >> 3 & 1
        counts[0, row], counts[1, row], counts[2, row] = total, first, second
        counts[3, row], counts[4, row] = third, fourth
    return counts


class Column:
    """One column of texts without nulls.

    `array` is an Arrow string array in one chunk. Views stay valid because a Column is never changed: operators
    that change texts make a new one. `questions`, where an operator asks for them, are what the texts answer, row by
    row; an empty one says that the text is long enough to stand alone.
    """

    def __init__(self, array: pa.Array, questions: pa.Array | None = None) -> None:
        self.array = array
        self.questions = questions

    def __len__(self) -> int:
        return len(self.array)

    @cached_property
    def utf8(self) -> tuple[Bytes, Indices]:
        """Bytes and row offsets, as `utf8()` gives them."""
        return utf8(self.array)

    @cached_property
    def lengths(self) -> Indices:
        """Code points per row."""
        if "_counts" in self.__dict__:
            return np.asarray(self._counts[0])
        lengths: Indices = pc.utf8_length(self.array).to_numpy(zero_copy_only=False).astype(np.int64)
        return lengths

    @cached_property
    def _counts(self) -> npt.NDArray[np.int64]:
        return np.asarray(_count(*self.utf8, class_table()))

    @cached_property
    def pairs(self) -> npt.NDArray[np.int64]:
        """Pairs of Han characters, as `pair_counts` counts them."""
        return pair_counts(*self.utf8)

    def count(self, character_class: int) -> Indices:
        """Code points per row of one class of `pipelines.clean.kernels.characters`; one scan counts all classes."""
        return np.asarray(self._counts[1 + CLASSES.index(character_class)])

    def share(self, character_class: int) -> npt.NDArray[np.float64]:
        """Share of code points per row of one class, 0 for an empty row."""
        counts = self.count(character_class)
        shares: npt.NDArray[np.float64] = np.zeros(len(self))
        np.divide(counts, self._counts[0], out=shares, where=self._counts[0] > 0)
        return shares

    def share_of_visible(self, character_class: int) -> npt.NDArray[np.float64]:
        """The same share of the code points that are not blank."""
        visible = self._counts[0] - self.count(BLANK)
        shares: npt.NDArray[np.float64] = np.zeros(len(self))
        np.divide(self.count(character_class), visible, out=shares, where=visible > 0)
        return shares

    def texts(self) -> list[str]:
        """The rows as Python strings, for operators that cannot work on the column."""
        texts: list[str] = self.array.to_pylist()
        return texts

    def slice(self, offset: int, length: int) -> "Column":
        """So many rows from one on."""
        return Column(self.array.slice(offset, length), self.questions and self.questions.slice(offset, length))

    def filter(self, keep: Mask) -> "Column":
        """The rows where `keep`; counts made so far are carried over."""
        kept = Column(self.array.filter(pa.array(keep)))
        if "lengths" in self.__dict__:
            kept.__dict__["lengths"] = self.lengths[keep]
        if "_counts" in self.__dict__:
            kept.__dict__["_counts"] = self._counts[:, keep]
        if "pairs" in self.__dict__:
            kept.__dict__["pairs"] = self.pairs[keep]
        return kept

    def contains(self, pattern: str, *, ignore_case: bool = False) -> Mask:
        """Rows that contain a substring; a cheap test before a regular expression."""
        return _mask(pc.match_substring(self.array, pattern, ignore_case=ignore_case))

    def matches(self, pattern: str) -> Mask:
        """Rows in which RE2 finds `pattern`; its classes are ASCII, so use it where that finds at least as much."""
        return _mask(pc.match_substring_regex(self.array, pattern))

    def rewrite(self, candidates: Mask, change: Callable[[str], str]) -> pa.Array:
        """The column with `change` applied to the candidate rows; the same array where nothing changed."""
        rows = np.flatnonzero(candidates)
        if not len(rows):
            return self.array
        before: list[str] = self.array.take(pa.array(rows)).to_pylist()
        after = [change(text) for text in before]
        changed = np.fromiter((a != b for a, b in zip(after, before, strict=True)), dtype=np.bool_, count=len(rows))
        if not changed.any():
            return self.array
        mask = np.zeros(len(self), dtype=np.bool_)
        mask[rows[changed]] = True
        values = pa.array([a for a, c in zip(after, changed, strict=True) if c], type=self.array.type)
        return pc.replace_with_mask(self.array, pa.array(mask), values)


def _mask(array: pa.Array) -> Mask:
    mask: Mask = array.to_numpy(zero_copy_only=False)
    return mask
