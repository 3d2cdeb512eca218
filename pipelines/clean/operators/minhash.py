"""Near-duplicates by MinHash and locality-sensitive hashing, with datasketch's hashes and data-juicer's bands."""

import hashlib
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import numba as nb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import regex

from pipelines.clean.column import Column, Indices
from pipelines.clean.operators.registry import Dialect, Parameters, PositiveCount, Ratio, Regex, operator
from pipelines.clean.operators.words import pieces, runs
from pipelines.similarity.hamming import Finder, first_of_equal

Hashes = npt.NDArray[np.uint64]
MERSENNE_PRIME = (1 << 61) - 1


def _optimal_bands(threshold: float, permutations: int) -> tuple[int, int]:
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


@cache
def _bands(threshold: float, permutations: int, bands: int | None, rows: int | None) -> tuple[int, int]:
    return (bands, rows) if bands and rows else _optimal_bands(threshold, permutations)


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


_PUNCTUATION = regex.compile(r"\p{P}")


def _shingles(text: str, tokenization: str, window: int) -> set[str]:
    """The distinct runs of `window` tokens."""
    if tokenization == "character":
        return {text[i : i + window] for i in range(len(text) - window + 1)}
    tokens = _PUNCTUATION.split(text) if tokenization == "punctuation" else [t for t in text.split(" ") if t]
    return set(runs(tokens, window, " "))


def _hash32(shingle: str) -> int:
    return int.from_bytes(hashlib.sha1(shingle.encode(), usedforsecurity=False).digest()[:4], "little")


def _check(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    if parameters["tokenization"] == "sentencepiece" and not parameters["tokenizer_model"]:
        yield "tokenizer_model", "tokenization: sentencepiece needs the path of its model"
    bands, rows = parameters["num_bands"], parameters["num_rows_per_band"]
    if bands and rows and bands * rows > parameters["num_permutations"]:
        yield (
            "num_bands",
            f"{bands} bands of {rows} rows need more than num_permutations {parameters['num_permutations']}",
        )


def _cluster(keys: pa.Array, parameters: Parameters, find: Finder) -> Indices:
    """For each row the first row of its cluster: rows that agree in a whole band are joined, and so on."""
    bands = keys.type.list_size
    return first_of_equal(keys.flatten().to_numpy(zero_copy_only=False).reshape(-1, bands))


@operator("deduplicator", check=_check, cluster=_cluster)
def document_minhash_deduplicator(
    column: Column,
    *,
    tokenization: Literal["space", "punctuation", "character", "sentencepiece"] = "space",
    window_size: PositiveCount = 5,
    lowercase: bool = True,
    ignore_pattern: Regex | None = None,
    num_permutations: PositiveCount = 256,
    jaccard_threshold: Ratio = 0.7,
    num_bands: PositiveCount | None = None,
    num_rows_per_band: PositiveCount | None = None,
    tokenizer_model: str | None = None,
    dialect: Dialect = "zh",
) -> pa.Array:
    """One number per band of a text's MinHash, a fixed-size list of uint64.

    Texts without a shingle are all duplicates of each other in data-juicer's dialect; in `zh` only equal ones are.
    """
    texts = [text.lower() for text in column.texts()] if lowercase else column.texts()
    if ignore_pattern:
        ignored = regex.compile(ignore_pattern)
        texts = [ignored.sub("", text) for text in texts]
    if tokenization == "sentencepiece":
        shingles = [set(runs(row, window_size, "")) for row in pieces(texts, str(tokenizer_model))]
    else:
        shingles = [_shingles(text, tokenization, window_size) for text in texts]
    if dialect == "zh":
        whole = zip(shingles, texts, column.texts(), strict=True)
        shingles = [found or {f"\0{left or text}"} for found, left, text in whole]
    hashes = np.array([_hash32(shingle) for row in shingles for shingle in row], dtype=np.uint64)
    rows = np.cumsum([0, *map(len, shingles)])
    bands, width = _bands(jaccard_threshold, num_permutations, num_bands, num_rows_per_band)
    folded = _band_hashes(hashes, rows, *_permutations(num_permutations), bands, width)
    return pa.FixedSizeListArray.from_arrays(pa.array(folded.ravel()), bands)
