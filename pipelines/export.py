"""Export: the rows as one file for people and other tools, in data-set order."""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.files import Destination, created, size_of
from pipelines.artifacts.reports.rows import ExportReport, IngestReport, RowsReport
from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.stage import Inputs, Output, Stage
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.recipe.split import Export


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
        return {"section": self.section.model_dump(exclude={"overwrite"})}

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
        rows = _write(self._destination, place.workspace, _tables(inputs.rows, columns))
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


def _write(destination: Destination, workspace: Workspace, tables: Iterator[pa.Table]) -> int:
    rows = 0
    with created(destination, workspace) as sink:
        first = next(tables)
        if destination.path.endswith(".parquet"):
            with pq.ParquetWriter(sink, first.schema, compression="zstd") as writer:
                for table in tables:
                    writer.write_table(table)
                    rows += table.num_rows
        else:
            for table in tables:
                sink.write(_lines(table).encode())
                rows += table.num_rows
    return rows


def _lines(table: pa.Table) -> str:
    """The rows as `json.dumps` writes them, a line each; column by column, which takes a third of the time."""
    names = [json.dumps(name, ensure_ascii=False).replace("%", "%%") for name in table.column_names]
    template = "{" + ", ".join(f"{name}: %s" for name in names) + "}\n"
    values = [map(_encoder(column), column.to_pylist()) for column in table.columns]
    return "".join([template % row for row in zip(*values, strict=True)])


def _encoder(column: pa.ChunkedArray) -> Callable[[Any], str]:
    if pa.types.is_string(column.type) and not column.null_count:
        return encode_basestring
    if pa.types.is_integer(column.type) and not column.null_count:
        return str
    return json.JSONEncoder(ensure_ascii=False, default=str).encode
