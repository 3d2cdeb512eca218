"""Near-duplicates among Chinese texts: one byte of each MinHash, so that the overlap of a pair can be read off.

Source: Li, König, b-Bit Minwise Hashing (2010). Shingles are runs of letters and digits; a shingle counts once.
"""

import hashlib
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import regex

from pipelines.similarity.minhash import first_that_stays
from pipelines.similarity.utf8 import Bytes, Indices, Mask, folded, utf8

Sketches = npt.NDArray[np.uint8]
"""Shape (texts, permutations + 2), or, of answers with their questions, (texts, permutations + permutations // 4 + 2):
the bytes of the text, of a quarter of the permutations for the answer alone, and its number of letters, the higher byte
first."""
BAND = 5
"""Bytes of a band: two texts are compared where they agree in a whole one. At a Jaccard similarity of 0.7 that fails
for one pair in 10,000 (of 256 permutations)."""
FEW_LETTERS, SAME = 30, 0.9
"""Texts of fewer letters are alike only from this similarity on: one form with another name in it is another text."""
LOWER_ALONE = 0.1
"""So much less alike than with their question two answers may be alone; without a bound a long question hides them."""


@cache
def ignored_characters() -> Mask:
    """By code point: all but letters and digits, and the syllables of laughter that decorate a text."""
    points = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    table = np.zeros(sys.maxunicode + 1, dtype=np.bool_)
    table[[ord(character) for character in regex.findall(r"[^\p{L}\p{N}]|[哈嘿呵]", points)]] = True
    return table


@cache
def _multipliers(permutations: int) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    random = np.random.default_rng(1)
    factors, offsets = random.integers(0, 1 << 32, (2, permutations), dtype=np.uint32)
    return factors | np.uint32(1), offsets


def sketches(data: Bytes, offsets: Indices, window: int, permutations: int) -> Sketches:
    """The sketches of texts from which the ignored characters are gone already, in lower case for ASCII.

    A text shorter than `window` is one shingle.
    """
    found: Sketches = _sketches(data, offsets, window, *_multipliers(permutations))
    return found


