"""Reading one source whole into rows: ingest's own, the one of the rows held out, and those of further training data.

The output is Parquet, one file per shard. A row that cannot be read is set aside with its file, line and reason;
more of them than `max_broken` stop the run.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from itertools import count
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from pipelines.artifacts.reports.rows import IngestReport, RowFiles
from pipelines.artifacts.rows import ROW, RowDigest
from pipelines.artifacts.shards import Attempt, Commit, Shard, Work, read_tables, run_shards
from pipelines.artifacts.stage import Manifest, Output, read_manifest
from pipelines.artifacts.workspace import Place
from pipelines.errors import DataError, InputError
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.paths import shipped_path
from pipelines.sources.adapters import ADAPTERS, Adapter, recognise, replaced, with_system
from pipelines.sources.columns import (
    BATCH_ROWS,
    batches,
    broken_row,
    own_id,
    source_schema,
    table_of,
    table_reader,
    write_shard,
)
from pipelines.sources.cut import Store, plan_shards
from pipelines.sources.files import (
    columns_of,
    digest_file,
    first_broken,
    is_hub,
    list_files,
    read_shard,
    sample_rows,
)
from pipelines.sources.recode import as_utf8, is_utf8, remove_copies

STORED = "parts"
"""Folder of parts that stand for files that cannot be cut, while they are read."""
SHOWN = 5
"""Broken rows that an error message shows."""


def source_fingerprint(section: Ingest) -> dict[str, Any]:
    """What decides the rows: the section without what only changes speed or tolerance, and the files' content."""
    settings = section.model_dump(exclude={"concurrency", "max_broken", "source"})
    if is_hub(section.source):  # naming it must not download it
        return {"section": settings, "files": section.source}
    files = [[PurePosixPath(path).name, digest_file(path)] for path in list_files(section.source)]
    return {"section": settings, "files": files}


def check_source(section: Ingest) -> None:
    """InputError where the source's files are not there, or no adapter reads the first of them.

    Hubs and object storage are not asked, and what is in another encoding is not looked into.
    """
    if "://" not in section.source:
        files = list_files(section.source)
        if section.adapter != "columns" and is_utf8(section.encoding):
            _adapter_for(section, files)


def read_source(section: Ingest, place: Place) -> IngestReport:
    """Read the source into canonical rows; the report counts rows and broken rows."""
    files = as_utf8(list_files(section.source), section.encoding, place)
    name, columns, work = _plan(section, files)
    commits = run_shards(
        place,
        "rows",
        lambda: plan_shards(files, section.shard_bytes, section.limit, _store(place)),
        work,
        concurrency=section.concurrency,
        title="ingest",
    )
    for path in place.workspace.list(place.path(STORED)):
        place.workspace.remove(path)
    remove_copies(files, place)
    return _report(place, section, name, files, columns, commits)


def read_once(section: Ingest, place: Place) -> Output[IngestReport]:
    """Read a further source into a folder of the stage that needs it, unless it lies there complete."""
    manifest = read_manifest(place, IngestReport)
    if manifest is None:
        manifest = Manifest[IngestReport](report=read_source(section, place))
        manifest.write(place)
    return Output(place.stage, place, manifest)


def _store(place: Place) -> Store:
    """Keeps parts of files that cannot be cut in the stage's folder, until every shard is read."""
    numbers = count()

    def store(part: bytes) -> str:
        path = place.path(STORED, f"{next(numbers):05d}.zst")
        place.workspace.write(path, part)
        return path

    return store


def _plan(section: Ingest, files: list[str]) -> tuple[str, list[str], Work]:
    """The adapter's name, the columns that rows get, and the work on one shard."""
    if section.adapter == "columns":
        schema = source_schema(files)
        return section.adapter, schema.names, table_reader(schema)
    name, columns = _adapter_for(section, files)
    extra = _extra_types(ADAPTERS[name], files, columns)
    return name, [*ROW.names, *extra], _reader(name, section.system, section.replace, extra)


def _adapter_for(section: Ingest, files: list[str]) -> tuple[str, list[str]]:
    """The adapter that reads the files, and the columns of the first; InputError where none does."""
    columns = columns_of(files)
    if section.adapter != "auto":
        missing = ADAPTERS[section.adapter].needs - set(columns)
        if missing and columns:
            fits = recognise(columns)
            hint = f"; adapter {fits} fits these columns" if fits else ""
            raise InputError(
                f"{files[0]}: adapter {section.adapter} needs column {', '.join(sorted(missing))}, "
                f"the file has {', '.join(columns)}{hint}"
            )
        return section.adapter, columns
    if not columns:
        raise DataError(first_broken(files))
    name = recognise(columns)
    if name is None:
        raise _no_adapter(files[0], columns)
    return name, columns


def _no_adapter(file: str, columns: list[str]) -> InputError:
    """How to rename columns that no adapter reads: for the adapter they are nearest to, or else for any."""
    what = f"{file}: no adapter reads columns {', '.join(columns)}"
    given = {name.lower(): name for name in columns}
    for name, adapter in ADAPTERS.items():
        close = {wanted: get_close_matches(wanted.lower(), given, n=1, cutoff=0.75) for wanted in sorted(adapter.needs)}
        if all(close.values()):
            renamed = [f"{given[found]} to {wanted}" for wanted, (found,) in close.items() if given[found] != wanted]
            return InputError(f"{what}; rename {' and '.join(renamed)} for adapter {name}")
    usual = [f"{', '.join(sorted(adapter.needs))} ({name})" for name, adapter in ADAPTERS.items()]
    return InputError(f"{what}; rename them to one of these sets: {'; '.join(usual)}")


