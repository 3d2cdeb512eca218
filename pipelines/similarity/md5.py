"""The first eight bytes of MD5, compiled, for millions of short messages (RFC 1321).

`LANES` messages are hashed side by side: the loops over lanes become vector code.
"""

from typing import Any

import numba as nb
import numpy as np

LANES = 32

_SINES = np.array([int(abs(np.sin(i + 1)) * 2**32) & 0xFFFFFFFF for i in range(64)], dtype=np.uint32)
_SHIFTS = np.array([7, 12, 17, 22] * 4 + [5, 9, 14, 20] * 4 + [4, 11, 16, 23] * 4 + [6, 10, 15, 21] * 4, np.uint32)
_WORDS = np.array(
    [i if i < 16 else (5 * i + 1) % 16 if i < 32 else (3 * i + 5) % 16 if i < 48 else 7 * i % 16 for i in range(64)],
    dtype=np.int64,
)


@nb.njit(cache=True, nogil=True, inline="always")
def _rotated(value: Any, shift: Any) -> Any:  # pragma: no cover - compiled
    return np.uint32((value << shift) | (value >> (np.uint32(32) - shift)))


@nb.njit(cache=True, nogil=True)
def _round_1(a: Any, b: Any, c: Any, d: Any, words: Any, r: int) -> None:  # pragma: no cover - compiled
    word, sine, shift = words[_WORDS[r]], _SINES[r], _SHIFTS[r]
    for i in range(LANES):
        f = np.uint32(((b[i] & c[i]) | (~b[i] & d[i])) + a[i] + sine + word[i])
        a[i] = np.uint32(b[i] + _rotated(f, shift))


@nb.njit(cache=True, nogil=True)
def _round_2(a: Any, b: Any, c: Any, d: Any, words: Any, r: int) -> None:  # pragma: no cover - compiled
    word, sine, shift = words[_WORDS[r]], _SINES[r], _SHIFTS[r]
    for i in range(LANES):
        f = np.uint32(((d[i] & b[i]) | (~d[i] & c[i])) + a[i] + sine + word[i])
        a[i] = np.uint32(b[i] + _rotated(f, shift))


@nb.njit(cache=True, nogil=True)
def _round_3(a: Any, b: Any, c: Any, d: Any, words: Any, r: int) -> None:  # pragma: no cover - compiled
    word, sine, shift = words[_WORDS[r]], _SINES[r], _SHIFTS[r]
    for i in range(LANES):
        f = np.uint32((b[i] ^ c[i] ^ d[i]) + a[i] + sine + word[i])
        a[i] = np.uint32(b[i] + _rotated(f, shift))


@nb.njit(cache=True, nogil=True)
def _round_4(a: Any, b: Any, c: Any, d: Any, words: Any, r: int) -> None:  # pragma: no cover - compiled
    word, sine, shift = words[_WORDS[r]], _SINES[r], _SHIFTS[r]
    for i in range(LANES):
        f = np.uint32((c[i] ^ (b[i] | ~d[i])) + a[i] + sine + word[i])
        a[i] = np.uint32(b[i] + _rotated(f, shift))


@nb.njit(cache=True, nogil=True)
def compress(state: Any, words: Any) -> None:  # pragma: no cover - compiled
    """One block in each lane: `words` (16, LANES) into `state` (4, LANES), both uint32, `state` changed in place."""
    before = state.copy()
    a, b, c, d = state[0], state[1], state[2], state[3]
    for r in range(0, 16, 4):
        _round_1(a, b, c, d, words, r)
        _round_1(d, a, b, c, words, r + 1)
        _round_1(c, d, a, b, words, r + 2)
        _round_1(b, c, d, a, words, r + 3)
    for r in range(16, 32, 4):
        _round_2(a, b, c, d, words, r)
        _round_2(d, a, b, c, words, r + 1)
        _round_2(c, d, a, b, words, r + 2)
        _round_2(b, c, d, a, words, r + 3)
    for r in range(32, 48, 4):
        _round_3(a, b, c, d, words, r)
        _round_3(d, a, b, c, words, r + 1)
        _round_3(c, d, a, b, words, r + 2)
        _round_3(b, c, d, a, words, r + 3)
    for r in range(48, 64, 4):
        _round_4(a, b, c, d, words, r)
        _round_4(d, a, b, c, words, r + 1)
        _round_4(c, d, a, b, words, r + 2)
        _round_4(b, c, d, a, words, r + 3)
    state += before


@nb.njit(cache=True, nogil=True)
def start(state: Any) -> None:  # pragma: no cover - compiled
    """Set every lane's state to MD5's initial one."""
    state[0, :], state[1, :], state[2, :], state[3, :] = 0x67452301, 0xEFCDAB89, 0x98BADCFE, 0x10325476


@nb.njit(cache=True, nogil=True)
def load(words: Any, lane: int, data: Any, begin: int, length: int, block: int) -> bool:  # pragma: no cover - compiled
    """Put one block of the padded message `data[begin:begin + length]` into a lane; returns whether it is the last."""
    for j in range(16):
        words[j, lane] = 0
    first = block * 64
    for j in range(min(64, max(0, length - first))):
        words[j >> 2, lane] |= np.uint32(data[begin + first + j]) << np.uint32((j & 3) * 8)
    if first <= length < first + 64:
        tail = length - first
        words[tail >> 2, lane] |= np.uint32(0x80) << np.uint32((tail & 3) * 8)
    last = length < first + 56
    if last:
        words[14, lane], words[15, lane] = np.uint32(length << 3), np.uint32(length >> 29)
    return last


@nb.njit(cache=True, nogil=True)
def _swapped(word: Any) -> Any:  # pragma: no cover - compiled
    w = np.uint64(word)
    low = (w & np.uint64(0xFF)) << np.uint64(24) | (w & np.uint64(0xFF00)) << np.uint64(8)
    return low | (w >> np.uint64(8) & np.uint64(0xFF00)) | (w >> np.uint64(24) & np.uint64(0xFF))


@nb.njit(cache=True, nogil=True)
def head(state: Any, lane: int) -> Any:  # pragma: no cover - compiled
    """A lane's first eight bytes, big-endian."""
    return _swapped(state[0, lane]) << np.uint64(32) | _swapped(state[1, lane])
