"""Sources: which files there are, and how their rows are read, all of them or those of one shard.

`pipelines.sources.cut` cuts them into shards. Reading is streaming.
"""

import codecs
import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from glob import has_magic
from itertools import islice
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from pipelines.artifacts.rows import is_text
from pipelines.artifacts.shards import Shard
from pipelines.errors import DataError, InputError
from pipelines.progress import say
from pipelines.recipe.paths import shipped_path
from pipelines.sources import json_layout
from pipelines.sources.arrow_rows import python_rows
from pipelines.sources.documents import DOCUMENTS, SPREADSHEET, rows_of_spreadsheet, text_of_document
from pipelines.sources.json_text import RepeatedKey, value_of

SUFFIXES = (".parquet", ".jsonl", ".ndjson", ".json", ".csv", ".tsv", SPREADSHEET)
"""Of files that hold rows."""
DELIMITERS = {".csv": ",", ".tsv": "\t"}
"""What stands between the fields of a line, by suffix."""
COMPRESSIONS = (".gz", ".zst")
METADATA = ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "configuration.json")
"""Files that tell hubs what a data set is, and hold no rows of it."""
BLOCK = 4 << 20
MAX_LINE = 1 << 28
"""Bytes that a line may have: more, and the file is refused rather than held in memory."""
MAX_UNPACKED, MAX_RATIO = 1 << 30, 200
"""Bytes that a compressed file may have inside, and above which it may have so many times what it has outside."""

Numbered = tuple[int, dict[str, Any] | None, str]
"""Number of the row in its file from 0, the row or None where it cannot be read, and then what stands there."""


def is_hub(source: str) -> bool:
    """Whether a source is a data set on a model hub, which is downloaded before it is read."""
    return source.startswith(("modelscope://", "hf://"))


def list_files(source: str) -> list[str]:
    """The files of a source, sorted: a path, a folder, a glob, an fsspec URL, or a data set on a hub.

    Documents in a folder that holds rows too, such as a README, are left out and said so.
    A hub's files, or those of the glob behind the data set's name, are downloaded into the hub client's own cache
    first. Raises InputError where nothing is found.
    """
    given, source = source, _fetched(source)
    fs, path = _file_system(source)
    if fs.isdir(path):
        everything = [name for name in fs.find(path) if Path(name).name not in METADATA]
        found = [name for name in everything if format_of(name)]
        hidden = [name for name in found if any(part.startswith((".", "__MACOSX")) for part in _below(name, path))]
        if hidden:
            found = [name for name in found if name not in hidden]
            say(f"ingest.source {given}: {len(hidden)} hidden files are left out, such as {hidden[0]}")
        others = [name for name in everything if not format_of(name) and not Path(name).name.startswith(".")]
        if found and others:
            say(f"ingest.source {given}: {len(others)} files of other formats are left out, such as {others[0]}")
        documents = [name for name in found if is_document(name)]
        if documents and len(documents) < len(found):
            found = [name for name in found if not is_document(name)]
            say(f"ingest.source {given}: {len(documents)} documents beside rows are left out, such as {documents[0]}")
    elif has_magic(path) and not fs.exists(path):
        found = [name for name in fs.glob(path) if fs.isfile(name) and Path(name).name not in METADATA]
    else:
        found = [path]
    missing = [name for name in found if not fs.exists(name)]
    if missing and len(missing) < len(found):
        say(f"ingest.source {given}: {len(missing)} links lead nowhere and are left out, such as {missing[0]}")
    found = [name for name in found if name not in missing]
    if not found:
        raise InputError(f"ingest.source {given}: no such file, or no {'/'.join((*SUFFIXES, *DOCUMENTS))} in it")
    for name in found:
        if not is_text(name):
            raise InputError(f"ingest.source {name!r}: its name is not UTF-8, as others unpack archives; rename it")
        if format_of(name) is None:
            raise InputError(
                f"ingest.source {name}: not one of {'/'.join((*SUFFIXES, *DOCUMENTS))}, plain or "
                f"{'/'.join(COMPRESSIONS)}; save a spreadsheet as .xlsx or CSV UTF-8"
            )
    return [name if "://" not in source else fs.unstrip_protocol(name) for name in sorted(found)]


def _below(name: str, folder: str) -> list[str]:
    return name.removeprefix(folder).strip("/").split("/")


