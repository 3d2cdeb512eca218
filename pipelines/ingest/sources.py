"""Sources: which files there are, how they are cut into shards, and how a shard's rows are read.

A shard is a file, or a part of it: row groups of a Parquet file or some rows of a large one, a byte range of a JSONL
file. Planning counts rows, so that every row has its position before any of them is read; reading is streaming.
"""

import csv
import gzip
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from glob import has_magic
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import fsspec
import ijson
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipelines.errors import DataError, InputError
from pipelines.recipe import SHIPPED
from pipelines.shards import Shard

SUFFIXES = (".parquet", ".jsonl", ".json", ".csv")
COMPRESSIONS = (".gz", ".zst")
BLOCK = 4 << 20
PARTS = 8
"""Shards that one row group is cut into at most; each reads it from its beginning."""

Numbered = tuple[int, dict[str, Any] | None, str]
"""Number of the row in its file from 0, the row or None where it cannot be read, and then what stands there."""


def is_hub(source: str) -> bool:
    """Whether a source is a data set on a model hub, which is downloaded before it is read."""
    return source.startswith(("modelscope://", "hf://"))


def list_files(source: str) -> list[str]:
    """The files of a source, sorted: a path, a folder, a glob, an fsspec URL, or a data set on a hub.

    A hub's files are downloaded into the hub client's own cache first. Raises InputError where nothing is found.
    """
    source = _fetched(source)
    fs, path = _file_system(source)
    if fs.isdir(path):
        found = [name for name in fs.find(path) if _format(name)]
    else:
        found = [name for name in fs.glob(path) if fs.isfile(name)] if has_magic(path) else [path]
    found = [name for name in found if fs.exists(name)]
    if not found:
        raise InputError(f"ingest.source {source}: no such file, or no {'/'.join(SUFFIXES)} in it")
    for name in found:
        if _format(name) is None:
            raise InputError(
                f"ingest.source {name}: not one of {'/'.join(SUFFIXES)}, plain or {'/'.join(COMPRESSIONS)}"
            )
    return [name if "://" not in source else fs.unstrip_protocol(name) for name in sorted(found)]


def _fetched(source: str) -> str:
    scheme, _, name = source.partition("://")
    if scheme == "recipes":
        return str(SHIPPED / name)
    if scheme == "modelscope":
        from modelscope import dataset_snapshot_download

        return str(dataset_snapshot_download(name))
    if scheme == "hf":
        from huggingface_hub import snapshot_download

        return str(snapshot_download(name, repo_type="dataset"))
    return source


def _file_system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        fs, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise InputError(f"ingest.source {path}: {error}") from None
    return fs, str(inner)


def _format(path: str) -> str | None:
    for compression in COMPRESSIONS:
        path = path.removesuffix(compression)
    suffix = Path(path).suffix.lower()
    return suffix if suffix in SUFFIXES else None


def _compressed(path: str) -> bool:
    return path.endswith(COMPRESSIONS)


@contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed; damage inside is a DataError that names the file."""
    fs, inner = _file_system(path)
    try:
        with fs.open(inner, "rb") as raw:
            if path.endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as plain:
                    yield plain  # type: ignore[misc]
            elif path.endswith(".zst"):
                yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd"))
            else:
                yield raw
    except (EOFError, gzip.BadGzipFile, pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


def digest_file(path: str) -> str:
    """A digest of a local file's bytes; of a remote object, what its store says of it (etag, size)."""
    fs, inner = _file_system(path)
    if "://" in path:
        return str(fs.checksum(inner))
    digest = xxhash.xxh3_128()
    with open(inner, "rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def plan_shards(files: list[str], shard_bytes: int, limit: int | None) -> list[Shard]:
    """Cut files into shards of about `shard_bytes`, each with the position of its first row."""
    shards: list[Shard] = []
    pos = 0
    for path in files:
        for part in _parts(path, shard_bytes):
            if limit is not None and pos >= limit:
                return shards
            rows = part["rows"] if limit is None else min(part["rows"], limit - pos)
            if rows:
                shards.append({**part, "index": len(shards), "path": path, "pos": pos, "rows": rows})
            pos += part["rows"]
    return shards


def _parts(path: str, shard_bytes: int) -> Iterator[Shard]:
    kind = _format(path)
    if kind == ".parquet":
        yield from _row_groups(path, shard_bytes)
    elif _is_lines(path) and not _compressed(path):
        yield from _byte_ranges(path, shard_bytes)
    else:
        yield {"first": 0, "rows": sum(1 for _ in _rows_of_file(path))}


def _row_groups(path: str, shard_bytes: int) -> Iterator[Shard]:
    with _open_parquet(path) as file:
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


@contextmanager
def _open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    fs, inner = _file_system(path)
    try:
        with fs.open(inner, "rb") as raw, pq.ParquetFile(raw) as file:
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None


def _byte_ranges(path: str, shard_bytes: int) -> Iterator[Shard]:
    """Byte ranges that end at line ends, with their line counts; lines count from 0, blank ones included."""
    with _open(path) as stream:
        begin = first = 0
        while block := stream.read(shard_bytes):
            block += stream.readline()
            lines = block.count(b"\n") + (not block.endswith(b"\n"))
            yield {"begin": begin, "end": begin + len(block), "first": first, "rows": lines}
            begin, first = begin + len(block), first + lines


def _is_lines(path: str) -> bool:
    """Whether a file holds one JSON object per line; `.json` files are looked into, since many do."""
    kind = _format(path)
    if kind != ".json":
        return kind == ".jsonl"
    with _open(path) as stream:
        while (byte := stream.read(1)) and (byte.isspace() or byte in b"\xef\xbb\xbf"):
            pass
    return byte != b"["


def columns_of(files: list[str]) -> list[str]:
    """The column names of the first readable row of the first file."""
    for path in files:
        if _format(path) == ".parquet":
            with _open_parquet(path) as file:
                return list(file.schema_arrow.names)
        for _, row, _ in _rows_of_file(path):
            if row is not None:
                return list(row)
    return []


def schema_of(path: str) -> pa.Schema | None:
    """The schema that a Parquet file states; None for other formats."""
    if _format(path) != ".parquet":
        return None
    with _open_parquet(path) as file:
        return file.schema_arrow


def sample_rows(path: str, count: int) -> list[dict[str, Any]]:
    """The first readable rows of a file, to infer the types of its columns from."""
    rows: list[dict[str, Any]] = []
    first = {"first": 0, "skip": 0, "groups": [0]}
    reader = _read_parquet(path, first) if _format(path) == ".parquet" else _rows_of_file(path)
    for _, row, _ in reader:
        if row is not None:
            rows.append(row)
        if len(rows) == count:
            break
    return rows


def read_shard(shard: Shard) -> Iterator[Numbered]:
    """The rows of a shard in order, one at a time."""
    path: str = shard["path"]
    if "groups" in shard:
        rows = _read_parquet(path, shard)
    elif "begin" in shard:
        rows = _read_lines(path, shard)
    else:
        rows = _rows_of_file(path)
    end = shard["first"] + shard["rows"]
    for number, row, raw in rows:
        if number >= end:
            return
        yield number, row, raw


def _read_parquet(path: str, shard: Shard) -> Iterator[Numbered]:
    number, skip = shard["first"], shard["skip"]
    with _open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=1024, row_groups=shard["groups"]):
            for row in batch.slice(min(skip, batch.num_rows)).to_pylist():
                yield number, row, ""
                number += 1
            skip = max(0, skip - batch.num_rows)


def _read_lines(path: str, shard: Shard) -> Iterator[Numbered]:
    fs, inner = _file_system(path)
    with fs.open(inner, "rb") as stream:
        stream.seek(shard["begin"])
        block = io.BytesIO(stream.read(shard["end"] - shard["begin"]))
    yield from _json_lines(block, shard["first"])


def _json_lines(stream: IO[bytes], first: int) -> Iterator[Numbered]:
    for number, line in enumerate(stream, start=first):
        if line.isspace() or not line:
            continue
        try:
            text = line.decode("utf-8-sig" if number == 0 else "utf-8")
            row = json.loads(text)
        except ValueError as error:  # includes UnicodeDecodeError
            yield number, None, f"not valid JSON: {error}: {line[:200].decode('utf-8', 'replace').rstrip()}"
            continue
        yield (
            (number, row, "") if isinstance(row, dict) else (number, None, f"not a JSON object: {text[:200].rstrip()}")
        )


def _rows_of_file(path: str) -> Iterator[Numbered]:
    with _open(path) as stream:
        if _format(path) == ".csv":
            text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
            for number, row in enumerate(csv.DictReader(text)):
                wrong = None in row or None in row.values()
                yield (number, None, f"not as many fields as the header: {row}") if wrong else (number, dict(row), "")
        elif _is_lines(path):
            yield from _json_lines(stream, 0)
        else:
            yield from _json_array(path, stream)


def _json_array(path: str, stream: IO[bytes]) -> Iterator[Numbered]:
    number = -1
    try:
        for number, row in enumerate(ijson.items(stream, "item", use_float=True)):
            yield (number, row, "") if isinstance(row, dict) else (number, None, f"not a JSON object: {row!r:.200}")
    except ijson.JSONError as error:
        raise DataError(f"{path}: broken after element {number} ({error})") from None
