"""Pairs of Han characters in texts: how often they repeat, and which characters make no word with a neighbour."""

import sys
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import regex

from pipelines.similarity.utf8 import Bytes, Indices, decode

HAN, LETTERS, PAIRS, DIFFERENT, MOST, HOME_ROW = range(6)
"""Columns of `pair_counts`: Han characters; letters and digits of all kinds; pairs of neighbouring Han characters, a
laugh (哈哈哈) taken as one; different ones among them; how often the most frequent one of two characters occurs; Han
characters that an input method makes of the keys a, s, d and f."""
_LAUGHTER = "哈呵嘿嘻啊"
_HOME_ROW = "啊阿嗄是时实事使死似斯撒萨三的得地大打答达旦的丁顿但当都发法方放佛非飞分风伐芬蒂士沙杀上舒师"
_IS_HAN, _IS_LETTER, _LAUGHS, _ON_HOME_ROW = 1, 2, 4, 8


@cache
def _table() -> npt.NDArray[np.uint8]:
    points = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    table = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
    table[[ord(character) for character in regex.findall(r"\p{Han}", points)]] |= _IS_HAN
    table[[ord(character) for character in points if character.isalnum()]] |= _IS_LETTER
    table[[ord(character) for character in _LAUGHTER]] |= _LAUGHS
    table[[ord(character) for character in _HOME_ROW]] |= _ON_HOME_ROW
    return table


@nb.njit(cache=True, nogil=True)
def _place(table: Any, code: Any, mask: int) -> Any:  # pragma: no cover - compiled
    """Where `code` stands in an open hash table, or the empty slot (-1) where it would."""
    slot = np.int64((np.uint64(code) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(32)) & mask
    while table[slot] >= 0 and table[slot] != code:
        slot = (slot + 1) & mask
    return slot


@nb.njit(cache=True, nogil=True)
def _pair_counts(data: Any, offsets: Any, table: Any) -> Any:  # pragma: no cover - compiled
    counts = np.zeros((len(offsets) - 1, 6), dtype=np.int64)
    longest = np.max(offsets[1:] - offsets[:-1]) if len(counts) else 0
    slots = 1
    while slots <= longest:  # a Han character takes three bytes, so that a third is filled at most
        slots *= 2
    seen, often = np.empty(slots, dtype=np.int64), np.empty(slots, dtype=np.int64)
    for row in range(len(offsets) - 1):
        mask = 1
        while mask <= offsets[row + 1] - offsets[row]:
            mask *= 2
        seen[:mask] = -1
        mask -= 1
        before, previous, i = np.int64(0), np.int64(-1), offsets[row]
        while i < offsets[row + 1]:
            point, i = decode(data, i)
            kind = table[point]
            counts[row, 1] += kind >> 1 & 1
            if kind & 1 and not (kind & 4 and point == previous):
                if counts[row, 0]:
                    counts[row, 2] += 1
                    code = before << 21 | point
                    slot = _place(seen, code, mask)
                    if seen[slot] < 0:
                        seen[slot], often[slot] = code, 0
                        counts[row, 3] += 1
                    often[slot] += 1
                    if before != point:
                        counts[row, 4] = max(counts[row, 4], often[slot])
                before = point
                counts[row, 0] += 1
                counts[row, 5] += kind >> 3 & 1
            previous = point
    return counts


def pair_counts(data: Bytes, offsets: Indices) -> npt.NDArray[np.int64]:
    """Shape (texts, 6), with the columns named above."""
    counts: npt.NDArray[np.int64] = _pair_counts(data, offsets, _table())
    return counts


def pair_codes(pairs: set[str]) -> npt.NDArray[np.int64]:
    """Pairs of characters as `stray_shares` looks them up: an open hash table."""
    codes = np.array([ord(pair[0]) << 21 | ord(pair[1]) for pair in pairs], dtype=np.int64)
    table = np.full(1 << (4 * len(codes) + 1).bit_length(), -1, dtype=np.int64)
    _fill(table, codes)
    return table


@nb.njit(cache=True, nogil=True)
def _fill(table: Any, codes: Any) -> None:  # pragma: no cover - compiled
    for code in codes:
        table[_place(table, code, len(table) - 1)] = code


@nb.njit(cache=True, nogil=True)
def _stray_shares(data: Any, offsets: Any, table: Any, words: Any) -> Any:  # pragma: no cover - compiled
    shares = np.zeros(len(offsets) - 1, dtype=np.float64)
    for row in range(len(shares)):
        han, stray, before, is_joined, i = 0, 0, np.int64(-1), False, offsets[row]
        while i < offsets[row + 1]:
            point, i = decode(data, i)
            if not table[point] & 1:
                before, is_joined = np.int64(-1), False
                continue
            han += 1
            code = before << 21 | point
            makes_word = bool(before >= 0 and words[_place(words, code, len(words) - 1)] == code)
            if makes_word and not is_joined:
                stray -= 1  # the one before, which was counted
            is_joined = makes_word
            stray += not makes_word
            before = point
        shares[row] = stray / han if han else 0.0
    return shares


def stray_shares(data: Bytes, offsets: Indices, words: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """For each text the share of its Han characters that make no word with a neighbour; 0 without Han characters."""
    shares: npt.NDArray[np.float64] = _stray_shares(data, offsets, _table(), words)
    return shares