def names_of(files: list[str]) -> dict[str, str]:
    """What rows call their files, by path: the file's name, after the folders in which the files differ."""
    folders = [path.split("/")[:-1] for path in files]
    shared = 0
    while all(len(parts) > shared and parts[shared] == folders[0][shared] for parts in folders):
        shared += 1
    return {path: "/".join(path.split("/")[shared:]) for path in files}


def _fetched(source: str) -> str:
    if not is_hub(source):
        return shipped_path(source)
    scheme, _, name = source.partition("://")
    try:
        data_set, pattern = ("/".join(part) for part in (name.split("/")[:2], name.split("/")[2:]))
        folder = _downloaded(scheme, data_set, _client_patterns(pattern) if pattern else None)
        return f"{folder}/{pattern}" if pattern else folder
    except (OSError, ValueError) as error:
        raise InputError(f"ingest.source {source}: cannot be downloaded ({error})") from None


def _client_patterns(pattern: str) -> list[str]:
    """What the hubs' clients are to fetch for a folder, a file or a glob: their `**/` is at least one folder."""
    return [pattern, f"{pattern.rstrip('/')}/*", pattern.replace("**/", "")]


def _downloaded(scheme: str, name: str, patterns: list[str] | None) -> str:
    if scheme == "modelscope":
        from modelscope import dataset_snapshot_download
        from modelscope_hub.errors import HubError

        try:
            return str(dataset_snapshot_download(name, allow_patterns=patterns))
        except HubError as error:  # not all of them are OSErrors, as Hugging Face's are
            raise OSError(error) from error
    from huggingface_hub import snapshot_download

    return str(snapshot_download(name, repo_type="dataset", allow_patterns=patterns))


