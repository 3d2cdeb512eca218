"""Cutting files into shards: row groups of a Parquet file or some rows of a large one, byte ranges of lines and CSV.

A file that cannot be cut where it lies, because it is compressed or one JSON array, is streamed once into parts of
plain lines in the stage's folder. Either way rows are counted, so that each has its position before any is read,
and no more of a file than one shard is in memory.
"""

import io
import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import IO, Any

import pyarrow as pa

from pipelines.artifacts.shards import Shard
from pipelines.errors import DataError
from pipelines.sources.files import (
    DELIMITERS,
    MAX_LINE,
    csv_reader,
    elements_of,
    format_of,
    header_of,
    is_compressed,
    is_document,
    is_lines,
    open_bytes,
    open_parquet,
)

PARTS = 8
"""Shards that one row group is cut into at most; each reads it from its beginning."""

Store = Callable[[bytes], str]
"""Keeps a part for the workers, and returns where it lies."""


def plan_shards(files: list[str], shard_bytes: int, limit: int | None, store: Store) -> list[Shard]:
    """Cut files into shards of about `shard_bytes`, each with the position of its first row.

    The first of them has what of the files is no row and not read as `unread`.
    """
    unread: dict[str, None] = {}
    shards = _planned(files, shard_bytes, limit, store, unread)
    return [{**shards[0], "unread": [*unread]}, *shards[1:]] if unread and shards else shards


def _planned(
    files: list[str], shard_bytes: int, limit: int | None, store: Store, unread: dict[str, None]
) -> list[Shard]:
    shards: list[Shard] = []
    pos = taken = 0
    for path in files:
        for part in _parts(path, shard_bytes, store, limit is not None, unread):
            if limit is not None and taken >= limit:
                return shards
            left = part["rows"] if limit is None else limit - taken
            filled = part.pop("filled", part["rows"])
            if "begin" in part and filled < part["rows"]:  # lines count blank ones, which are no rows
                cut = {"most": left} if left < filled else {}
            else:
                cut = {"rows": min(part["rows"], left)}
            if part["rows"]:
                shards.append({**part, "index": len(shards), "path": path, "pos": pos, **cut})
            pos += part["rows"]
            taken += filled
    return shards


def _parts(path: str, shard_bytes: int, store: Store, is_limited: bool, unread: dict[str, None]) -> Iterator[Shard]:
    if format_of(path) == ".parquet":
        yield from _row_groups(path, shard_bytes)
    elif format_of(path) in DELIMITERS:
        yield from _csv_ranges(path, shard_bytes, store)
    elif is_document(path):
        yield {"first": 0, "rows": 1}
    elif is_lines(path):
        yield from _line_ranges(path, shard_bytes, store, is_limited)
    else:
        yield from _elements(path, shard_bytes, store, unread)


