"""MinHash: texts that share most of their shingles agree in a whole band of minima.

For documents, band hashes as datasketch and data-juicer make them. For answers, the bands only find candidates, and the
exact overlap of character pairs decides. Source: Broder, On the resemblance and containment of documents
(1997).
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import regex

from pipelines.similarity.utf8 import Indices

Hashes = npt.NDArray[np.uint64]
MERSENNE_PRIME = (1 << 61) - 1
ANSWER_BANDS = 32
"""Bands of an answer's MinHash; how many minima are in one follows from the threshold."""
MISSED = 1e-4
"""Of pairs of answers right at the threshold, the share that no band may find; hardly any that are more alike."""
LONG_RUN = 200
"""Of answers that agree in a band, each is compared with so many at most, the first ones."""
MOST_MATCHES = 32
"""An answer is listed with so many earlier ones that it is like, in each band."""
_IGNORED = regex.compile(r"[^\p{L}\p{N}]+")


@cache
def optimal_bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Bands and rows per band with the least sum of false positives and negatives at a Jaccard similarity.

    As `datasketch.lsh` chooses them; the integrands are polynomials, so Gauss-Legendre nodes integrate them exactly.
    """
    nodes, weights = np.polynomial.legendre.leggauss(permutations // 2 + 1)
    below, above = (nodes + 1) * threshold / 2, (nodes + 1) * (1 - threshold) / 2 + threshold

    def error(bands: int, rows: int) -> float:
        false_positive = weights @ (1 - (1 - below**rows) ** bands) * threshold / 2
        false_negative = weights @ ((1 - above**rows) ** bands) * (1 - threshold) / 2
        return float(0.5 * false_positive + 0.5 * false_negative)

    choices = [(b, r) for b in range(1, permutations + 1) for r in range(1, permutations // b + 1)]
    return min(choices, key=lambda choice: error(*choice))


def band_hashes(shingles: Sequence[set[str]], permutations: int, bands: int, rows: int) -> Hashes:
    """One number per band of each text's MinHash, shape (texts, bands); a band is the minima of `rows` permutations."""
    hashes = np.array([_hash32(shingle) for text in shingles for shingle in text], dtype=np.uint64)
    ends = np.cumsum([0, *map(len, shingles)])
    folded: Hashes = _band_hashes(hashes, ends, *_permutations(permutations), bands, rows)
    return folded


def _hash32(shingle: str) -> int:
    return int.from_bytes(hashlib.sha1(shingle.encode(), usedforsecurity=False).digest()[:4], "little")


@cache
def _permutations(count: int) -> tuple[Hashes, Hashes]:
    """Factors and offsets, drawn as data-juicer draws them."""
    random = np.random.RandomState(seed=42)
    pairs = [
        (random.randint(1, MERSENNE_PRIME, dtype=np.uint64), random.randint(0, MERSENNE_PRIME, dtype=np.uint64))
        for _ in range(count)
    ]
    factors, offsets = np.array(pairs, dtype=np.uint64).T
    return np.ascontiguousarray(factors), np.ascontiguousarray(offsets)


@nb.njit(cache=True, nogil=True)
def _band_hashes(
    shingles: Any, rows: Any, factors: Any, offsets: Any, bands: int, width: int
) -> Any:  # pragma: no cover
    """The least hash in each permutation, folded to one number per band; shape (texts, bands)."""
    prime, low = np.uint64((1 << 61) - 1), np.uint64((1 << 32) - 1)
    folded = np.zeros((len(rows) - 1, bands), dtype=np.uint64)
    for row in range(len(rows) - 1):
        for band in range(bands):
            value = np.uint64(0xCBF29CE484222325)
            for p in range(band * width, (band + 1) * width):
                least = low
                for s in range(rows[row], rows[row + 1]):
                    hashed = shingles[s] * factors[p] + offsets[p]
                    hashed = (hashed & prime) + (hashed >> np.uint64(61))
                    if hashed >= prime:
                        hashed -= prime
                    least = min(least, hashed & low)
                value = (value ^ least) * np.uint64(0x9E3779B97F4A7C15)
                value ^= value >> np.uint64(32)
            folded[row, band] = value
    return folded


