"""SimHash: one 64-bit signature per text; texts that share most of their shingles differ in few bits.

A bit is set if it is set in most shingles' MD5. Source: Charikar, Similarity estimation techniques from rounding
algorithms (2002), as simhash-pybind computes it.
"""

import hashlib
import sys
from functools import cache
from typing import Any, Literal

import numba as nb
import numpy as np
import pyarrow as pa
import regex

from pipelines.similarity.hamming import Signatures
from pipelines.similarity.md5 import LANES, compress, head, load, start
from pipelines.similarity.utf8 import Bytes, Indices, Mask, decode, utf8

Tokenization = Literal["space", "punctuation", "character"]


def simhash(
    texts: pa.Array,
    *,
    tokenization: Tokenization,
    window_size: int,
    lowercase: bool,
    ignore_pattern: str | None,
    short_texts: Literal["zero", "hash"],
) -> Signatures:
    """The signatures of a string array without nulls, shape (texts,).

    A shingle is `window_size` tokens; what matches `ignore_pattern` does not count. Texts with fewer tokens all get 0,
    or, with `hash`, the hash of what is left of them, or of the text itself where nothing is left, so that only equal
    ones are alike.
    """
    counted = _stripped(texts, lowercase, ignore_pattern)
    signatures, is_short = _signatures(counted, tokenization, window_size)
    if short_texts == "hash" and is_short.any():
        rows = pa.array(np.flatnonzero(is_short))
        pairs = zip(counted.take(rows).to_pylist(), texts.take(rows).to_pylist(), strict=True)
        signatures[is_short] = [_hash_of_text(left or text) for left, text in pairs]
    return signatures


def _stripped(texts: pa.Array, lowercase: bool, ignore_pattern: str | None) -> pa.Array:
    """The texts as they are compared."""
    if lowercase:
        texts = pa.array([text.lower() for text in texts.to_pylist()], type=pa.large_string())
    if not ignore_pattern:
        return texts
    if _ONE_CHARACTER.fullmatch(ignore_pattern):
        data, offsets = without_characters(*utf8(texts), _class_of(ignore_pattern))
        return pa.LargeStringArray.from_buffers(len(texts), pa.py_buffer(offsets), pa.py_buffer(data))
    ignored = regex.compile(ignore_pattern)
    return pa.array([ignored.sub("", text) for text in texts.to_pylist()], type=pa.large_string())


_ONE_CHARACTER = regex.compile(r"\\[pP]\{\w+\}|\\[pP]\w|\\[sSdDwW]")


@cache
def _class_of(pattern: str) -> Mask:
    """Which code points a pattern for single characters matches."""
    points = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    table = np.zeros(sys.maxunicode + 1, dtype=np.bool_)
    table[[ord(character) for character in regex.findall(pattern, points)]] = True
    return table


def _signatures(texts: pa.Array, tokenization: Tokenization, window: int) -> tuple[Signatures, Mask]:
    """Signatures, and which texts have fewer tokens than the window."""
    character = tokenization == "character"
    data, starts, rows = _characters(texts) if character else _separated(texts, tokenization)
    return _simhash(data, starts, rows, window, 0 if character else 1), np.diff(rows) < window


def _characters(texts: pa.Array) -> tuple[Bytes, Indices, Indices]:
    """Bytes, token starts and row offsets for tokens of one code point."""
    data, offsets = utf8(texts)
    data = data[: offsets[-1]]
    starts = np.flatnonzero((data & 0xC0) != 0x80)
    return data, np.append(starts, len(data)), np.searchsorted(starts, offsets)


_PUNCTUATION = regex.compile(r"\p{P}")


