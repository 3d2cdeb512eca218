"""Reading one source whole into rows: ingest's own, the one of the rows held out, and those of further training data.

The output is Parquet, one file per shard. A row that cannot be read is set aside with its file, line and reason;
more of them than `max_broken` stop the run. Columns and their types are those of all rows: a shard is written with what
its own rows have, and those that have less than all of them together are written once more.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from difflib import get_close_matches
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.reports.rows import IngestReport, RowFiles
from pipelines.artifacts.rows import ROW, TOOLS, RowDigest, is_text
from pipelines.artifacts.shards import Attempt, Commit, Shard, Work, read_tables, run_shards
from pipelines.artifacts.stage import Manifest, Output, read_manifest
from pipelines.artifacts.workspace import Place
from pipelines.errors import DataError, InputError
from pipelines.recipe.ingest import Source
from pipelines.recipe.paths import shipped_path
from pipelines.sources.adapters import ADAPTERS, Counts, recognise, replaced, with_system
from pipelines.sources.chat_log import chat_reader, check_chat, first_sessions, plan_chat
from pipelines.sources.column_types import flat_column
from pipelines.sources.columns import (
    BATCH_ROWS,
    LEFT_OUT,
    Rows,
    batches,
    broken_row,
    require_usable,
    table_reader,
)
from pipelines.sources.cut import Store, plan_shards
from pipelines.sources.dataset_info import resolved
from pipelines.sources.files import (
    digest_file,
    first_broken,
    format_of,
    is_hub,
    list_files,
    names_of,
    read_shard,
    sample_rows,
    schema_of,
)
from pipelines.sources.one_schema import as_one_schema
from pipelines.sources.own_names import own_id, require_own_names
from pipelines.sources.recode import as_utf8, beginnings, is_utf8, named_as, remove_copies
from pipelines.sources.row_keys import Columns, adapter_for, classify, renamed
from pipelines.sources.turns import says_nothing

STORED = "parts"
"""Folder of parts that stand for files that cannot be cut, while they are read."""
SHOWN = 5
"""Broken rows that an error message shows."""
VERSION = 8
"""Of how sources are read: what stages that read one of their own have in their fingerprints."""
MEANT = (
    ("问题", "問題", "提问", "提問", "问", "問", "标题", "標題", "question", "query", "prompt", "title"),
    ("答案", "回答", "答", "回复", "回覆", "answer", "response", "reply", "completion"),
)
"""Words in the names of columns with what is asked, and with answers, the surest first."""
LOOKED_INTO = 20
"""Files, and rows of each, that a recipe's check looks into."""


def source_fingerprint(section: Source) -> dict[str, Any]:
    """What decides the rows: the section without what only changes speed or tolerance, and the files' content."""
    section = resolved(section)
    if not section.chat_log:  # whose sessions end at the latest after a part of that size
        section = section.model_copy(update={"shard_bytes": Source.model_fields["shard_bytes"].default})
    settings = section.model_dump(exclude={"concurrency", "max_broken", "source", "sources", *_unset(section)})
    if is_hub(section.source):  # naming it must not download it
        return {"section": settings, "files": section.source}
    files = list_files(section.source)
    names = names_of(files)
    return {"section": settings, "files": [[names[path], digest_file(path)] for path in files]}


def _unset(section: Source) -> set[str]:
    """Keys that workspaces of earlier versions do not know, where they say nothing."""
    return {name for name in ("columns", "chat_log") if not getattr(section, name)}


def check_source(section: Source) -> None:
    """InputError where the source's files are not there, or no adapter reads what stands first in them.

    Hubs and object storage are not asked.
    """
    section = resolved(section)
    if "://" in section.source:
        return
    files = list_files(section.source)
    for path in files:
        if format_of(path) == ".parquet":
            require_usable(path, schema_of(path))
    if section.adapter == "columns":
        return
    if not section.chat_log:
        with beginnings(files[:LOOKED_INTO], section.encoding) as looked:
            _require_adapter(section, list(looked), is_all=len(files) <= LOOKED_INTO)
    elif is_utf8(section.encoding):
        check_chat(files, names_of(files), section, section.chat_log)