def sketches_with_questions(asked: pa.Array, answers: pa.Array, window: int, permutations: int) -> Sketches:
    """The sketches of answers of which some stand after their question in `asked`, where the others stand alone."""
    whole = sketches(*utf8(asked), window, permutations)
    factors, adds = (values[: permutations // 4] for values in _multipliers(permutations))
    found = np.concatenate([whole[:, :permutations], whole[:, : len(factors)], whole[:, permutations:]], axis=1)
    rows = np.flatnonzero(np.diff(utf8(asked)[1]) != np.diff(utf8(answers)[1]))
    found[rows, permutations:] = _sketches(*utf8(answers.take(pa.array(rows))), window, factors, adds)
    return found


def sketch_of_other(text: str, length: int) -> Sketches:
    """The sketch of a text without letters, in so many bytes, which only an equal text has."""
    return np.frombuffer(hashlib.shake_128(text.encode()).digest(length - 2) + b"\0\0", dtype=np.uint8)


@nb.njit(cache=True, nogil=True)
def _sketches(data: Any, offsets: Any, window: int, factors: Any, adds: Any) -> Any:  # pragma: no cover - compiled
    permutations = len(factors)
    found = np.zeros((len(offsets) - 1, permutations + 2), dtype=np.uint8)
    least = np.empty(permutations, dtype=np.uint32)
    for row in range(len(found)):
        points = folded(data, offsets[row], offsets[row + 1])
        least[:] = np.uint32(0xFFFFFFFF)
        for begin in range(max(1, len(points) - window + 1)):
            value = np.uint64(0xCBF29CE484222325)
            for at in range(begin, min(begin + window, len(points))):
                value = (value ^ np.uint64(points[at])) * np.uint64(0x9E3779B97F4A7C15)
                value ^= value >> np.uint64(29)
            hashed = np.uint32(value >> np.uint64(32))
            for p in range(permutations):
                mixed = np.uint32(hashed * factors[p] + adds[p])
                mixed ^= mixed >> np.uint32(15)
                least[p] = min(least[p], mixed)
        for p in range(permutations):
            found[row, p] = np.uint8((least[p] * np.uint32(0x9E3779B1)) >> np.uint32(24))
        letters = min(len(points), 65535)
        found[row, permutations], found[row, permutations + 1] = letters >> 8, letters & 255
    return found


def overlap(one: Sketches, other: Sketches, permutations: int) -> npt.NDArray[np.float64]:
    """The estimated Jaccard similarity of texts, row by row; its standard error is 0.03 for 256 permutations."""
    equal = (one[:, :permutations] == other[:, :permutations]).mean(axis=1)
    return np.asarray(np.clip((equal - 1 / 256) / (1 - 1 / 256), 0, 1))


def first_of_similar(keys: Sketches, permutations: int, threshold: float) -> Indices:
    """For each text the first one that it repeats, itself where it repeats none.

    A text repeats an earlier one that stays and is at least `threshold` like it; what repeats the same text need not be
    alike, but no text goes for one that itself goes.
    """
    stored = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(keys.shape[1]), len(keys), [None, pa.py_buffer(np.ascontiguousarray(keys))]
    )
    numbers = stored.dictionary_encode().indices.to_numpy()  # in the order in which they come
    firsts = np.unique(numbers, return_index=True)[1]
    kept = np.ascontiguousarray(keys[firsts])
    found = np.unique(np.concatenate([np.zeros(0, dtype=np.int64), *_pairs(kept, permutations, threshold)]))
    chosen = first_that_stays(len(kept), np.stack([found & 0xFFFFFFFF, found >> 32], axis=1))
    return np.asarray(firsts[chosen[numbers]])


def _pairs(keys: Sketches, permutations: int, threshold: float) -> Iterator[Indices]:
    """Pairs that are alike, band by band, as `later << 32 | earlier`."""
    bands = range(0, permutations - BAND + 1, BAND)
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # compiled code, which holds no lock
        yield from pool.map(lambda band: _alike(keys, band, permutations, threshold), bands)


LONG_RUN = 200
"""Of the texts that agree in a band, each is compared with so many first ones."""


@nb.njit(cache=True, nogil=True)
def _alike(keys: Any, band: int, permutations: int, threshold: float) -> Any:  # pragma: no cover - compiled
    """The pairs that agree in a band and are alike."""
    slots = 1
    while slots <= 2 * len(keys):
        slots *= 2
    # a hash table of the first text of each chain, what follows a text in its chain, and the last text of a chain
    heads, following, tails = np.full(slots, -1), np.full(len(keys), -1), np.empty(len(keys), np.int64)
    found = [np.int64(0) for _ in range(0)]
    for later in range(len(keys)):
        value = np.uint64(0)
        for p in range(band, band + BAND):
            value = value << np.uint64(8) | np.uint64(keys[later, p])
        slot = np.int64((value * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(24)) & (len(heads) - 1)
        while heads[slot] >= 0:
            agrees = True
            for p in range(band, band + BAND):
                agrees &= keys[heads[slot], p] == keys[later, p]
            if agrees:
                break
            slot = (slot + 1) & (len(heads) - 1)
        first = heads[slot]
        if first < 0:
            heads[slot] = tails[later] = later
            continue
        earlier, compared = first, 0
        while earlier >= 0 and compared < LONG_RUN:
            if _is_alike(keys, earlier, later, permutations, threshold):
                found.append(np.int64(later) << 32 | np.int64(earlier))
            earlier = following[earlier]
            compared += 1
        following[tails[first]] = tails[first] = later
    return np.array(found, dtype=np.int64)


@nb.njit(cache=True, nogil=True)
def _is_alike(
    keys: Any, earlier: int, later: int, permutations: int, threshold: float
) -> Any:  # pragma: no cover - compiled
    last = keys.shape[1] - 2
    fewer = min(
        np.int64(keys[earlier, last]) * 256 + keys[earlier, last + 1],
        np.int64(keys[later, last]) * 256 + keys[later, last + 1],
    )
    least = max(threshold, SAME) if fewer < FEW_LETTERS else threshold
    if _similarity(keys, earlier, later, 0, permutations) < least:
        return False
    if fewer >= FEW_LETTERS:
        least -= LOWER_ALONE
    return last == permutations or _similarity(keys, earlier, later, permutations, last) >= least


@nb.njit(cache=True, nogil=True)
def _similarity(keys: Any, one: int, other: int, begin: int, end: int) -> Any:  # pragma: no cover - compiled
    equal = 0
    for p in range(begin, end):
        equal += keys[one, p] == keys[other, p]
    return (equal / (end - begin) - 1 / 256) / (1 - 1 / 256)
