"""What became of one row, stage by stage."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.compute as pc

from pipelines.artifacts.reports.rows import RowsReport, SplitReport
from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.stage import Output, Report
from pipelines.errors import DataError


def trace(finished: Sequence[Output[Any]], row_id: str) -> Iterator[str]:
    """Lines that tell where a row is, or which operator dropped it and on what grounds.

    `finished` are the finished stages, in their order. Raises DataError for a row no stage knows.
    """
    known = False
    for output in finished:
        for kind, names in _files(output.report).items():
            for row in _find(output, names, row_id):
                known = True
                yield _dropped(output.stage, row) if kind == "dropped" else _kept(output.stage, kind, row)
    if not known:
        raise DataError(f"row {row_id}: no finished stage has a row of this id")


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
