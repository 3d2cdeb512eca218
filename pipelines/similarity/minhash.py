"""Near-duplicates among short answers: MinHash finds the candidates, exact overlap of character pairs decides.

The measure is Jaccard's over the sets of character pairs; an answer leaves when an earlier one that stays reaches the
threshold with it. Source: Broder, On the resemblance and containment of documents (1997).
"""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import regex
import xxhash

BANDS, ROWS = 24, 2
"""Candidates share one of 24 pairs of minima: above 99 % of those at 0.5, and nearly all at 0.8."""
_IGNORED = regex.compile(r"[^\p{L}\p{N}]+")


def pairs_of(text: str) -> frozenset[str]:
    """The character pairs of a text without punctuation, spaces and emoji."""
    bare = _IGNORED.sub("", text)
    return frozenset(bare[at : at + 2] for at in range(max(1, len(bare) - 1)))


def near_duplicates(texts: Sequence[str], threshold: float) -> dict[int, int]:
    """Numbers of the texts that repeat an earlier one, each with the number of the one it repeats."""
    multipliers = np.random.default_rng(1).integers(1, 1 << 63, (BANDS * ROWS, 1), dtype=np.uint64) | np.uint64(1)
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


def _signature(pairs: frozenset[str], multipliers: np.ndarray[Any, np.dtype[np.uint64]]) -> list[int]:
    """One number per band: the minima of its rows under multiplicative hashing."""
    hashes = np.array([xxhash.xxh3_64_intdigest(pair.encode("utf-8", "surrogatepass")) for pair in pairs], np.uint64)
    minima = (hashes * multipliers).min(axis=1).reshape(BANDS, ROWS)
    mixed: list[int] = (minima[:, 0] * np.uint64(0x9E3779B97F4A7C15) ^ minima[:, 1]).tolist()
    return mixed


def _overlap(one: frozenset[str], other: frozenset[str]) -> float:
    return len(one & other) / len(one | other)