def pair_hashes(texts: Sequence[str]) -> tuple[npt.NDArray[np.uint32], Indices]:
    """The character pairs of texts as numbers, sorted within each text, and where each text begins among them.

    The second array is one longer than the texts. Two pairs share a number once in four thousand million.
    """
    found = []
    for text in texts:
        points = np.frombuffer(_IGNORED.sub("", text).encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
        first, second = (points[:-1], points[1:]) if len(points) > 1 else (points, np.zeros_like(points))
        mixed = (first << np.uint64(21) | second) * np.uint64(0x9E3779B97F4A7C15)
        found.append(np.unique((mixed >> np.uint64(32)).astype(np.uint32)))
    starts = np.cumsum([0, *map(len, found)])
    return np.concatenate([np.empty(0, np.uint32), *found]), starts


def minima_in_a_band(threshold: float) -> int:
    """As many as let all pairs of answers be found that are so much alike, but for `MISSED` of them."""
    return max([rows for rows in range(1, 13) if (1 - threshold**rows) ** ANSWER_BANDS <= MISSED], default=1)


def alike(pairs: npt.NDArray[np.uint32], starts: Indices, threshold: float, bands: Sequence[int]) -> Indices:
    """Answers that are alike, shape (found, 2), the earlier one first: those that agree in one of these bands.

    `pairs` and `starts` are those of `pair_hashes`, of which no two texts have the same.
    """
    found = [np.empty((0, 2), np.int64)]
    rows = minima_in_a_band(threshold)
    for band in bands:
        hashes = _band(pairs, starts, band, rows)
        order = np.argsort(hashes, kind="stable")
        found.append(_alike(pairs, starts, order, hashes[order], threshold))
    return np.unique(np.concatenate(found), axis=0)


def first_alike(
    pairs: npt.NDArray[np.uint32],
    starts: Indices,
    threshold: float,
    find: Callable[[npt.NDArray[np.uint32], Indices, float], Indices],
) -> Indices:
    """For each answer the first one that it repeats, itself where it repeats none.

    An answer repeats an earlier one that stays, with which it shares at least `threshold` of their character pairs.
    `find` finds the pairs of answers that do, of answers that differ.
    """
    _, firsts, inverse = np.unique(_digests(pairs, starts), return_index=True, return_inverse=True)
    order = np.argsort(firsts)
    kept, sizes = firsts[order], np.diff(starts)
    is_kept = np.isin(np.arange(len(sizes)), kept)
    found = find(pairs[np.repeat(is_kept, sizes)], np.concatenate([[0], np.cumsum(sizes[kept])]), threshold)
    found = found[np.lexsort((found[:, 0], found[:, 1]))]
    number_of = np.empty(len(order), np.int64)
    number_of[order] = np.arange(len(order))
    return np.asarray(kept[first_that_stays(len(kept), found)[number_of[inverse.ravel()]]])


@nb.njit(cache=True, nogil=True)
def first_that_stays(count: int, pairs: Any) -> Any:  # pragma: no cover - compiled
    """For each text the first that it is alike and that stays; `pairs` are in the order of the later one."""
    chosen = np.arange(count)
    for k in range(len(pairs)):
        earlier, later = pairs[k]
        if chosen[later] == later and chosen[earlier] == earlier:
            chosen[later] = earlier
    return chosen


@nb.njit(cache=True, nogil=True)
def _digests(pairs: Any, starts: Any) -> Any:  # pragma: no cover - compiled
    """A number for each set of pairs."""
    digests = np.empty(len(starts) - 1, np.uint64)
    for row in range(len(digests)):
        value = np.uint64(0xCBF29CE484222325)
        for at in range(starts[row], starts[row + 1]):
            value = (value ^ np.uint64(pairs[at])) * np.uint64(0x9E3779B97F4A7C15)
            value ^= value >> np.uint64(29)
        digests[row] = value
    return digests


@nb.njit(cache=True, nogil=True)
def _band(pairs: Any, starts: Any, band: int, rows: int) -> Any:  # pragma: no cover - compiled
    """One number of each answer: the minima of its pairs under `rows` hash functions of this band, folded."""
    hashes = np.full(len(starts) - 1, 0xCBF29CE484222325, np.uint64)
    for p in range(rows):
        seed = np.uint64(band * 64 + p + 1) * np.uint64(0xD1342543DE82EF95)
        for row in range(len(hashes)):
            least = np.uint64(0xFFFFFFFFFFFFFFFF)
            for at in range(starts[row], starts[row + 1]):
                mixed = (np.uint64(pairs[at]) ^ seed) * np.uint64(0x9E3779B97F4A7C15)
                mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xD6E8FEB86659FD93)
                least = min(least, mixed ^ (mixed >> np.uint64(32)))
            value = (hashes[row] ^ least) * np.uint64(0x9E3779B97F4A7C15)
            hashes[row] = value ^ (value >> np.uint64(32))
    return hashes


@nb.njit(cache=True, nogil=True)
def _alike(pairs: Any, starts: Any, order: Any, hashes: Any, threshold: float) -> Any:  # pragma: no cover - compiled
    """The pairs of answers that are alike within runs of equal hashes; `order` is ascending within a run."""
    found = [(np.int64(0), np.int64(0)) for _ in range(0)]
    begin = 0
    for end in range(1, len(order) + 1):
        if end < len(order) and hashes[end] == hashes[begin]:
            continue
        for j in range(begin + 1, end):
            later, matches = order[j], 0
            for i in range(begin, min(j, begin + LONG_RUN)):
                earlier = order[i]
                a, b, shared = starts[earlier], starts[later], 0
                while a < starts[earlier + 1] and b < starts[later + 1]:
                    one, other = pairs[a], pairs[b]
                    shared += one == other
                    a += one <= other
                    b += other <= one
                total = starts[earlier + 1] - starts[earlier] + starts[later + 1] - starts[later] - shared
                if shared >= threshold * total:
                    found.append((np.int64(earlier), np.int64(later)))
                    matches += 1
                    if matches == MOST_MATCHES:
                        break
        begin = end
    listed = np.empty((len(found), 2), dtype=np.int64)
    for k in range(len(found)):
        listed[k, 0], listed[k, 1] = found[k]
    return listed
