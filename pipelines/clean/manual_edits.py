"""Manual edits: kept and dropped rows with their statistics as one file for people, and what they changed in it.

A line has `row_id`, `pos`, `kept`, for a dropped row `operator` and `reason`, the statistics, and the row's columns.
A person changes texts, sets `kept` to false or true, and names the file as `clean.edited`;
pipelines/sources/manual_edits.py reads it.
"""

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.files import Destination, created
from pipelines.artifacts.reports.clean import CleanReport, EditCounts
from pipelines.artifacts.reports.rows import RowsReport
from pipelines.artifacts.rows import DROPPED, RowDigest, without_nulls
from pipelines.artifacts.shards import Attempt, Shard, Work, read_tables
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.clean.column import Mask
from pipelines.clean.passes import PassResult, row_batches, shard_writer
from pipelines.errors import DataError, InputError
from pipelines.sources.manual_edits import Line, cell_of, with_edits

DROPPED_BY = "edited_by_hand"
"""The operator that dropped rows are recorded with."""
_FIXED = ("row_id", "pos", "kept", "operator", "reason")


def export_rows(cleaned: Output[CleanReport], source: Output[RowsReport], destination: Destination) -> int:
    """Write the rows of a finished clean stage to a .jsonl or .csv file, the kept ones first; returns how many.

    `source` has the rows that were cleaned, from which the dropped ones are written. The file appears when it is
    whole; InputError where it may not be written.
    """
    require_exportable(destination)
    workspace = cleaned.folder.workspace
    names, statistics = _statistics(cleaned)
    dropped = _dropped(cleaned)
    kept_paths, source_paths = (output.paths(output.report.outputs.rows) for output in (cleaned, source))
    own = _columns(workspace, kept_paths)
    header = [*_FIXED, *(name for name in names if name not in own), *own]
    listed = set[str]()  # a row that a person put back is among the kept ones and among those that were dropped
    with _writer(destination, workspace, header) as write:
        for kept, paths in ((True, kept_paths), (False, source_paths)):
            for table in read_tables(workspace, paths):
                for row in table.to_pylist():
                    if (kept or row["row_id"] in dropped) and row["row_id"] not in listed:
                        why = {} if kept else dropped[row["row_id"]]
                        if row.get("messages"):
                            row["messages"] = [without_nulls(turn) for turn in row["messages"]]
                        write({**statistics(row["row_id"]), "kept": kept, **why, **row})
                        listed.add(row["row_id"])
    return len(listed)


def _columns(workspace: Workspace, paths: Sequence[str]) -> list[str]:
    with workspace.parquet_file(paths[0]) as file:
        return [name for name in file.schema_arrow.names if name not in _FIXED]


def _statistics(cleaned: Output[CleanReport]) -> tuple[list[str], Callable[[str], Line]]:
    """The names of all statistics, and a function that gives those of a row, whichever pass they come from."""
    tables = [*read_tables(cleaned.folder.workspace, cleaned.paths(cleaned.report.statistics))]
    if not tables:
        return [], lambda row_id: {}
    table = pa.concat_tables(tables, promote_options="default").drop_columns(["pos"])
    columns = {name: table[name].to_numpy() for name in table.column_names if name != "row_id"}
    numbers: dict[str, list[int]] = {}
    for number, row_id in enumerate(table["row_id"].to_pylist()):
        numbers.setdefault(row_id, []).append(number)

    def of_row(row_id: str) -> Line:
        values = ((name, column[number]) for number in numbers.get(row_id, ()) for name, column in columns.items())
        return {
            name: value if isinstance(value, str) else float(value)
            for name, value in values
            if value is not None and value == value
        }

    return [*columns], of_row


def _dropped(cleaned: Output[CleanReport]) -> dict[str, Line]:
    found: dict[str, Line] = {}
    paths = cleaned.paths(cleaned.report.outputs.dropped)
    for table in read_tables(cleaned.folder.workspace, paths, ["row_id", "operator", "reason"]):
        found |= {row.pop("row_id"): row for row in table.to_pylist()}
    return found


def require_exportable(destination: Destination) -> None:
    """InputError where rows cannot be exported to a file of that suffix."""
    if not destination.path.endswith((".jsonl", ".csv")):
        raise InputError(f"{destination.path}: hand cleaning writes .jsonl or .csv")


@contextmanager
def _writer(destination: Destination, workspace: Workspace, header: list[str]) -> Iterator[Callable[[Line], None]]:
    is_csv = destination.path.endswith(".csv")
    encoding = "utf-8-sig" if is_csv else "utf-8"
    with (
        created(destination, workspace) as sink,
        io.TextIOWrapper(sink, encoding=encoding, newline="") as stream,
    ):
        if is_csv:
            lines = csv.DictWriter(stream, header, restval="")
            lines.writeheader()
            yield lambda row: lines.writerow({name: _told(row, cell_of, value) for name, value in row.items()})
        else:
            yield lambda row: _put(stream, {name: row[name] for name in header if row.get(name) is not None})


def _put(stream: Any, row: Line) -> None:
    stream.write(_told(row, partial(json.dumps, ensure_ascii=False), row) + "\n")


def _told(row: Line, write: Callable[[Any], str], value: Any) -> str:
    """What is written of a row; DataError where the file's format has no such value."""
    try:
        return write(value)
    except TypeError as error:
        told = f"row {row['row_id']}: JSON has no such value ({error}); leave that column out of the source"
        raise DataError(told) from None


@dataclass
class Edited:
    """A table after a person's changes."""

    rows: pa.Table
    dropped: pa.Table
    """Schema `DROPPED`."""
    changed: int
    untouched: int
    """Rows of the file that are as they were."""


