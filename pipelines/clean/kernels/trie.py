"""Finds the words of a list in unsegmented text, over a whole column: a trie whose first step is one table lookup."""

import sys
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from pipelines.clean.kernels.characters import ALNUM, class_table
from pipelines.similarity.utf8 import decode

ANYWHERE, NOT_IN_LATIN, ALONE = 0, 1, 2
"""What may stand beside a word: anything, anything but a Latin letter or digit, no letter or digit at all."""

CONTEXT = -1
"""Lower case of a code point whose lower case depends on its context or has several code points."""


@cache
def lower_table() -> npt.NDArray[np.int32]:
    """The lower-case code point of each code point, or `CONTEXT`."""
    table = np.arange(sys.maxunicode + 1, dtype=np.int32)
    for point in range(sys.maxunicode + 1):
        lowered = chr(point).lower()
        if lowered != chr(point):
            table[point] = ord(lowered) if len(lowered) == 1 else CONTEXT
    table[ord("Σ")] = CONTEXT  # at the end of a word it is ς
    return table


@dataclass(frozen=True)
class Trie:
    """Words as a trie over lower-case code points."""

    first: npt.NDArray[np.int32]
    """The node of each first code point, -1 where no word begins with it."""
    edges: npt.NDArray[np.int64]
    """Open hash table of `node << 21 | code point`, -1 where empty; its length is a power of two."""
    targets: npt.NDArray[np.int32]
    ends: npt.NDArray[np.int8]
    """For each node -1, or where a word ends its two conditions, `before + 3 * after`."""


def _conditions(word: str, bounded: bool) -> int:
    """A word of one character stands alone; Latin letters and digits at a word's ends have none beside them."""
    if not bounded:
        return ANYWHERE
    if len(word) == 1:
        return ALONE + 3 * ALONE
    before, after = (NOT_IN_LATIN if c.isascii() and c.isalnum() else ANYWHERE for c in (word[0], word[-1]))
    return before + 3 * after


@cache
def build_trie(words: tuple[str, ...], bounded: bool) -> Trie:
    """The trie of the words, lower-cased; with `bounded`, short and Latin ones must stand at word boundaries."""
    tree: dict[tuple[int, int], int] = {}
    ends: dict[int, int] = {}
    for word in filter(None, words):
        node = 0
        for character in word.lower():
            node = tree.setdefault((node, ord(character)), len(tree) + 1)
        ends[node] = _conditions(word.lower(), bounded)
    first = np.full(sys.maxunicode + 1, -1, dtype=np.int32)
    size = 1 << (4 * len(tree) + 1).bit_length()
    edges, targets = np.full(size, -1, dtype=np.int64), np.zeros(size, dtype=np.int32)
    for (node, point), target in tree.items():
        if node == 0:
            first[point] = target
        key = node << 21 | point
        slot = _slot(key, size)
        while edges[slot] >= 0:
            slot = (slot + 1) & (size - 1)
        edges[slot], targets[slot] = key, target
    return Trie(first, edges, targets, np.array([ends.get(node, -1) for node in range(len(tree) + 1)], dtype=np.int8))


def _slot(key: int, size: int) -> int:
    return ((key * 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF) >> 40 & (size - 1)


@nb.njit(cache=True, nogil=True)
def _follow(edges: Any, targets: Any, node: int, point: int) -> Any:  # pragma: no cover - compiled
    """The node after one more code point, -1 where no word goes on so."""
    key = np.int64(node) << 21 | np.int64(point)
    slot = np.int64(np.uint64(key) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)) & (len(edges) - 1)
    while edges[slot] >= 0:
        if edges[slot] == key:
            return targets[slot]
        slot = (slot + 1) & (len(edges) - 1)
    return -1


@nb.njit(cache=True, nogil=True)
def _may_stand(condition: int, neighbour: int, classes: Any) -> Any:  # pragma: no cover - compiled
    """Whether `neighbour`, -1 at an end of the text, may stand beside a word."""
    if condition == ANYWHERE or neighbour < 0:
        return True
    letter = classes[neighbour] & ALNUM != 0
    if condition == NOT_IN_LATIN:
        return neighbour >= 128 or not letter
    return not letter and neighbour != 95  # an underscore


@nb.njit(cache=True, nogil=True)
def _longest(
    data: Any, i: int, stop: int, before: int, lower: Any, classes: Any, first: Any, edges: Any, targets: Any, ends: Any
) -> Any:  # pragma: no cover - compiled
    """The longest word at byte `i`: its code points (0 where there is none), the byte after it, its last code point."""
    point, j = decode(data, i)
    node = first[lower[point]] if lower[point] >= 0 else -1
    length, best, best_end, best_last = 1, 0, j, point
    while node >= 0:
        following, beyond = decode(data, j) if j < stop else (-1, j)
        condition = ends[node]
        left = condition >= 0 and _may_stand(condition % 3, before, classes)
        if left and _may_stand(condition // 3, following, classes):
            best, best_end, best_last = length, j, point
        if following < 0:
            break
        node = _follow(edges, targets, node, lower[following])
        length, j, point = length + 1, beyond, following
    return best, best_end, best_last


@nb.njit(cache=True, nogil=True)
def _search(
    data: Any, offsets: Any, lower: Any, classes: Any, first: Any, edges: Any, targets: Any, ends: Any
) -> Any:  # pragma: no cover - compiled
    flagged, certain = np.zeros(len(offsets) - 1, np.int64), np.ones(len(offsets) - 1, np.bool_)
    for row in range(len(flagged)):
        i, stop, before = offsets[row], offsets[row + 1], np.int64(-1)
        while i < stop:
            point, after = decode(data, i)
            lowered = lower[point]
            if lowered < 0:
                certain[row] = False
            if lowered < 0 or first[lowered] < 0:
                i, before = after, point
                continue
            found, i, before = _longest(data, i, stop, before, lower, classes, first, edges, targets, ends)
            flagged[row] += found
    return flagged, certain


def flagged_characters(trie: Trie, data: Any, offsets: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Code points of each text that belong to a word, and whether no character's lower case was in doubt.

    Of words that overlap, the first counts, and of those that begin together the longest.
    """
    flagged, certain = _search(
        data, offsets, lower_table(), class_table(), trie.first, trie.edges, trie.targets, trie.ends
    )
    return flagged, certain
