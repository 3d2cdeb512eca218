"""Arrow strings as UTF-8 bytes and row offsets, and their code points, for compiled loops."""

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

Bytes = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
Indices = npt.NDArray[np.int64]


def utf8(array: pa.Array) -> tuple[Bytes, Indices]:
    """The bytes of a string array and the offsets of its rows, length rows + 1; no copy of the bytes."""
    _, offsets, data = array.buffers()
    width = np.int64 if pa.types.is_large_string(array.type) else np.int32
    rows = np.frombuffer(offsets, dtype=width)[array.offset : array.offset + len(array) + 1].astype(np.int64)
    return np.frombuffer(data, dtype=np.uint8) if data else np.zeros(0, np.uint8), rows


@nb.njit(cache=True, nogil=True)
def decode(data: Any, i: int) -> Any:  # pragma: no cover - compiled
    """The code point at byte `i` of valid UTF-8, and the byte after it."""
    b = np.int64(data[i])
    if b < 0x80:
        return b, i + 1
    if b < 0xE0:
        return (b & 0x1F) << 6 | (np.int64(data[i + 1]) & 0x3F), i + 2
    if b < 0xF0:
        return (b & 0x0F) << 12 | (np.int64(data[i + 1]) & 0x3F) << 6 | (np.int64(data[i + 2]) & 0x3F), i + 3
    high = (b & 0x07) << 18 | (np.int64(data[i + 1]) & 0x3F) << 12
    return high | (np.int64(data[i + 2]) & 0x3F) << 6 | (np.int64(data[i + 3]) & 0x3F), i + 4


@nb.njit(cache=True, nogil=True)
def folded(data: Any, begin: int, end: int) -> Any:  # pragma: no cover - compiled
    """The code points between two bytes, ASCII in lower case, and full-width letters and digits as ASCII."""
    points = np.empty(end - begin, dtype=np.int64)
    count, i = 0, begin
    while i < end:
        point, i = decode(data, i)
        if 0xFF10 <= point <= 0xFF5A:
            point -= 0xFEE0
        points[count] = point + 32 if 65 <= point <= 90 else point
        count += 1
    return points[:count]