def describe_source(section: Source) -> str:
    """How the source's first rows are read and which of their columns are carried; empty where it is not looked at."""
    section = resolved(section)
    if "://" in section.source or section.adapter == "columns":
        return ""
    files = list_files(section.source)
    if section.chat_log:
        if not is_utf8(section.encoding):
            return ""
        return f"as chat_log; first {check_chat(files, names_of(files), section, section.chat_log)}"
    used, counts = Counter[str](), Counter[str]()
    carried, unread, there = dict[str, None](), dict[str, None](), set[str]()
    with beginnings(files[:LOOKED_INTO], section.encoding) as looked:
        for row in (row for path in looked for row in sample_rows(path, LOOKED_INTO, unread)):
            there.update(row)
            row = renamed(row, section.columns)
            columns = classify(row, section.adapter, _named_by(section))
            try:
                name, adapter = adapter_for(columns, row)
                if not is_text(row):
                    continue
                adapter.read(row, counts)
            except (ValueError, RecursionError):  # check_source and ingest say what it is
                continue
            used[name] += 1
            carried.update(dict.fromkeys(columns.carried[name]))
    if not used:
        return ""
    said = [f"as {' and '.join(sorted(used))}"]
    said += [f"carried, not trained: {_named(carried)}"] if carried else []
    said += [f"not read: {_named(unread)}"] if unread else []
    named = [name for name in section.columns.values() if name and not {name, name.partition(".")[0]} & there]
    said += [f"in none of the first rows: {_named(named)}, which ingest.columns names"] if named else []
    return "; ".join([*said, *(f"{number} {what}" for what, number in sorted(counts.items()))])


def _named(columns: Iterable[str]) -> str:
    return ", ".join(name or "(without a name)" for name in columns)


def read_source(section: Source, place: Place) -> IngestReport:
    """Read the source into canonical rows; the report counts rows and broken rows."""
    section = resolved(section)
    given = list_files(section.source)
    files = as_utf8(given, section.encoding, place)
    with named_as(dict(zip(files, given, strict=True))):
        return _read(section, files, dict(zip(files, names_of(given).values(), strict=True)), place)


def _read(section: Source, files: list[str], names: dict[str, str], place: Place) -> IngestReport:
    def plan() -> list[Shard]:
        if section.chat_log:
            return plan_chat(files, names, section, section.chat_log, _store(place))
        shards = plan_shards(files, section.shard_bytes, section.limit, _store(place))
        return [{**shard, "name": names[shard["path"]]} for shard in shards]

    if section.adapter == "columns":
        work = table_reader(_named_by(section))
    elif section.chat_log:
        work = chat_reader(section, section.chat_log)
    else:
        _require_adapter(section, files[:LOOKED_INTO], is_all=len(files) <= LOOKED_INTO)
        work = _reader(section)
    commits = run_shards(place, "rows", plan, work, concurrency=section.concurrency, title="ingest")
    for path in place.workspace.list(place.path(STORED)):
        place.workspace.remove(path)
    remove_copies(files, place)
    _require_few_broken(place, section, commits)
    _require_named_columns(section, commits)
    if any(commit["result"]["own_keys"] for commit in commits):
        require_own_names(place.workspace, [commit["files"]["rows"] for commit in commits])
    schema, widened, commits = as_one_schema(place, commits, section.concurrency)
    return _report(place, section, files, schema, widened, commits)


def read_once(section: Source, place: Place) -> Output[IngestReport]:
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


def _named_by(section: Source) -> str | None:
    """The column that names rows where the recipe says one, empty where it says that none does; see `classify`."""
    return section.columns["row_id"] or "" if "row_id" in section.columns else None


