"""The first eight bytes of MD5, compiled, for millions of short messages (RFC 1321)."""

from typing import Any

import numba as nb
import numpy as np

_SINES = np.array([int(abs(np.sin(i + 1)) * 2**32) & 0xFFFFFFFF for i in range(64)], dtype=np.uint32)
_SHIFTS = np.array([7, 12, 17, 22] * 4 + [5, 9, 14, 20] * 4 + [4, 11, 16, 23] * 4 + [6, 10, 15, 21] * 4, np.uint32)
_WORDS = np.array(
    [i if i < 16 else (5 * i + 1) % 16 if i < 32 else (3 * i + 5) % 16 if i < 48 else 7 * i % 16 for i in range(64)],
    dtype=np.int64,
)


@nb.njit(cache=True, nogil=True, inline="always")
def _compress(state: Any, words: Any) -> None:  # pragma: no cover - compiled
    a, b, c, d = state[0], state[1], state[2], state[3]
    for r in range(64):
        if r < 16:
            f = (b & c) | (~b & d)
        elif r < 32:
            f = (d & b) | (~d & c)
        elif r < 48:
            f = b ^ c ^ d
        else:
            f = c ^ (b | ~d)
        f = np.uint32(f + a + _SINES[r] + words[_WORDS[r]])
        a, d, c = d, c, b
        b = np.uint32(b + np.uint32((f << _SHIFTS[r]) | (f >> (np.uint32(32) - _SHIFTS[r]))))
    state[0] += a
    state[1] += b
    state[2] += c
    state[3] += d


@nb.njit(cache=True, nogil=True)
def _swapped(word: Any) -> Any:  # pragma: no cover - compiled
    w = np.uint64(word)
    low = (w & np.uint64(0xFF)) << np.uint64(24) | (w & np.uint64(0xFF00)) << np.uint64(8)
    return low | (w >> np.uint64(8) & np.uint64(0xFF00)) | (w >> np.uint64(24) & np.uint64(0xFF))


@nb.njit(cache=True, nogil=True)
def md5_head(data: Any, begin: int, end: int, state: Any, words: Any) -> Any:  # pragma: no cover - compiled
    """The first eight bytes, big-endian, of the MD5 of `data[begin:end]`.

    `state` (4) and `words` (16) are uint32 scratch arrays, so that a loop allocates nothing.
    """
    length = end - begin
    state[0], state[1], state[2], state[3] = 0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476
    blocks = (length + 9 + 63) // 64
    for block in range(blocks):
        for j in range(16):
            words[j] = 0
        first = block * 64
        for j in range(min(64, max(0, length - first))):
            words[j >> 2] |= np.uint32(data[begin + first + j]) << np.uint32((j & 3) * 8)
        if first <= length < first + 64:
            tail = length - first
            words[tail >> 2] |= np.uint32(0x80) << np.uint32((tail & 3) * 8)
        if block == blocks - 1:
            words[14] = np.uint32(length << 3)
            words[15] = np.uint32(length >> 29)
        _compress(state, words)
    return _swapped(state[0]) << np.uint64(32) | _swapped(state[1])