def _file_system(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    try:
        fs, inner = fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise InputError(f"ingest.source {path}: {error}") from None
    return fs, str(inner)


def format_of(path: str) -> str | None:
    """The suffix that tells a file's format, without that of its compression; None for one that is not read."""
    for compression in COMPRESSIONS:
        path = path.removesuffix(compression)
    suffix = Path(path).suffix.lower()
    return suffix if suffix in SUFFIXES or suffix in DOCUMENTS else None


def is_document(path: str) -> bool:
    """Whether a file is one text, not rows."""
    return format_of(path) in DOCUMENTS


def is_compressed(path: str) -> bool:
    """Whether a file's name says that it is compressed."""
    return path.endswith(COMPRESSIONS)


@contextmanager
def open_bytes(path: str) -> Iterator[IO[bytes]]:
    """A file's bytes, decompressed; damage inside is a DataError that names the file."""
    fs, inner = _file_system(path)
    try:
        with fs.open(inner, "rb") as raw:
            if path.endswith(".gz"):
                with gzip.GzipFile(fileobj=raw) as plain:
                    yield io.BufferedReader(_Bounded(path, plain, fs.size(inner)))  # type: ignore[arg-type]
            elif path.endswith(".zst"):
                plain = pa.CompressedInputStream(pa.PythonFile(raw, "r"), "zstd")
                yield io.BufferedReader(_Bounded(path, plain, fs.size(inner)))
            else:
                yield raw
    except UnicodeDecodeError as error:
        number, encoding = _not_utf8(path)
        hint = f"say what it is, such as ingest.encoding: {encoding}"
        raise DataError(f"{path}:{number}: not UTF-8 text ({error}); {hint}") from None
    except (EOFError, gzip.BadGzipFile, zlib.error, csv.Error, pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: cannot be read ({error})") from None


class _Bounded(io.RawIOBase):
    """What is inside a compressed file, up to a share of what it is outside: some unpack to any size."""

    def __init__(self, path: str, plain: IO[bytes], size: int | None) -> None:
        self._path = path
        self._plain = plain
        self._most = max(MAX_UNPACKED, MAX_RATIO * (size or 0))
        self._read = 0

    def readable(self) -> bool:
        """It can be read."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into a buffer; DataError where it becomes too much."""
        data = self._plain.read(len(buffer))
        buffer[: len(data)] = data
        self._read += len(data)
        if self._read > self._most:
            raise DataError(
                f"{self._path}: unpacks to more than {self._most} bytes, {MAX_RATIO} times its size; unpack it "
                "yourself if that is right"
            )
        return len(data)


def _not_utf8(path: str) -> tuple[int, str]:
    """The number of the first line that is not UTF-8, and what encoding the file may have."""
    with open_bytes(path) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return 1, "utf-16"
            try:
                line.decode()
            except UnicodeDecodeError:
                return number, "gb18030"
    return 1, "gb18030"


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


@contextmanager
def open_parquet(path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file; damage is a DataError that names it."""
    fs, inner = _file_system(path)
    try:
        with fs.open(inner, "rb") as raw, pq.ParquetFile(raw) as file:
            yield file
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error})") from None


def is_lines(path: str) -> bool:
    """Whether a file holds one JSON object per line; files are looked into, since names do not tell."""
    if format_of(path) not in (".jsonl", ".ndjson", ".json"):
        return False
    with open_bytes(path) as stream:
        return json_layout.is_lines(stream.read(json_layout.HEAD))


def first_broken(files: list[str]) -> str:
    """Where the first row that cannot be read stands, and what stands there; the first file's name without any."""
    for path in files:
        for number, row, raw in rows_of_file(path):
            if row is None:
                return f"{path}:{number + 1}: {raw}"
    return f"{files[0]}: no rows"


def schema_of(path: str) -> pa.Schema | None:
    """The schema that a Parquet file states; None for other formats."""
    if format_of(path) != ".parquet":
        return None
    with open_parquet(path) as file:
        return file.schema_arrow.remove_metadata()


def sample_rows(path: str, count: int, unread: dict[str, None] | None = None) -> list[dict[str, Any]]:
    """The first readable rows of a file; what of it is no row and not read is added to `unread`."""
    rows: list[dict[str, Any]] = []
    for _, row, _ in rows_of_file(path, unread):
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
    elif is_document(path):
        rows = _document(path)
    elif "header" in shard:
        text = io.StringIO(block_of(shard).decode(), newline="")
        rows = _records(csv_reader(text, shard["delimiter"]), shard["header"], shard["first"])
    elif "elements" in shard:
        rows = _stored_elements(block_of(shard), shard["first"])
    else:
        rows = _json_lines(io.BytesIO(block_of(shard)), shard["first"])
    end = shard["first"] + shard["rows"]
    for number, row, raw in islice(rows, shard.get("most")):
        if number >= end:
            return
        yield number, row, raw


def _document(path: str) -> Iterator[Numbered]:
    try:
        with open_bytes(path) as stream:
            text = text_of_document(path, str(format_of(path)), stream)
    except DataError as error:
        yield 0, None, str(error)
        return
    scanned = "; of scanned pages, text has to be recognised first" if format_of(path) == ".pdf" else ""
    yield (0, {"text": text}, "") if text.strip() else (0, None, f"no text in it{scanned}")


def elements_of(path: str, unread: dict[str, None]) -> Iterator[Numbered]:
    """The rows of a file that has not one a line: JSON of another layout, or a spreadsheet.

    What of it is no row and not read is added to `unread`.
    """
    with open_bytes(path) as stream:
        if format_of(path) == SPREADSHEET:
            for number, (row, why) in enumerate(rows_of_spreadsheet(path, stream, unread)):
                yield number, row, why
        else:
            yield from json_array(path, stream, unread)


def _read_parquet(path: str, shard: Shard) -> Iterator[Numbered]:
    for number, batch in parquet_batches(path, shard, 1024):
        for i, (row, why) in enumerate(python_rows(path, batch)):
            yield number + i, row, why


def parquet_batches(path: str, shard: Shard, size: int) -> Iterator[tuple[int, pa.RecordBatch]]:
    """The rows of a shard's row groups from its first one on, `size` at a time, with the number of the first."""
    number, skip = shard["first"], shard["skip"]
    with open_parquet(path) as file:
        for batch in file.iter_batches(batch_size=size, row_groups=shard["groups"]):
            part = batch.slice(min(skip, batch.num_rows))
            skip = max(0, skip - batch.num_rows)
            if part.num_rows:
                yield number, part
                number += part.num_rows


def block_of(shard: Shard) -> bytes:
    """The bytes of a shard: a range of its file, or a part that was stored for it."""
    begin, end = shard["begin"], shard["end"]
    fs, inner = _file_system(str(shard.get("stored") or shard["path"]))
    if "stored" in shard:
        return bytes(pa.decompress(fs.cat_file(inner), decompressed_size=end, codec="zstd", asbytes=True))
    return bytes(fs.cat_file(inner, begin, end))


def _json_lines(stream: IO[bytes], first: int) -> Iterator[Numbered]:
    for number, line in enumerate(stream, start=first):
        if line.isspace() or not line:
            continue
        try:
            text = line.removeprefix(codecs.BOM_UTF8).decode()
            row = value_of(text)
        except RepeatedKey as error:
            yield number, None, f"{error}: {line[:200].decode('utf-8', 'replace').rstrip()}"
            continue
        except RecursionError:
            yield number, None, f"nested too deep: {line[:200].decode('utf-8', 'replace').rstrip()}"
            continue
        except ValueError as error:  # includes UnicodeDecodeError
            hint = "; in another encoding? set ingest.encoding" if isinstance(error, UnicodeDecodeError) else ""
            yield number, None, f"not valid JSON: {error}{hint}: {line[:200].decode('utf-8', 'replace').rstrip()}"
            continue
        yield (
            (number, row, "") if isinstance(row, dict) else (number, None, f"not a JSON object: {text[:200].rstrip()}")
        )


def rows_of_file(path: str, unread: dict[str, None] | None = None) -> Iterator[Numbered]:
    """The rows of a whole file in order, one at a time; what of it is no row and not read is added to `unread`."""
    if format_of(path) == ".parquet":
        with open_parquet(path) as file:
            groups = [*range(file.num_row_groups)]
        if groups:
            yield from _read_parquet(path, {"first": 0, "skip": 0, "groups": groups})
        return
    if is_document(path):
        yield from _document(path)
        return
    delimiter = DELIMITERS.get(format_of(path) or "")
    if not delimiter and not is_lines(path):
        yield from elements_of(path, {} if unread is None else unread)
        return
    with open_bytes(path) as stream:
        if delimiter:
            with io.TextIOWrapper(stream, encoding="utf-8-sig", newline="") as text:
                reader = csv_reader(text, delimiter)
                yield from _records(reader, header_of(path, reader), 0)
        else:
            yield from _json_lines(stream, 0)


Record = list[str] | csv.Error
"""The fields of a line of a table, or why they cannot be told apart."""


def csv_reader(lines: Iterable[str], delimiter: str = ",") -> Iterator[Record]:
    """The records of a CSV file, whatever the length of their fields.

    A quotation mark that is not closed, or closed too early, would have rows read as a part of the one before.
    """
    csv.field_size_limit(sys.maxsize)
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    while True:
        before = reader.line_num
        try:
            yield next(reader)
        except csv.Error as error:
            taken = reader.line_num - before
            yield csv.Error(f"{error}; {taken} lines are read as one row") if taken > 1 else error
        except StopIteration:
            return


def header_of(path: str, records: Iterator[Record]) -> list[str]:
    """The names in the first record; DataError where one stands twice, for then columns cannot be told apart."""
    header = next(records, [])
    if isinstance(header, csv.Error):
        raise DataError(f"{path}: the header cannot be read ({header})")
    if twice := [name for name in header if header.count(name) > 1]:
        raise DataError(f"{path}: the header has {twice[0] or 'an empty name'!r} more than once; rename one")
    return header


def _records(records: Iterator[Record], header: list[str], first: int) -> Iterator[Numbered]:
    for number, record in enumerate((record for record in records if record), start=first):
        if isinstance(record, csv.Error):
            yield number, None, f"its quotation marks cannot be told apart ({record}); double those inside a field"
        elif not any(record):
            yield number, None, "all of its fields are empty; delete the line"
        elif len(record) == len(header):
            yield number, dict(zip(header, record, strict=True)), ""
        else:
            yield number, None, f"not as many fields as the header: {record!r:.200}"


def _stored_elements(block: bytes, first: int) -> Iterator[Numbered]:
    for number, line in enumerate(block.split(b"\n")[:-1], start=first):
        element = json.loads(line)
        yield (number, element, "") if isinstance(element, dict) else (number, None, element)


def json_array(path: str, stream: IO[bytes], unread: dict[str, None]) -> Iterator[Numbered]:
    """The rows of a JSON file that has not one a line; DataError where it ends too early."""
    for number, row in enumerate(json_layout.values_of(path, stream, unread)):
        if isinstance(row, RepeatedKey):
            yield number, None, str(row)
        else:
            yield (number, row, "") if isinstance(row, dict) else (number, None, f"not a JSON object: {row!r:.200}")
