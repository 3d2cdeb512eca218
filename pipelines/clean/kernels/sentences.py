"""Which texts may say a sentence twice: a test over a whole column before sentences are compared one by one."""

import sys
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import regex

from pipelines.similarity.utf8 import Bytes, Indices, Mask, decode

_COMPARED, _BLANK, _ENDS, _LINE, _WHITE = 1, 2, 4, 8, 16
_STOP = ord(".")


@cache
def _table() -> npt.NDArray[np.uint8]:
    points = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    table = np.zeros(sys.maxunicode + 1, dtype=np.uint8)
    kinds = {"[a-zA-Z0-9\u4e00-\u9fa5]": _COMPARED, "[ \t]": _BLANK, "[。！!？?…]": _ENDS, "\n": _LINE, r"\s": _WHITE}
    for pattern, kind in kinds.items():
        table[[ord(character) for character in regex.findall(pattern, points)]] |= kind
    return table


@nb.njit(cache=True, nogil=True)
def _may_repeat(data: Any, offsets: Any, table: Any, shortest: int) -> Any:  # pragma: no cover - compiled
    repeats = np.zeros(len(offsets) - 1, dtype=np.bool_)
    for row in range(len(repeats)):
        hashes = np.empty(offsets[row + 1] - offsets[row] + 1, dtype=np.uint64)
        found, value, length, i = 0, np.uint64(0), 0, offsets[row]
        while i < offsets[row + 1]:
            point, i = decode(data, i)
            kind = table[point]
            if kind & _COMPARED:
                value = (value ^ np.uint64(point)) * np.uint64(0x9E3779B97F4A7C15)
                value ^= value >> np.uint64(29)
            length += kind & (_COMPARED | _BLANK) != 0
            ends = kind & (_ENDS | _LINE) != 0
            if point == _STOP and i < offsets[row + 1]:
                ends = table[decode(data, i)[0]] & _WHITE != 0
            if ends or i == offsets[row + 1]:
                if length >= shortest:
                    hashes[found] = value
                    found += 1
                value, length = np.uint64(0), 0
        hashes[:found].sort()
        for at in range(1, found):
            if hashes[at] == hashes[at - 1]:
                repeats[row] = True
                break
    return repeats


def may_repeat(data: Bytes, offsets: Indices, shortest: int) -> Mask:
    """Texts in which two sentences of `shortest` letters, digits and blanks have the same letters and digits."""
    mask: Mask = _may_repeat(data, offsets, _table(), shortest)
    return mask
