"""Export: the rows as one file for people and other tools, in data-set order."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.files import Destination, created, size_of
from pipelines.artifacts.reports.clean import CleanReport
from pipelines.artifacts.reports.rows import ExportReport, IngestReport, RowsReport
from pipelines.artifacts.rows import MESSAGES, without_nulls
from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.stage import Inputs, Output, Stage
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import InputError
from pipelines.export.formats import conversation_as
from pipelines.recipe.split import Export
from pipelines.sources.arrow_rows import holds_bytes


@dataclass(frozen=True)
class ExportInputs(Inputs):
    """The rows to write, and what read them."""

    rows: Output[RowsReport]
    ingest: Output[IngestReport] | None
    """Names the columns that are written; None where the rows were synthesized."""

    def digests(self) -> dict[str, str]:
        """Of the rows alone: they follow from what was read."""
        return {self.rows.stage: self.rows.report.digest}


@dataclass(frozen=True)
class ExportStage(Stage[ExportInputs, ExportReport]):
    """The rows as the file that the recipe's section `export` names."""

    section: Export
    paths: Mapping[str, str]
    """Everything that the recipe reads, by key."""

    name: ClassVar[str] = "export"
    version: ClassVar[int] = 1

    @property
    def reports(self) -> type[ExportReport]:
        """The class of its report."""
        return ExportReport

    def fingerprint_inputs(self) -> Mapping[str, Any]:
        """The section."""
        section = self.section
        unset = {"format"} if section.format == "rows" else set()  # as workspaces of earlier versions have it
        unset |= set() if section.statistics else {"statistics"}
        return {"section": section.model_dump(exclude={"overwrite", *unset})}

    def destinations(self) -> list[Destination]:
        """The file."""
        return [self._destination]

    @property
    def _destination(self) -> Destination:
        section = self.section
        return Destination("export.path", section.path, "export.overwrite: true", section.overwrite, self.paths)

    def is_current(self, report: ExportReport) -> bool:
        """Whether the file is still there, with the size it was written with."""
        return all(size_of(path) == size for path, size in report.written.items())

    def run(self, place: Place, inputs: ExportInputs) -> ExportReport:
        """Write the rows to `export.path`; their columns are those that ingest found, without `pos`."""
        columns = None
        if inputs.ingest is not None:
            columns = [name for name in inputs.ingest.report.columns if name != "pos"]
        format_name = self.section.format
        columns = columns if format_name == "rows" else None
        tables = _with_statistics(inputs.rows, columns) if self.section.statistics else _tables(inputs.rows, columns)
        rows = _write(self._destination, place.workspace, tables, format_name)
        path = self.section.path
        return ExportReport(
            summary=f"{rows} rows in {path}",
            digest=inputs.rows.report.digest,
            rows=rows,
            written={path: size_of(path)},
        )


def _tables(rows: Output[RowsReport], columns: list[str] | None) -> Iterator[pa.Table]:
    """The rows, after an empty table that has their columns; all columns where None are named."""
    workspace, paths = rows.folder.workspace, rows.paths(rows.report.outputs.rows)
    with workspace.parquet_file(paths[0]) as file:
        names = columns or file.schema_arrow.names
        yield file.schema_arrow.empty_table().select(names)
    for table in read_tables(workspace, paths):
        yield table.select(names)


STATISTICS = "__dj__stats__"
"""The name that data-juicer gives the column."""


def _with_statistics(rows: Output[RowsReport], columns: list[str] | None) -> Iterator[pa.Table]:
    """The same tables with what clean's filters measured of each row, by the name of the statistic."""
    if not isinstance(rows.report, CleanReport):
        raise InputError("export.statistics: the rows were not cleaned, so that nothing was measured")
    known: dict[str, dict[str, Any]] = {}
    names: dict[str, pa.DataType] = {}
    for table in read_tables(rows.folder.workspace, rows.paths(rows.report.statistics)):
        measured = table.drop_columns(["pos"])
        names.update((field.name, field.type) for field in measured.schema if field.name != "row_id")
        for row in measured.to_pylist():
            found = known.setdefault(row.pop("row_id"), {})
            found.update((name, value) for name, value in row.items() if value is not None)
    kind = pa.struct(list(names.items()))
    for table in _tables(rows, columns and list(dict.fromkeys([*columns, "row_id"]))):
        keys = table["row_id"].to_pylist()
        kept = table.select(columns) if columns else table
        yield kept.append_column(STATISTICS, pa.array([known.get(key, {}) for key in keys], kind))


def _write(destination: Destination, workspace: Workspace, tables: Iterator[pa.Table], format_name: str) -> int:
    rows = 0
    with created(destination, workspace) as sink:
        first = next(tables)
        if destination.path.endswith(".parquet"):
            with pq.ParquetWriter(sink, first.schema, compression="zstd") as writer:
                for table in tables:
                    writer.write_table(table)
                    rows += table.num_rows
        elif destination.path.endswith(".json"):
            sink.write(b"[")
            for table in tables:
                lines = _lines(table).split("\n")[:-1]
                sink.write("".join(f"{',' * (rows + at > 0)}\n{line}" for at, line in enumerate(lines)).encode())
                rows += table.num_rows
            sink.write(b"\n]\n")
        else:
            for table in tables:
                sink.write((_lines(table) if format_name == "rows" else _lines_as(format_name, table)).encode())
                rows += table.num_rows
    return rows


def _lines_as(format_name: str, table: pa.Table) -> str:
    """The rows as another program reads them, a line each."""
    rows = (conversation_as(format_name, row) for row in table.to_pylist())
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _lines(table: pa.Table) -> str:
    """The rows as `json.dumps` writes them, a line each; column by column, which takes a third of the time.

    What is null in a turn is left out, and a number that is none is null. InputError for bytes, which JSON has not.
    """
    for field in table.schema:
        if holds_bytes(field.type):
            raise InputError(f"export.path: column {field.name} holds bytes, which JSON has not; end it in .parquet")
    names = [json.dumps(name, ensure_ascii=False).replace("%", "%%") for name in table.column_names]
    template = "{" + ", ".join(f"{name}: %s" for name in names) + "}\n"
    values = [map(_encoder(column), column.to_pylist()) for column in table.columns]
    return "".join([template % row for row in zip(*values, strict=True)])


def _encoder(column: pa.ChunkedArray) -> Callable[[Any], str]:
    if pa.types.is_string(column.type) and not column.null_count:
        return encode_basestring
    if pa.types.is_integer(column.type) and not column.null_count:
        return str
    encode = json.JSONEncoder(ensure_ascii=False, default=str).encode
    if column.type.equals(MESSAGES):
        return lambda turns: encode(turns if turns is None else [without_nulls(turn) for turn in turns])
    return lambda value: encode(_finite(value))


def _finite(value: Any) -> Any:
    """A value without NaN and infinite numbers, which JSON has not."""
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