def _require_adapter(section: Source, files: list[str], *, is_all: bool) -> None:
    """InputError where no adapter reads the first rows of a file; DataError where none of the first files has any.

    `is_all`: whether there are no other files.
    """
    is_empty = True
    for path in files:
        rows = [renamed(row, section.columns) for row in sample_rows(path, LOOKED_INTO)]
        if not rows:
            continue
        is_empty = False
        if section.adapter != "auto":
            names = dict.fromkeys(name for row in rows for name in row)
            if missing := ADAPTERS[section.adapter].needs - set(names):
                fits = recognise(names)
                hint = f"; adapter {fits} fits these columns" if fits else ""
                raise InputError(
                    f"{path}: adapter {section.adapter} needs column {', '.join(sorted(missing))}, "
                    f"the file has {', '.join(names)}{hint}"
                )
        problems = [problem for row in rows if (problem := _refused(section, row))]
        if len(problems) == len(rows):
            if not any(map(recognise, rows)) and "no adapter" in problems[0]:
                raise _no_adapter(path, [*dict.fromkeys(name for row in rows for name in row)], section.columns)
            raise InputError(f"{path}: {problems[0]}")
        if section.adapter == "auto" and not any(map(recognise, rows)):
            raise _no_adapter(path, [*dict.fromkeys(name for row in rows for name in row)], section.columns)
    if is_empty and is_all:
        raise DataError(first_broken(files))


def _refused(section: Source, row: dict[str, Any]) -> str | None:
    columns = classify(row, section.adapter, _named_by(section))
    try:
        name, _ = adapter_for(columns, row)
    except ValueError as error:
        return str(error)
    for column in columns.carried[name]:
        try:
            flat_column([row[column]])
        except (UnicodeError, RecursionError):  # of a row alone, which ingest sets aside
            continue
        except ValueError as error:
            return f"column {column}: {error}"
    return None


def _no_adapter(file: str, columns: list[str], named: dict[str, str | None]) -> InputError:
    """How to rename columns that no adapter reads: for the adapter they are nearest to, or else for any.

    `columns`: as they are once those that the recipe has `named` have their new names.
    """
    what = f"{file}: no adapter reads columns {', '.join(columns)}"
    if len(columns) == 1 and (found := re.search(r"[;；\t|]", columns[0])):
        mark = "a tab" if found[0] == "\t" else found[0]
        return InputError(f"{what}; if {mark} is what separates them, save the file with commas, or with tabs as .tsv")
    known = {name for adapter in ADAPTERS.values() for name in adapter.needs}
    for name, source in named.items():
        if source in known and name in columns and name not in known:
            return InputError(f"{what}; in ingest.columns the name that is read comes first: {{{source}: {name}}}")
        if source and name != "row_id" and name not in columns:
            return InputError(f"{what}; {source}, which ingest.columns names for {name}, is none of them")
    given = {name.lower(): name for name in columns}
    for name, adapter in ADAPTERS.items():
        close = {wanted: get_close_matches(wanted.lower(), given, n=1, cutoff=0.75) for wanted in sorted(adapter.needs)}
        if all(close.values()):
            renamed = [f"{given[found]} to {wanted}" for wanted, (found,) in close.items() if given[found] != wanted]
            return InputError(f"{what}; rename {' and '.join(renamed)} for adapter {name}")
    asked, answered = (
        next((name for word in words for name in columns if word in name.lower()), "") for words in MEANT
    )
    if asked != answered and all(re.fullmatch(r"\w+", name) for name in (asked, answered)):
        return InputError(
            f"{what}; say what they are, such as 'ingest.columns={{query: {asked}, response: {answered}}}'"
        )
    usual = [f"{', '.join(sorted(adapter.needs))} ({name})" for name, adapter in ADAPTERS.items()]
    return InputError(f"{what}; rename them to one of these sets, here or as ingest.columns: {'; '.join(usual)}")


def _reader(section: Source) -> Work:
    """The work on one shard: read, adapt, write; closes over plain values only, since it travels to workers."""
    adapter, system, replace, columns, named_by = (
        *(section.adapter, section.system, section.replace, section.columns),
        _named_by(section),
    )

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        reading = _Reading(shard, adapter, columns, named_by)
        rows = Rows(ROW, flat_column, adapter, broken=reading.broken)
        for batch in batches(reading.rows(system, replace), BATCH_ROWS):
            rows.add(batch, reading.names)
        return {
            **rows.write(attempt),
            "own_keys": reading.own_keys,
            "found": sorted(reading.found),
            "adapters": dict(reading.adapters),
            "counts": dict(reading.counts),
            "unread": shard.get("unread", []),
        }

    return work


