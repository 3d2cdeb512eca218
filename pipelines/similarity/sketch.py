"""Near-duplicates among Chinese texts: one byte of each MinHash, so that the overlap of a pair can be read off.

Source: Li, König, b-Bit Minwise Hashing (2010). Shingles are runs of letters and digits; a shingle counts once.
"""

import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import regex

from pipelines.similarity.minhash import first_that_stays
from pipelines.similarity.utf8 import Bytes, Indices, Mask, decode

Sketches = npt.NDArray[np.uint8]
"""Shape (texts, permutations + 2); the last two bytes are the number of letters, the higher one first."""
BAND = 5
"""Bytes of a band: two texts are compared where they agree in a whole one. At a Jaccard similarity of 0.7 that fails
for one pair in 10,000 (of 256 permutations)."""
FEW_LETTERS, SAME = 30, 0.9
"""Texts of fewer letters are alike only from this similarity on: one form with another name in it is another text."""


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


def sketch_of_other(text: str, permutations: int) -> Sketches:
    """The sketch of a text without letters, which only an equal text has."""
    return np.frombuffer(hashlib.shake_128(text.encode()).digest(permutations) + b"\0\0", dtype=np.uint8)


@nb.njit(cache=True, nogil=True)
def _sketches(data: Any, offsets: Any, window: int, factors: Any, adds: Any) -> Any:  # pragma: no cover - compiled
    permutations = len(factors)
    found = np.zeros((len(offsets) - 1, permutations + 2), dtype=np.uint8)
    least = np.empty(permutations, dtype=np.uint32)
    for row in range(len(found)):
        points = np.empty(offsets[row + 1] - offsets[row], dtype=np.int64)
        count, i = 0, offsets[row]
        while i < offsets[row + 1]:
            point, i = decode(data, i)
            points[count] = point + 32 if 65 <= point <= 90 else point
            count += 1
        least[:] = np.uint32(0xFFFFFFFF)
        for begin in range(max(1, count - window + 1)):
            value = np.uint64(0xCBF29CE484222325)
            for at in range(begin, min(begin + window, count)):
                value = (value ^ np.uint64(points[at])) * np.uint64(0x9E3779B97F4A7C15)
                value ^= value >> np.uint64(29)
            hashed = np.uint32(value >> np.uint64(32))
            for p in range(permutations):
                mixed = np.uint32(hashed * factors[p] + adds[p])
                mixed ^= mixed >> np.uint32(15)
                least[p] = min(least[p], mixed)
        for p in range(permutations):
            found[row, p] = np.uint8((least[p] * np.uint32(0x9E3779B1)) >> np.uint32(24))
        letters = min(count, 65535)
        found[row, permutations], found[row, permutations + 1] = letters >> 8, letters & 255
    return found


def overlap(one: Sketches, other: Sketches) -> npt.NDArray[np.float64]:
    """The estimated Jaccard similarity of texts, row by row; its standard error is 0.03 for 256 permutations."""
    equal = (one[:, :-2] == other[:, :-2]).mean(axis=1)
    return np.asarray(np.clip((equal - 1 / 256) / (1 - 1 / 256), 0, 1))


def first_of_similar(keys: Sketches, threshold: float) -> Indices:
    """For each text the first one that it repeats, itself where it repeats none.

    A text repeats an earlier one that stays and is at least `threshold` like it; what repeats the same text need not be
    alike, but no text goes for one that itself goes.
    """
    unique, firsts, inverse = np.unique(keys, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(firsts, kind="stable")
    kept = np.ascontiguousarray(unique[order])
    pairs = np.concatenate([np.zeros((0, 2), dtype=np.int64), *_pairs(kept, threshold)])
    pairs = np.unique(pairs, axis=0)
    pairs = pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))]
    number_of = np.empty(len(order), dtype=np.int64)
    number_of[order] = np.arange(len(order))
    chosen = first_that_stays(len(kept), pairs)
    return np.asarray(firsts[order][chosen[number_of[inverse.ravel()]]])


def _pairs(keys: Sketches, threshold: float) -> Iterator[Indices]:
    """Pairs (earlier, later) that are alike, band by band."""
    permutations = keys.shape[1] - 2
    for at in range(0, permutations - BAND + 1, BAND):
        weights = np.uint64(256) ** np.arange(BAND, dtype=np.uint64)
        bands = (keys[:, at : at + BAND].astype(np.uint64) * weights).sum(axis=1)
        order = np.argsort(bands, kind="stable")
        yield _alike(keys, order, bands[order], threshold)


@nb.njit(cache=True, nogil=True)
def _alike(keys: Any, order: Any, bands: Any, threshold: float) -> Any:  # pragma: no cover - compiled
    """The pairs within runs of equal bands; in a long run each text is compared with the first 200 only."""
    permutations = keys.shape[1] - 2
    found = [(np.int64(0), np.int64(0)) for _ in range(0)]
    begin = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and bands[end] == bands[begin]:
            continue
        for j in range(begin + 1, end):
            later = order[j]
            for i in range(begin, min(j, begin + 200)):
                earlier = order[i]
                equal = 0
                for p in range(permutations):
                    equal += keys[earlier, p] == keys[later, p]
                alike = (equal / permutations - 1 / 256) / (1 - 1 / 256)
                fewer = min(
                    np.int64(keys[earlier, permutations]) * 256 + keys[earlier, permutations + 1],
                    np.int64(keys[later, permutations]) * 256 + keys[later, permutations + 1],
                )
                if alike >= (max(threshold, SAME) if fewer < FEW_LETTERS else threshold):
                    found.append((np.int64(earlier), np.int64(later)))
        begin = end
    pairs = np.empty((len(found), 2), dtype=np.int64)
    for k in range(len(found)):
        pairs[k, 0], pairs[k, 1] = found[k]
    return pairs
