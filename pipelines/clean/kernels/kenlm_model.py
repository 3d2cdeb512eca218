"""Scores many texts at once under a KenLM model of hash tables, from its own file, with its own arithmetic.

The layout is that of KenLM's binary files of version 5 with probing hash tables (`binary_format.cc`, `vocab.cc`,
`search_hashed.hh`), the arithmetic that of `model.cc`: sums of float32, term by term in its order. Models of other
kinds (tries, quantized) are left to the package kenlm.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from pipelines.similarity.utf8 import Indices

MAGIC = b"mmap lm http://kheafield.com/code format version 5\n\0"
_SANITY = 88
"""Bytes before the parameters: the magic words, and numbers that tell the machine's byte order."""
_PROBING = 0
_VOCABULARY_ENTRY = 12
_UNIGRAM = np.dtype([("prob", "<f4"), ("backoff", "<f4")])
_MIDDLE = np.dtype([("key", "<u8"), ("prob", "<f4"), ("backoff", "<f4")])
_LONGEST = np.dtype([("key", "<u8"), ("prob", "<f4")])

Records = npt.NDArray[Any]
Totals = npt.NDArray[np.float32]


@dataclass(frozen=True, eq=False)
class HashedModel:
    """A model as its tables; they stay in the file, which processes share."""

    order: int
    words: dict[str, int]
    unigrams: Records
    middles: Records
    """The tables of n-grams longer than one word and shorter than `order`, one after the other."""
    starts: Indices
    """Where each of them begins, and where the last one ends."""
    longest: Records

    def numbers(self, pieces: Sequence[str]) -> npt.NDArray[np.int64]:
        """What the model calls the words; 0 what it does not know."""
        return np.array([self.words.get(piece, 0) for piece in pieces], dtype=np.int64)

    def scores(self, numbers: npt.NDArray[np.int64], offsets: Indices) -> tuple[Totals, npt.NDArray[np.int8]]:
        """The log10 probability of each text, its begin and end included, and how many words the n-gram has that tells
        the probability of each word; `offsets` tell where a text's words stand."""
        ends = self.words["<s>"], self.words["</s>"]
        tables = self.unigrams, self.middles, self.starts, self.longest
        totals, sizes = _scores(numbers, offsets, *tables, self.order, *ends)
        return totals, sizes


def _slots(entries: int, multiplier: float) -> int:
    return max(entries + 1, int(multiplier * entries))