class _Reading:
    """Reading the rows of one shard through adapters, and what is noticed meanwhile."""

    def __init__(self, shard: Shard, adapter: str, columns: dict[str, str | None], named_by: str | None) -> None:
        self.broken: list[dict[str, Any]] = []
        self.names: dict[str, None] = {}
        """Columns that rows have, so far."""
        self.adapters: Counter[str] = Counter()
        self.counts: Counts = Counter()
        self.own_keys = False
        self.found: set[str] = set()
        """Names of the recipe's `columns` whose columns rows have."""
        self._shard = shard
        self._adapter = adapter
        self._columns = columns
        self._named_by = named_by
        self._classified: dict[tuple[str, ...], Columns] = {}

    def rows(self, system: str | None, replace: dict[str, str]) -> Iterator[dict[str, Any]]:
        """Canonical rows with what is carried along; what cannot be read goes to `broken`."""
        for number, row, raw in read_shard(self._shard):
            pos = self._shard["pos"] + number - self._shard["first"]
            place = {"row_id": f"{self._shard['name']}:{number + 1}", "pos": pos}
            try:
                if row is None:
                    raise ValueError(raw)
                read = self.read_row(row, place)
            except ValueError as error:
                self.broken.append(broken_row(self._adapter, place, str(error), row))
                continue
            except RecursionError:
                self.broken.append(broken_row(self._adapter, place, "is nested too deep", row))
                continue
            if system or replace:
                self.names["system"] = None
                read = replaced(with_system(read, system), replace)
            yield read

    def read_row(self, row: dict[str, Any], place: dict[str, Any]) -> dict[str, Any]:
        """One row as canonical, at its `row_id` and `pos`; ValueError, saying why, where it cannot be read."""
        if self._columns:
            row = renamed(row, self._columns)
        keys = tuple(row)
        columns = self._classified.get(keys)
        if columns is None:
            columns = self._classified[keys] = classify(keys, self._adapter, self._named_by)
            self.found |= self._columns.keys() & {*keys, *(["row_id"] if columns.own_key is not None else [])}
        name, adapter = adapter_for(columns, row)
        read = adapter.read(row, self.counts)
        given = (name, *read)
        if given not in columns.given:
            columns.given.add(given)
            self.names.update(dict.fromkeys((*columns.carried[name], *read)))
        for column in columns.carried[name]:
            if read.setdefault(column, row[column]) != row[column] and not says_nothing(row[column]):
                raise ValueError(f"column {column} differs from the one that adapter {name} makes; rename it")
        self.adapters[name] += 1
        if "response" in read and not read.get("messages") and not str(read["response"] or "").strip():
            self.counts["rows without an answer"] += 1
        if (own := columns.own_key) is not None:
            if key := own_id(row[own]):
                self.own_keys = True
                place["row_id"] = key
            elif not says_nothing(row[own]):
                if own == "row_id":
                    raise ValueError(f"column row_id holds {row[own]!r:.80}, which names no row; rename the column")
                self.names[own] = None
                read.setdefault(own, row[own])
        read.update(place)
        return read


def _require_few_broken(place: Place, section: Source, commits: list[Commit]) -> None:
    """DataError, with the first of them, where more rows are broken than the recipe allows."""
    broken = sum(commit["result"]["broken"] for commit in commits)
    if broken <= section.max_broken:
        return
    lines: list[str] = []
    for table in read_tables(place.workspace, [commit["files"]["dropped"] for commit in commits]):
        unreadable = table.filter(pc.not_equal(table["operator"], LEFT_OUT))
        for row in unreadable.slice(0, SHOWN - len(lines)).to_pylist():
            lines.append(f"  {row['row_id']}: {row['reason']}")
    more = [f"  … and {broken - len(lines)} more"] if broken > len(lines) else []
    used = Counter[str]()
    for commit in commits:
        used.update(commit["result"].get("adapters", {}))
    head = (
        f"{section.source}: {broken} broken row{'s' * (broken > 1)}, "
        f"read as {', '.join(sorted(used)) or section.adapter}; ingest.max_broken "
        f"allows {section.max_broken}. Mend them, or raise it to set them aside"
    )
    raise DataError("\n".join([head, *lines, *more]))