def _extra_types(adapter: Adapter, files: list[str], columns: list[str]) -> dict[str, str]:
    """Type names of the source's own columns that are carried along, from its first rows."""
    rows = sample_rows(files[0], 1000)
    computed = _first_adapted(adapter, rows)
    own = {name: [row.get(name) for row in rows] for name in columns if name not in adapter.uses}
    own |= {name: [value] for name, value in computed.items()}
    taken = {*ROW.names, "id"}  # the source's own key becomes row_id
    return {name: _type_name(values) for name, values in own.items() if name not in taken}


def _first_adapted(adapter: Adapter, rows: list[dict[str, Any]]) -> dict[str, Any]:
    for row in rows:
        with suppress(ValueError):  # a row it cannot read is counted when its shard is read
            return adapter.read(row)
    return {}


def _type_name(values: list[Any]) -> str:
    kinds = {type(value) for value in values if value is not None}
    if kinds == {bool}:
        return "bool"
    if kinds == {int}:
        return "int64"
    return "double" if kinds and kinds <= {int, float} else "string"


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "bool": lambda value: isinstance(value, bool),
    "int64": lambda value: isinstance(value, int) and not isinstance(value, bool),
    "double": lambda value: isinstance(value, int | float) and not isinstance(value, bool),
}


def _carried(row: dict[str, Any], extra: dict[str, str]) -> dict[str, Any]:
    """The source's own columns of one row; text stays text, anything nested becomes JSON."""
    carried: dict[str, Any] = {}
    for name, kind in extra.items():
        value = row.get(name)
        if value is None:
            continue
        if kind == "string":
            carried[name] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
        elif _CHECKS[kind](value):
            carried[name] = value
        else:
            raise ValueError(f"column {name} holds {value!r} where the first rows hold {kind}")
    return carried


def _schema(extra: dict[str, str]) -> pa.Schema:
    return pa.schema([*ROW, *(pa.field(name, pa.type_for_alias(kind)) for name, kind in extra.items())])


def _reader(adapter_name: str, system: str | None, replace: dict[str, str], extra: dict[str, str]) -> Work:
    """The work on one shard: read, adapt, write; closes over plain values only, since it travels to workers."""

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        schema = _schema(extra)
        broken: list[dict[str, Any]] = []
        rows = (replaced(row, replace) for row in _adapted(shard, adapter_name, system, extra, broken))
        tables = (table_of(batch, schema, adapter_name, broken) for batch in batches(rows, BATCH_ROWS))
        return write_shard(attempt, schema, tables, broken)

    return work


def _adapted(
    shard: Shard, adapter_name: str, system: str | None, extra: dict[str, str], broken: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """Canonical rows of a shard; what cannot be read goes to `broken`."""
    adapter = ADAPTERS[adapter_name]
    file = PurePosixPath(shard["path"]).name
    for number, row, raw in read_shard(shard):
        pos = shard["pos"] + number - shard["first"]
        place = {"row_id": f"{file}:{number + 1}", "pos": pos}
        try:
            if row is None:
                raise ValueError(raw)
            canonical = adapter.read(row)
            own = _carried({**row, **canonical}, extra)
        except ValueError as error:
            broken.append(broken_row(adapter_name, place, str(error), row))
            continue
        yield {**own, **with_system(canonical, system), **place, **own_id(row)}


def _report(
    place: Place, section: Ingest, adapter: str, files: list[str], columns: list[str], commits: list[Commit]
) -> IngestReport:
    broken = sum(commit["result"]["broken"] for commit in commits)
    if broken > section.max_broken:
        raise _too_many_broken(place, section, adapter, broken, commits)
    digest = RowDigest()
    for commit in commits:
        digest.add(commit["result"]["digest"], commit["result"]["rows"])
    if not digest.rows:
        raise DataError(f"{section.source}: no rows")
    return IngestReport(
        summary=f"{digest.rows} rows from {len(files)} file{'s' * (len(files) > 1)} as {adapter}, {broken} broken",
        digest=digest.hexdigest(),
        rows=digest.rows,
        broken=broken,
        adapter=adapter,
        source=section.source,
        columns=columns,
        outputs=RowFiles(
            rows=place.relative(commit["files"]["rows"] for commit in commits),
            dropped=place.relative(commit["files"]["dropped"] for commit in commits),
        ),
    )


def _too_many_broken(place: Place, section: Ingest, adapter: str, broken: int, commits: list[Commit]) -> DataError:
    lines: list[str] = []
    for table in read_tables(place.workspace, [commit["files"]["dropped"] for commit in commits]):
        for row in table.slice(0, SHOWN - len(lines)).to_pylist():
            lines.append(f"  {row['row_id']}: {row['reason']}")
    more = [f"  … and {broken - len(lines)} more"] if broken > len(lines) else []
    head = (
        f"{section.source}: {broken} broken row{'s' * (broken > 1)}, read as {adapter}; ingest.max_broken allows "
        f"{section.max_broken}. Mend them, or raise it to set them aside"
    )
    return DataError("\n".join([head, *lines, *more]))


def first_rows(section: Ingest, count: int) -> list[dict[str, Any]]:
    """The first rows of the source's first file, canonical, to look at before the source is read.

    Rows that cannot be read are passed over. None from hubs, object storage and files in another encoding.
    """
    if "://" in shipped_path(section.source) or not is_utf8(section.encoding):
        return []
    files = list_files(section.source)
    rows = sample_rows(files[0], count)
    if section.adapter == "columns":
        return [row for row in rows if "row_id" in row]
    adapter = ADAPTERS[_adapter_for(section, files)[0]]
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        with suppress(ValueError):
            place = {"row_id": f"{PurePosixPath(files[0]).name}:{number + 1}", "pos": number}
            canonical = {**with_system(adapter.read(row), section.system), **place, **own_id(row)}
            found.append(replaced(canonical, section.replace))
    return found