@cache
def load_hashed_model(path: str) -> HashedModel | None:
    """Map a model file, once per process; None where it is of another kind, or does not tell its words."""
    data = np.memmap(path, dtype=np.uint8, mode="r")
    if data[: len(MAGIC)].tobytes() != MAGIC:
        return None
    order, multiplier, kind, has_words, _ = struct.unpack_from("<B3xfIB3xI", data.data, _SANITY)
    if kind != _PROBING or not has_words or order < 3:
        return None
    counts = struct.unpack_from(f"<{order}Q", data.data, _SANITY + 20)
    at = -(-(_SANITY + 20 + 8 * order) // 8) * 8
    at += 8 + _slots(counts[0], multiplier) * _VOCABULARY_ENTRY

    def table(dtype: Any, size: int) -> Records:
        nonlocal at
        found = np.frombuffer(data, dtype=dtype, count=size, offset=at)
        at += found.nbytes
        return found

    unigrams = table(_UNIGRAM, counts[0] + 1)
    sizes = [_slots(count, multiplier) for count in counts[1:-1]]
    middles = table(_MIDDLE, sum(sizes))
    longest = table(_LONGEST, _slots(counts[-1], multiplier))
    words = data[at:].tobytes().decode("utf-8", "replace").split("\0")
    numbers = {word: number for number, word in enumerate(words[: counts[0] + 1])}
    if words[0] != "<unk>" or not {"<s>", "</s>"} <= numbers.keys():
        return None
    return HashedModel(order, numbers, unigrams, middles, np.cumsum([0, *sizes]), longest)


@nb.njit(cache=True, nogil=True)
def _find(table: Any, begin: int, end: int, slot: int, key: Any) -> Any:  # pragma: no cover - compiled
    """Where `key` stands in the hash table from `begin` to `end`, looked for from `slot` on; -1 where it does not."""
    while True:
        found = table[slot].key
        if found == key:
            return slot
        if found == 0:
            return -1
        slot = slot + 1 if slot + 1 < end else begin


@nb.njit(cache=True, nogil=True)
def _extended(
    table: Any, begin: int, end: int, size: int, words: Any, keys: Any, asked: Any, slots: Any
) -> None:  # pragma: no cover - compiled
    """Put one more word of history before the n-grams `asked` and look them up: `slots` tells where, or -1."""
    reached = np.uint64(0)
    for number in range(len(asked)):
        at = asked[number]
        history = np.uint64(1 + words[at - size + 1])
        keys[at] = (keys[at] * np.uint64(8978948897894561157)) ^ (history * np.uint64(17894857484156487943))
        slots[number] = begin + np.int64(keys[at] % np.uint64(end - begin))
        reached ^= table[slots[number]].key  # the reads of this loop wait for memory together
    slots[-1] = np.int64(reached & np.uint64(1))
    for number in range(len(asked)):
        slots[number] = _find(table, begin, end, slots[number], keys[asked[number]])


@nb.njit(cache=True, nogil=True)
def _scores(
    numbers: Any,
    offsets: Any,
    unigrams: Any,
    middles: Any,
    starts: Any,
    longest: Any,
    order: int,
    first: int,
    last: int,
) -> Any:  # pragma: no cover - compiled
    totals, sizes = np.zeros(len(offsets) - 1, dtype=np.float32), np.empty(len(numbers), dtype=np.int8)
    most = np.max(offsets[1:] - offsets[:-1]) + 2 if len(totals) else 0
    words, keys, probs = np.empty(most, np.int64), np.empty(most, np.uint64), np.empty(most, np.float32)
    asked, slots = np.empty(most, np.int64), np.empty(most + 1, np.int64)
    lengths, backoffs = np.empty(most, np.int64), np.empty((most, order), np.float32)
    for row in range(len(totals)):
        count = offsets[row + 1] - offsets[row] + 2
        words[0], words[count - 1] = first, last
        words[1 : count - 1] = numbers[offsets[row] : offsets[row + 1]]
        left = 0
        for at in range(count):
            word = words[at]
            keys[at], probs[at], backoffs[at, 0], lengths[at] = word, unigrams[word].prob, unigrams[word].backoff, 1
            if at > 0 and not np.signbit(probs[at]):  # a sign tells that no n-gram ends so
                asked[left] = at
                left += 1
        for size in range(2, order + 1):
            if size == order:
                _extended(longest, 0, len(longest), size, words, keys, asked[:left], slots)
            else:
                _extended(middles, starts[size - 2], starts[size - 1], size, words, keys, asked[:left], slots)
            still = 0
            for number in range(left):
                at, slot = asked[number], slots[number]
                if slot < 0:
                    continue
                lengths[at] = size
                if size == order:
                    probs[at] = longest[slot].prob
                    continue
                probs[at], backoffs[at, size - 1] = middles[slot].prob, middles[slot].backoff
                if at >= size and not np.signbit(probs[at]):
                    asked[still] = at
                    still += 1
            left = still
        total, known = np.float32(0), 1
        for at in range(1, count):
            prob = -abs(probs[at])
            for level in range(lengths[at] - 1, known):
                prob += backoffs[at - 1, level]
            total += prob
            if at < count - 1:
                sizes[offsets[row] + at - 1] = lengths[at]
            known = min(lengths[at], order - 1)
            while known and backoffs[at, known - 1] == 0 and np.signbit(backoffs[at, known - 1]):
                known -= 1  # a negative zero tells that no n-gram goes on so
        totals[row] = total
    return totals, sizes
