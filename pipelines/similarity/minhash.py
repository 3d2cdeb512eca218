"""MinHash: texts that share most of their shingles agree in a whole band of minima.

For documents, band hashes as datasketch and data-juicer make them. For short answers, the bands only find candidates,
and the exact overlap of character pairs decides. Source: Broder, On the resemblance and containment of documents
(1997).
"""

import hashlib
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import regex
import xxhash

Hashes = npt.NDArray[np.uint64]
MERSENNE_PRIME = (1 << 61) - 1
SHORT_BANDS, SHORT_ROWS = 24, 2
"""Short texts are candidates if they share one of 24 pairs of minima: above 99 % of those at 0.5, nearly all at 0.8."""
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


def pairs_of(text: str) -> frozenset[str]:
    """The character pairs of a text without punctuation, spaces and emoji."""
    bare = _IGNORED.sub("", text)
    return frozenset(bare[at : at + 2] for at in range(max(1, len(bare) - 1)))


def near_duplicates(texts: Sequence[str], threshold: float) -> dict[int, int]:
    """Numbers of the texts that repeat an earlier one, each with the number of the one it repeats."""
    random = np.random.default_rng(1)
    multipliers = random.integers(1, 1 << 63, (SHORT_BANDS * SHORT_ROWS, 1), dtype=np.uint64) | np.uint64(1)
    buckets: dict[tuple[int, int], list[int]] = defaultdict(list)
    kept: dict[int, frozenset[str]] = {}
    repeats: dict[int, int] = {}
    for number, text in enumerate(texts):
        pairs = pairs_of(text)
        bands = list(enumerate(_signature(pairs, multipliers)))
        candidates = {earlier for band in bands for earlier in buckets[band]}
        found = min((c for c in candidates if _overlap(pairs, kept[c]) >= threshold), default=None)
        if found is not None:
            repeats[number] = found
            continue
        kept[number] = pairs
        for band in bands:
            buckets[band].append(number)
    return repeats


def _signature(pairs: frozenset[str], multipliers: Hashes) -> list[int]:
    """One number per band: the minima of its rows under multiplicative hashing."""
    hashes = np.array([xxhash.xxh3_64_intdigest(pair.encode("utf-8", "surrogatepass")) for pair in pairs], np.uint64)
    minima = (hashes * multipliers).min(axis=1).reshape(SHORT_BANDS, SHORT_ROWS)
    mixed: list[int] = (minima[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ minima[:, 1]).tolist()
    return mixed


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
