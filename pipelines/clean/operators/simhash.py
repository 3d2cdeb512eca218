"""Near-duplicates by SimHash: signatures here, the pairs in `pipelines.similarity.hamming`."""

import hashlib
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any, Literal

import numba as nb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import regex

from pipelines.clean.column import Column, Indices, decode
from pipelines.clean.operators.registry import Dialect, Parameters, PositiveCount, Regex, operator
from pipelines.similarity.hamming import Finder, near_duplicates
from pipelines.similarity.md5 import LANES, compress, head, load, start

Tokenization = Literal["space", "punctuation", "character"]
Bytes = npt.NDArray[np.uint8]
Signatures = npt.NDArray[np.uint64]


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
def _without(data: Any, offsets: Any, dropped: Any) -> Any:  # pragma: no cover - compiled
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


_ONE_CHARACTER = regex.compile(r"\\[pP]\{\w+\}|\\[pP]\w|\\[sSdDwW]")


@cache
def _class_of(pattern: str) -> npt.NDArray[np.bool_]:
    """Which code points a pattern for single characters matches."""
    points = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    table = np.zeros(sys.maxunicode + 1, dtype=np.bool_)
    table[[ord(character) for character in regex.findall(pattern, points)]] = True
    return table


def _stripped(column: Column, lowercase: bool, ignore_pattern: str | None) -> Column:
    """The texts as they are compared."""
    if lowercase:
        column = Column(pa.array([text.lower() for text in column.texts()], type=pa.large_string()))
    if not ignore_pattern:
        return column
    if _ONE_CHARACTER.fullmatch(ignore_pattern):
        data, offsets = _without(*column.utf8, _class_of(ignore_pattern))
        return Column(pa.LargeStringArray.from_buffers(len(column), pa.py_buffer(offsets), pa.py_buffer(data)))
    ignored = regex.compile(ignore_pattern)
    return Column(pa.array([ignored.sub("", text) for text in column.texts()], type=pa.large_string()))


def _characters(column: Column) -> tuple[Bytes, Indices, Indices]:
    """Bytes, token starts and row offsets for tokens of one code point."""
    data, offsets = column.utf8
    data = data[: offsets[-1]]
    starts = np.flatnonzero((data & 0xC0) != 0x80)
    return data, np.append(starts, len(data)), np.searchsorted(starts, offsets)


_PUNCTUATION = regex.compile(r"\p{P}")


def _separated(column: Column, tokenization: Tokenization) -> tuple[Bytes, Indices, Indices]:
    """The same for tokens between spaces (empty ones do not count) or between punctuation (they do)."""
    if tokenization == "space":
        tokens = [[token for token in text.split(" ") if token] for text in column.texts()]
    else:
        tokens = [_PUNCTUATION.split(text) for text in column.texts()]
    encoded = [token.encode() for row in tokens for token in row]
    data = np.frombuffer(b" ".join([*encoded, b""]), dtype=np.uint8)
    starts = np.cumsum([0, *(len(token) + 1 for token in encoded)])
    return data, starts, np.cumsum([0, *map(len, tokens)])


def _signatures(column: Column, tokenization: Tokenization, window: int) -> tuple[Signatures, npt.NDArray[np.bool_]]:
    """Signatures, and which rows have fewer tokens than the window."""
    character = tokenization == "character"
    data, starts, rows = _characters(column) if character else _separated(column, tokenization)
    return _simhash(data, starts, rows, window, 0 if character else 1), np.diff(rows) < window


def _whole_text_hash(text: str) -> int:
    return int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[:8], "big")


def _check(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    blocks, distance = parameters["num_blocks"], parameters["hamming_distance"]
    if blocks > 64:
        yield "num_blocks", f"{blocks} blocks of a 64-bit signature; at most 64"
    if distance >= blocks:
        yield "hamming_distance", f"{distance} must be less than num_blocks ({blocks})"


def _cluster(keys: pa.Array, parameters: Parameters, find: Finder) -> Indices:
    """For each row the first row of its cluster; `num_blocks` changes nothing."""
    signatures: Signatures = keys.to_numpy(zero_copy_only=False)
    return near_duplicates(signatures, parameters["hamming_distance"], find)


@operator("deduplicator", check=_check, cluster=_cluster)
def document_simhash_deduplicator(
    column: Column,
    *,
    tokenization: Tokenization = "space",
    window_size: PositiveCount = 6,
    lowercase: bool = True,
    ignore_pattern: Regex | None = None,
    num_blocks: PositiveCount = 6,
    hamming_distance: PositiveCount = 4,
    dialect: Dialect = "zh",
) -> pa.Array:
    """64-bit signatures: a bit is set if it is set in most shingles' MD5 (Charikar 2002, as in simhash-pybind).

    Rows with fewer tokens than `window_size` all get 0 in data-juicer's dialect; in `zh` they get the hash of what is
    left of their text, or of the text itself where nothing is left, so that only equal ones are duplicates.
    """
    stripped = _stripped(column, lowercase, ignore_pattern)
    signatures, short = _signatures(stripped, tokenization, window_size)
    if dialect == "zh" and short.any():
        rows = pa.array(np.flatnonzero(short))
        pairs = zip(stripped.array.take(rows).to_pylist(), column.array.take(rows).to_pylist(), strict=True)
        signatures[short] = [_whole_text_hash(left or whole) for left, whole in pairs]
    return pa.array(signatures)