def _row_groups(path: str, shard_bytes: int) -> Iterator[Shard]:
    with open_parquet(path) as file:
        groups: list[int] = []
        first = rows = size = 0
        for number in range(file.num_row_groups):
            group = file.metadata.row_group(number)
            groups, rows, size = [*groups, number], rows + group.num_rows, size + group.total_byte_size
            if size >= shard_bytes or number == file.num_row_groups - 1:
                parts = min(PARTS, rows, -(-size // shard_bytes)) if len(groups) == 1 else 1
                cuts = [rows * part // parts for part in range(parts + 1)] if rows else []
                for skip, end in pairwise(cuts):
                    yield {"groups": groups, "skip": skip, "first": first + skip, "rows": end - skip}
                groups, first, rows, size = [], first + rows, 0, 0


def _line_ranges(path: str, shard_bytes: int, store: Store, is_limited: bool) -> Iterator[Shard]:
    """Byte ranges that end at line ends, with their line counts; lines count from 0, blank ones included.

    Where only so many rows are wanted, `filled` is how many lines are not blank.
    """
    with open_bytes(path) as stream:
        begin = first = 0
        while block := stream.read(shard_bytes):
            block += stream.readline(MAX_LINE)
            _require_line_end(path, block, shard_bytes)
            lines = block.count(b"\n") + (not block.endswith(b"\n"))
            where = stored(block, store) if is_compressed(path) else {"begin": begin, "end": begin + len(block)}
            filled = {"filled": sum(map(bool, map(bytes.strip, block.split(b"\n"))))} if is_limited else {}
            yield {**where, "first": first, "rows": lines, **filled}
            begin, first = begin + len(block), first + lines


def _require_line_end(path: str, block: bytes, shard_bytes: int) -> None:
    """DataError where a line goes on after so many bytes that it is not read."""
    if len(block) >= shard_bytes + MAX_LINE and not block.endswith(b"\n"):
        raise DataError(f"{path}: a line is longer than {MAX_LINE} bytes")


def _csv_ranges(path: str, shard_bytes: int, store: Store) -> Iterator[Shard]:
    """Byte ranges that end where a record does, which may have line ends inside."""
    kept: list[bytes] | None = [] if is_compressed(path) else None
    with open_bytes(path) as stream:
        lines = _Lines(path, stream, kept)
        delimiter = DELIMITERS[str(format_of(path))]
        reader = csv_reader(lines, delimiter)
        header = header_of(path, reader)
        begin, first, rows = lines.take()[0], 0, 0
        for record in reader:
            rows += bool(record)  # a blank line is no record
            if lines.read - begin >= shard_bytes:
                end, block = lines.take()
                where = {"begin": begin, "end": end} if kept is None else stored(block, store)
                yield {**where, "header": header, "delimiter": delimiter, "first": first, "rows": rows}
                begin, first, rows = end, first + rows, 0
        end, block = lines.take()
        where = {"begin": begin, "end": end} if kept is None else stored(block, store)
        yield {**where, "header": header, "delimiter": delimiter, "first": first, "rows": rows}


class _Lines:
    """The lines of a text file, as it is read: how many bytes were read, and, with `kept`, the bytes themselves."""

    def __init__(self, path: str, stream: IO[bytes], kept: list[bytes] | None) -> None:
        self.read = 0
        self._path = path
        self._kept = kept
        self._text = io.TextIOWrapper(stream, encoding="utf-8", newline="")

    def __iter__(self) -> Iterator[str]:
        while line := self._text.readline(MAX_LINE):
            if len(line) == MAX_LINE:
                raise DataError(f"{self._path}: a line is longer than {MAX_LINE} characters")
            data = line.encode()
            if self._kept is not None:
                self._kept.append(data)
            first, self.read = not self.read, self.read + len(data)
            yield line.removeprefix("\ufeff") if first else line

    def take(self) -> tuple[int, bytes]:
        """Where reading has come to, and the bytes kept since the last call."""
        block = b"".join(self._kept or ())
        if self._kept is not None:
            self._kept.clear()
        return self.read, block


def _elements(path: str, shard_bytes: int, store: Store, unread: dict[str, None]) -> Iterator[Shard]:
    """The elements of a JSON array, or a spreadsheet's rows, as lines; one that is no object as what stands there."""
    lines: list[bytes] = []
    first = size = 0
    for _, row, raw in elements_of(path, unread):
        lines.append(json.dumps(raw if row is None else row).encode() + b"\n")
        size += len(lines[-1])
        if size >= shard_bytes:
            yield {**stored(b"".join(lines), store), "elements": True, "first": first, "rows": len(lines)}
            lines, first, size = [], first + len(lines), 0
    if lines:
        yield {**stored(b"".join(lines), store), "elements": True, "first": first, "rows": len(lines)}


def stored(block: bytes, store: Store) -> dict[str, Any]:
    """A part that is kept for the workers, as the place of a shard."""
    return {"stored": store(pa.compress(block, codec="zstd", asbytes=True)), "begin": 0, "end": len(block)}
