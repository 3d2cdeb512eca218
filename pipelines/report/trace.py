"""What became of rows: of one, stage by stage, or of all that were kept or dropped."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.reports.rows import RowsReport, SplitReport
from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.stage import Output, Report
from pipelines.errors import DataError

OURS = ("row_id", "pos", "operator", "reason", "stats")
"""Columns that a text is not looked for in: they are of the stages, not of the person's rows."""
NAMED = 20
"""Rows with a text that are named, where it is in several."""


def trace(finished: Sequence[Output[Any]], row_id: str) -> Iterator[str]:
    """Lines that tell where a row is, or which operator dropped it and on what grounds.

    `finished` are the finished stages, in their order. In place of an id, a part of a row's text will do, or what
    stands in a column that it carries: where several rows have it, they are named. Raises DataError for a row no
    stage knows.
    """
    lines = list(_trace(finished, row_id))
    if lines:
        yield from lines
        return
    found = {str(row["row_id"]): None for output in finished for row in _all_with(output, row_id)}
    if not found:
        ids = (table["row_id"][0].as_py() for output in finished for table in _tables(output) if len(table))
        like = f"; an id is such as {name}" if (name := next(ids, None)) else ""
        raise DataError(f"row {row_id}: no finished stage has a row of this id, or with this text{like}")
    if len(found) == 1:
        (only,) = found
        yield f"row {only}"
        yield from _trace(finished, only)
        return
    yield f"{len(found)} rows have this text; name one of them:"
    yield from islice(found, NAMED)
    if len(found) > NAMED:
        yield f"… and {len(found) - NAMED} more"


def _trace(finished: Sequence[Output[Any]], row_id: str) -> Iterator[str]:
    for output in finished:
        for kind, names in _files(output.report).items():
            for row in _find(output, names, row_id):
                yield _dropped(output.stage, row) if kind == "dropped" else _kept(output.stage, kind, row)


def _all_with(output: Output[Any], text: str) -> Iterator[dict[str, Any]]:
    for table in _tables(output):
        yield from _with_text(table, text).to_pylist()


def _tables(output: Output[Any]) -> Iterator[pa.Table]:
    for names in _files(output.report).values():
        yield from read_tables(output.folder.workspace, output.paths(names))


def rows_lines(
    finished: Sequence[Output[Any]], *, dropped: bool, operator: str | None, grep: str | None, limit: int
) -> Iterator[str]:
    """Up to `limit` lines: rows that are kept, by the last stage that leaves rows, or dropped rows of every stage.

    One line more says that there are others, uncounted: all shards would have to be read. `operator` leaves those that
    it dropped, `grep` those with that text. DataError where no stage left rows.
    """
    leaving = [output for output in finished if _files(output.report)]
    if not leaving:
        raise DataError("no stage has left rows yet; run the recipe first")
    if dropped or operator:
        lines = (_named(row, _dropped(o.stage, row)) for o in leaving for row in _rows(o, "dropped", operator, grep))
    else:
        last = leaving[-1]
        kinds = [kind for kind in _files(last.report) if kind != "dropped"]
        lines = (_named(row, _kept(last.stage, kind, row)) for kind in kinds for row in _rows(last, kind, None, grep))
    yield from islice(lines, limit)
    if next(lines, None) is not None:
        yield "… and more; --limit says how many are shown"


def _rows(output: Output[Any], kind: str, operator: str | None, grep: str | None) -> Iterator[dict[str, Any]]:
    for table in read_tables(output.folder.workspace, output.paths(_files(output.report).get(kind, []))):
        if operator is not None:
            table = table.filter(pc.equal(table["operator"], operator))
        yield from (_with_text(table, grep) if grep is not None else table).to_pylist()


def _with_text(table: pa.Table, text: str) -> pa.Table:
    """The rows in which a text stands, in a column or a turn, or that have it as a number in a column they carry."""
    found = pa.array([False] * table.num_rows, pa.bool_())
    for field in table.schema:
        if field.name in OURS:
            continue
        column = table[field.name].combine_chunks()
        if pa.types.is_string(field.type):
            found = pc.or_(found, pc.fill_null(pc.match_substring(column, text), False))
        elif pa.types.is_integer(field.type):
            found = pc.or_(found, pc.fill_null(pc.equal(column.cast(pa.string()), text), False))
    if "messages" in table.column_names and table["messages"].null_count < table.num_rows:
        turns = table["messages"].to_pylist()
        said = [any(text in (turn["content"] or "") for turn in talk or ()) for talk in turns]
        found = pc.or_(found, pa.array(said, pa.bool_()))
    return table.filter(found)


def _named(row: dict[str, Any], line: str) -> str:
    return f"{row['row_id']}: {line}"


def _files(report: Report) -> dict[str, list[str]]:
    """The files of rows that a stage left, by kind."""
    return report.outputs.model_dump() if isinstance(report, RowsReport | SplitReport) else {}


def _find(output: Output[Any], names: list[str], row_id: str) -> Iterator[dict[str, Any]]:
    for table in read_tables(output.folder.workspace, output.paths(names)):
        if "row_id" in table.column_names:
            yield from table.filter(pc.equal(table["row_id"], row_id)).to_pylist()


def _kept(stage: str, kind: str, row: dict[str, Any]) -> str:
    return f"{stage}: kept ({kind}), position {row['pos']}: {_shortened(row.get('response'))}"


def _dropped(stage: str, row: dict[str, Any]) -> str:
    stats = ", ".join(f"{name} {value:g}" for name, value in row["stats"] or [])
    grounds = f"{row['reason']} [{stats}]" if stats else row["reason"]
    return f"{stage}: dropped by {row['operator']}: {grounds}: {_shortened(row['text'])}"


def _shortened(text: str | None) -> str:
    line = " ".join((text or "").split())
    return line if len(line) <= 60 else line[:59] + "…"
