"""How much of a text is written in which script, counted outside quotations."""

import sys
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import regex

from pipelines.similarity.utf8 import Bytes, Indices, decode

HAN, HIRAGANA, KATAKANA, HANGUL, ASCII_LETTER, OTHER_LETTER = range(6)
"""Columns of `script_counts`. Runs of katakana and of ASCII letters (full-width ones too) count as a word,
others singly."""
_CLASSES = (
    r"\p{Han}",
    r"\p{Hiragana}",
    r"[\p{Katakana}ー]",
    r"\p{Hangul}",
    r"[A-Za-zＡ-Ｚａ-ｚ]",
    r"\p{L}",
)
_OPENING, _CLOSING, _NOTHING, _JOINS = 10, 11, 12, 13
_OPENERS, _CLOSERS = "“「『", "”」』"


@cache
def _script_table() -> npt.NDArray[np.uint8]:
    """The class of every code point."""
    points = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    table = np.full(sys.maxunicode + 1, _NOTHING, dtype=np.uint8)
    for number, pattern in reversed(list(enumerate(_CLASSES))):
        table[[ord(character) for character in regex.findall(pattern, points)]] = number
    for characters, number in ((_OPENERS, _OPENING), (_CLOSERS, _CLOSING), ("'’-_.0123456789", _JOINS)):
        table[[ord(character) for character in characters]] = number
    return table


@nb.njit(cache=True, nogil=True)
def _script_counts(data: Any, offsets: Any, table: Any) -> Any:  # pragma: no cover - compiled
    counts = np.zeros((len(offsets) - 1, 6), dtype=np.int64)
    inside = np.zeros(6, dtype=np.int64)
    quoted = np.zeros(6, dtype=np.int64)
    for row in range(len(offsets) - 1):
        inside[:] = 0
        quoted[:] = 0
        is_open, run, i = False, 12, offsets[row]
        while i < offsets[row + 1]:
            point, i = decode(data, i)
            kind = table[point]
            if kind == 10:
                if is_open:  # the one before was never closed
                    counts[row] += inside
                    inside[:] = 0
                is_open = True
            elif kind == 11 and is_open:
                quoted += inside
                inside[:] = 0
                is_open = False
            elif kind < 6 and not (kind == run and (kind == 2 or kind == 4)):
                if is_open:
                    inside[kind] += 1
                else:
                    counts[row, kind] += 1
            if kind != 13:
                run = kind
        counts[row] += inside
        if counts[row].sum() == 0:
            counts[row] = quoted
    return counts


def script_counts(data: Bytes, offsets: Indices) -> npt.NDArray[np.int64]:
    """Shape (texts, scripts): what of each script stands outside quotation marks; inside, where nothing else does."""
    counts: npt.NDArray[np.int64] = _script_counts(data, offsets, _script_table())
    return counts
