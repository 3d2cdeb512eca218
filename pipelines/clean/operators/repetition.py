"""Filters on how much a text repeats itself."""

from collections import Counter
from typing import Any

import numba as nb
import numpy as np

from pipelines.clean.column import Column, decode
from pipelines.clean.operators.registry import (
    CLOSED,
    Assets,
    Dialect,
    Interval,
    Parameters,
    PositiveCount,
    Ratio,
    Verdict,
    operator,
    within,
)
from pipelines.clean.operators.words import pieces, refined, runs, sentencepiece_of
from pipelines.clean.operators.words import words as split_words


@nb.njit(cache=True, nogil=True)
def _frequencies(points: Any, size: int) -> Any:  # pragma: no cover - compiled
    """How often each run of `size` code points occurs, most frequent first; runs are told apart by a 64-bit hash."""
    hashes = np.empty(len(points) - size + 1, dtype=np.uint64)
    for i in range(len(hashes)):
        value = np.uint64(0xCBF29CE484222325)
        for j in range(size):
            value = (value ^ np.uint64(points[i + j])) * np.uint64(0x9E3779B97F4A7C15)
            value ^= value >> np.uint64(29)
        hashes[i] = value
    hashes.sort()
    counts, total = np.zeros(len(hashes), dtype=np.int64), 0
    for i in range(len(hashes)):
        if i and hashes[i] != hashes[i - 1]:
            total += 1
        counts[total] += 1
    return np.sort(counts[: total + 1])[::-1]


@nb.njit(cache=True, nogil=True)
def _repetition(data: Any, offsets: Any, size: int) -> Any:  # pragma: no cover - compiled
    """Share of the most frequent runs, as many as the square root of their number, that occur more than once."""
    ratios = np.zeros(len(offsets) - 1, dtype=np.float64)
    for row in range(len(ratios)):
        points = np.empty(offsets[row + 1] - offsets[row], dtype=np.int64)
        count, i = 0, offsets[row]
        while i < offsets[row + 1]:
            points[count], i = decode(data, i)
            count += 1
        if count < size:
            continue
        frequencies = _frequencies(points[:count], size)
        repeated = min(int(np.sqrt(len(frequencies))), len(frequencies) - int((frequencies == 1).sum()))
        ratios[row] = frequencies[:repeated].sum() / frequencies.sum()
    return ratios


@operator("filter")
def character_repetition_filter(
    column: Column,
    *,
    rep_len: PositiveCount = 10,
    min_ratio: Ratio = 0.0,
    max_ratio: Ratio = 0.5,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts by the share of their most frequent runs of `rep_len` code points among all such runs."""
    ratios = _repetition(*column.utf8, rep_len)
    return within("char_rep_ratio", ratios, {"min_ratio": min_ratio, "max_ratio": max_ratio}, interval)


def _share_repeated(given: list[str], size: int) -> float:
    """The share of runs of words that occur more than once."""
    counts = Counter(runs(refined(given), size, " "))
    return sum(n for n in counts.values() if n > 1) / counts.total() if counts else 0.0


def _files(parameters: Parameters, dialect: Dialect) -> list[str]:
    return [sentencepiece_of(parameters["lang"])] if parameters["tokenization"] else []


@operator("filter", assets=_files)
def word_repetition_filter(
    column: Column,
    *,
    lang: str = "en",
    tokenization: bool = False,
    rep_len: PositiveCount = 10,
    min_ratio: Ratio = 0.0,
    max_ratio: Ratio = 0.5,
    assets: Assets,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts by the share of runs of `rep_len` words that occur more than once.

    Words are what whitespace separates, or with `tokenization`, which Chinese needs, sentencepiece's pieces.
    """
    texts = column.texts()
    split = pieces(texts, assets[sentencepiece_of(lang)]) if tokenization else [split_words(text) for text in texts]
    ratios = np.array([_share_repeated(row, rep_len) for row in split], dtype=np.float64)
    return within("word_rep_ratio", ratios, {"min_ratio": min_ratio, "max_ratio": max_ratio}, interval)