def edit(table: pa.Table, edits: dict[str, Line], text_key: str, restored: Mask) -> Edited:
    """Carry the changes out on those rows of `table` that the file lists; `restored` rows are those put back."""
    rows = table.to_pylist()
    keep = np.ones(len(rows), dtype=np.bool_)
    names = [name for name in table.column_names if name not in ("row_id", "pos", "kept")]
    changed = untouched = 0
    for number, row in enumerate(rows):
        if row["row_id"] not in edits:
            continue
        line = edits[row["row_id"]]
        keep[number] = line["kept"]
        rows[number] = with_edits("clean.edited", row, line, table.schema, names)
        changed += rows[number] is not row and bool(keep[number])
        untouched += rows[number] is row and bool(keep[number]) and not restored[number]
    edited = pa.Table.from_pylist(rows, schema=table.schema)
    gone = table.filter(pa.array(~keep))
    return Edited(edited.filter(pa.array(keep)), _as_dropped(gone, text_key), changed, untouched)


def _as_dropped(gone: pa.Table, text_key: str) -> pa.Table:
    count = gone.num_rows
    texts = gone[text_key].cast(pa.string()) if text_key in gone.column_names else pa.nulls(count, pa.string())
    stats = pa.nulls(count, DROPPED.field("stats").type)
    recorded = [
        pa.array([value] * count, pa.string()) for value in ("clean", DROPPED_BY, "kept is false in the edited file")
    ]
    return pa.table([gone["row_id"], gone["pos"], *recorded, stats, texts], schema=DROPPED)


def edit_work(workspace: Workspace, edits: dict[str, Line], text_key: str) -> Work:
    """Carry a person's changes out on one shard of cleaned rows, and put rows back among them."""

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        digest, counts = RowDigest(), EditCounts()
        with ExitStack() as stack:
            write = shard_writer(attempt, stack)
            for table in _merged(workspace, shard):
                back = np.isin(table["pos"].to_numpy(), shard["restored_pos"])
                edited = edit(table, edits, text_key, back)
                write("rows", edited.rows)
                write("dropped", edited.dropped)
                digest.update(edited.rows)
                counts += EditCounts(
                    changed=edited.changed,
                    dropped=edited.dropped.num_rows,
                    restored=int(back.sum()),
                    untouched=edited.untouched,
                )
        result = PassResult(rows=digest.rows, digest=digest.hexdigest(), manual_edits=counts)
        return result.model_dump(mode="json")

    return work


def _merged(workspace: Workspace, shard: Shard) -> Iterator[pa.Table]:
    """A shard's rows in order; in one table where rows are put back."""
    tables = row_batches(workspace, shard["path"])
    if not shard["restored_pos"]:
        yield from tables
        return
    whole = [*tables, *read_tables(workspace, [shard["restored"]])]
    yield pa.concat_tables([table.cast(whole[0].schema) for table in whole]).sort_by("pos")


def edit_shards(
    place: Place, paths: Sequence[str], source_paths: Sequence[str], edits: dict[str, Line], *, at_the_end: bool
) -> list[Shard]:
    """The shards of cleaned rows with what is put back into each: rows of the stage before, at their `pos`.

    Where cleaning gave rows a new order they come `at_the_end`. DataError for a row that is kept and not known.
    """
    begins, kept = [], set[str]()
    last = -1
    for path in paths:
        known = pa.concat_tables(read_tables(place.workspace, [path], ["row_id", "pos"]))
        positions = known["pos"].to_numpy()
        begins.append(int(positions.min()) if len(positions) else last + 1)
        last = int(positions.max()) if len(positions) else last
        kept.update(known["row_id"].to_pylist())
    back = restored_rows(read_tables(place.workspace, source_paths), kept, edits)
    if back is not None and at_the_end:
        column = pa.array(last + 1 + np.arange(back.num_rows))
        back = back.set_column(back.column_names.index("pos"), back.schema.field("pos"), column)
    shards = []
    for index, path in enumerate(paths):
        mine = _between(back, begins[index] if index else 0, begins[index + 1] if index + 1 < len(paths) else None)
        shard: Shard = {"index": index, "path": path, "restored_pos": mine["pos"].to_pylist() if mine else []}
        if mine:
            shard["restored"] = place.path("edited-plan", f"{index:05d}.parquet")
            with place.workspace.parquet_writer(shard["restored"], mine.schema) as writer:
                writer.write_table(mine)
        shards.append(shard)
    return shards


def _between(rows: pa.Table | None, low: int, high: int | None) -> pa.Table | None:
    """The rows with positions from `low` up to below `high`; None where there is none."""
    if rows is None:
        return None
    positions = rows["pos"].to_numpy()
    mine = rows.filter(pa.array((positions >= low) & (positions < (high if high is not None else np.inf))))
    return mine if mine.num_rows else None


def restored_rows(rows: Iterator[pa.Table], kept: set[str], edits: dict[str, Line]) -> pa.Table | None:
    """Rows of the stage before that were dropped and that the file keeps; None where there is none.

    DataError where a line, kept or not, is about a row that was never there.
    """
    missing = [row_id for row_id in edits if row_id not in kept]
    if not missing:
        return None
    found = pa.concat_tables(table.filter(pc.is_in(table["row_id"], pa.array(missing, pa.string()))) for table in rows)
    unknown = sorted(set(missing) - set(found["row_id"].to_pylist()))
    if unknown:
        raise DataError(
            f"clean.edited: row {unknown[0]} ({len(unknown)} in all) is not among the rows that were cleaned"
        )
    wanted = pa.array([row_id for row_id in missing if edits[row_id]["kept"]], pa.string())
    back = found.filter(pc.is_in(found["row_id"], wanted))
    return back if back.num_rows else None