def _require_named_columns(section: Source, commits: list[Commit]) -> None:
    """DataError where the recipe names a column that no row has; of a chat, messages without theirs are broken."""
    if section.chat_log or not any(commit["result"]["rows"] for commit in commits):
        return
    found = {name for commit in commits for name in commit["result"]["found"]}
    for name, given in section.columns.items():
        if given and name not in found:
            raise DataError(
                f"{section.source}: no row has column {given}, which ingest.columns names for {name}; correct the "
                "name, or remove it"
            )


def _columns_of_source(section: Source, schema: pa.Schema, commits: list[Commit]) -> list[str]:
    """The columns that exports write: of any table its own ones alone."""
    if section.adapter != "columns":
        return list(schema.names)
    ours = {"pos"} if any(commit["result"]["has_row_id"] for commit in commits) else {"pos", "row_id"}
    return [name for name in schema.names if name not in ours]


def _report(
    place: Place, section: Source, files: list[str], schema: pa.Schema, widened: list[str], commits: list[Commit]
) -> IngestReport:
    digest = RowDigest()
    adapters, counts = Counter[str](), Counter[str]()
    for commit in commits:
        digest.add(commit["result"]["digest"], commit["result"]["rows"])
        adapters.update(commit["result"].get("adapters", {}))
        counts.update(commit["result"]["counts"])
    if not digest.rows:
        raise DataError(f"{section.source}: no rows")
    broken = sum(commit["result"]["broken"] for commit in commits)
    read_as = ", ".join(sorted(adapters)) or section.adapter
    carried = [name for name in schema.names if name not in (*ROW.names, TOOLS.name)]
    types = {name: str(schema.field(name).type) for name in widened}
    summary = [f"{digest.rows} rows from {len(files)} file{'s' * (len(files) > 1)} as {read_as}, {broken} broken"]
    summary += [f"{number} {what}" for what, number in sorted(counts.items())]
    if section.adapter != "columns" and carried:
        summary.append(f"carried, not trained: {_named(carried)}")
    if unread := sorted({name for commit in commits for name in commit["result"].get("unread", ())}):
        summary.append(f"not read: {', '.join(unread)}")
    if types:
        summary.append("widened: " + ", ".join(f"{name} to {kind}" for name, kind in types.items()))
    return IngestReport(
        summary="; ".join(summary),
        digest=digest.hexdigest(),
        rows=digest.rows,
        broken=broken,
        adapter=read_as,
        source=section.source,
        columns=_columns_of_source(section, schema, commits),
        carried=carried,
        widened=types,
        counts=dict(counts),
        outputs=RowFiles(
            rows=place.relative(commit["files"]["rows"] for commit in commits),
            dropped=place.relative(commit["files"]["dropped"] for commit in commits),
        ),
    )


def first_rows(section: Source, count: int) -> list[dict[str, Any]]:
    """The first rows of the source's first file, canonical, to look at before the source is read.

    Rows that cannot be read are passed over. None from hubs, object storage and chats in another encoding.
    """
    section = resolved(section)
    if "://" in shipped_path(section.source):
        return []
    files = list_files(section.source)
    if section.chat_log:
        is_read = is_utf8(section.encoding)
        return first_sessions(files, names_of(files), section, section.chat_log, count) if is_read else []
    with beginnings(files[:1], section.encoding) as looked:
        rows = [row for path in looked for row in sample_rows(path, count)]
    if section.adapter == "columns":
        return [row for row in rows if "row_id" in row]
    reading = _Reading({"name": names_of(files)[files[0]]}, section.adapter, section.columns, _named_by(section))
    found: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        with suppress(ValueError):
            place = {"row_id": f"{names_of(files)[files[0]]}:{number + 1}", "pos": number}
            found.append(replaced(with_system(reading.read_row(row, place), section.system), section.replace))
    return found