def _separated(texts: pa.Array, tokenization: Tokenization) -> tuple[Bytes, Indices, Indices]:
    """The same for tokens between spaces (empty ones do not count) or between punctuation (they do)."""
    if tokenization == "space":
        tokens = [[token for token in text.split(" ") if token] for text in texts.to_pylist()]
    else:
        tokens = [_PUNCTUATION.split(text) for text in texts.to_pylist()]
    encoded = [token.encode() for row in tokens for token in row]
    data = np.frombuffer(b" ".join([*encoded, b""]), dtype=np.uint8)
    starts = np.cumsum([0, *(len(token) + 1 for token in encoded)])
    return data, starts, np.cumsum([0, *map(len, tokens)])


def _hash_of_text(text: str) -> int:
    return int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[:8], "big")


@nb.njit(cache=True, nogil=True)
def _add_votes(planes: Any, value: Any) -> None:  # pragma: no cover - compiled
    """Count the set bits of `value` in 64 counters at once; plane p holds bit p of every counter."""
    plane = 0
    while value:
        carry = planes[plane] & value
        planes[plane] ^= value
        value = carry
        plane += 1


@nb.njit(cache=True, nogil=True)
def _majority(planes: Any, total: int) -> Any:  # pragma: no cover - compiled
    """The bits that were set in more than half of `total` votes."""
    signature = np.uint64(0)
    for bit in range(64):
        votes = np.int64(0)
        for plane in range(len(planes)):
            votes |= np.int64((planes[plane] >> np.uint64(bit)) & np.uint64(1)) << plane
        if 2 * votes > total:
            signature |= np.uint64(1) << np.uint64(bit)
    return signature


@nb.njit(cache=True, nogil=True)
def _vote(
    data: Any, starts: Any, first: int, lanes: int, window: int, gap: int, state: Any, words: Any, planes: Any
) -> None:  # pragma: no cover - compiled
    """Hash the shingles that begin at tokens `first:first + lanes`, one in each lane, and add their votes."""
    ends = np.zeros(LANES, dtype=np.bool_)
    done, block = 0, 0
    counted = np.zeros(LANES, dtype=np.bool_)
    start(state)
    while done < lanes:
        for lane in range(lanes):
            begin = starts[first + lane]
            ends[lane] = load(words, lane, data, begin, starts[first + lane + window] - gap - begin, block)
        compress(state, words)
        for lane in range(lanes):
            if ends[lane] and not counted[lane]:
                _add_votes(planes, head(state, lane))
                counted[lane] = True
                done += 1
        block += 1


@nb.njit(cache=True, nogil=True)
def _simhash(data: Any, starts: Any, rows: Any, window: int, gap: int) -> Any:  # pragma: no cover - compiled
    """One signature per row. Row r has the tokens `rows[r]:rows[r + 1]`, token i the bytes from `starts[i]` up to
    `gap` bytes before `starts[i + 1]`; a shingle is `window` consecutive tokens with what lies between them."""
    signatures = np.zeros(len(rows) - 1, dtype=np.uint64)
    state, words, planes = np.zeros((4, LANES), np.uint32), np.zeros((16, LANES), np.uint32), np.zeros(40, np.uint64)
    for row in range(len(rows) - 1):
        planes[:] = 0
        shingles = max(0, rows[row + 1] - rows[row] - window + 1)
        for group in range(0, shingles, LANES):
            lanes = min(LANES, shingles - group)
            _vote(data, starts, rows[row] + group, lanes, window, gap, state, words, planes)
        signatures[row] = _majority(planes, shingles)
    return signatures


@nb.njit(cache=True, nogil=True)
def without_characters(data: Any, offsets: Any, dropped: Any) -> Any:  # pragma: no cover - compiled
    """The texts without the code points marked in `dropped`, as bytes and row offsets."""
    kept, rows, size = np.empty(offsets[-1] - offsets[0], np.uint8), np.zeros(len(offsets), np.int64), 0
    for row in range(len(offsets) - 1):
        i = offsets[row]
        while i < offsets[row + 1]:
            point, after = decode(data, i)
            if not dropped[point]:
                for j in range(i, after):
                    kept[size] = data[j]
                    size += 1
            i = after
        rows[row + 1] = size
    return kept[:size], rows
