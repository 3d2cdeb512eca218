"""Export: the rows as one file for people and other tools, in data-set order."""

import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from json.encoder import encode_basestring
from typing import Any, ClassVar

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from pipelines.artifacts.files import created, size_of
from pipelines.artifacts.reports.rows import ExportReport, IngestReport, RowsReport
from pipelines.artifacts.rows import MESSAGES, without_nulls
from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.stage import Inputs, Output, Stage
from pipelines.artifacts.workspace import Place
from pipelines.errors import Problem
from pipelines.export.formats import conversation_as
from pipelines.recipe.split import Export
from pipelines.sources.files import shipped_path


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
        section = self.section.model_dump(exclude={"format"} if self.section.format == "rows" else set())
        return {"section": section}

    def preflight(self) -> list[Problem]:
        """Whether the file would be written over one that the recipe reads, or among them."""
        path = self.section.path
        return [
            Problem("export.path", f"{path} is what {key} names, and would be written over; give it another name")
            for key, source in self.paths.items()
            if _takes_in(source, path)
        ]

    def is_current(self, report: ExportReport) -> bool:
        """Whether the file is still there, with the size it was written with."""
        return all(size_of(path) == size for path, size in report.written.items())

    def run(self, place: Place, inputs: ExportInputs) -> ExportReport:
        """Write the rows to `export.path`; their columns are those that ingest found, without `pos`."""
        columns = None
        if inputs.ingest is not None:
            columns = [name for name in inputs.ingest.report.columns if name != "pos"]
        if self.section.format == "rows":
            rows = _write(self.section, _tables(inputs.rows, columns))
        else:
            rows = _write_for(self.section, _tables(inputs.rows, None))
        path = self.section.path
        return ExportReport(
            summary=f"{rows} rows in {path}",
            digest=inputs.rows.report.digest,
            rows=rows,
            written={path: size_of(path)},
        )


def _takes_in(source: str, path: str) -> bool:
    """Whether a source, which may be a folder or a glob, has a file of that path or would have it."""
    source, path = (_absolute(name) for name in (source, path))
    return path == source or path.startswith(source + "/") or re.match(glob_translate(source), path) is not None


def _absolute(path: str) -> str:
    path = shipped_path(path).removeprefix("file://").rstrip("/")
    return path if "://" in path else os.path.realpath(os.path.expanduser(path))


def _tables(rows: Output[RowsReport], columns: list[str] | None) -> Iterator[pa.Table]:
    """The rows, after an empty table that has their columns; all columns where None are named."""
    workspace, paths = rows.folder.workspace, rows.paths(rows.report.outputs.rows)
    with workspace.parquet_file(paths[0]) as file:
        names = columns or file.schema_arrow.names
        yield file.schema_arrow.empty_table().select(names)
    for table in read_tables(workspace, paths):
        yield table.select(names)


def _write(section: Export, tables: Iterator[pa.Table]) -> int:
    rows = 0
    with created(section.path, f"export.path {section.path}") as sink:
        first = next(tables)
        if section.path.endswith(".parquet"):
            with pq.ParquetWriter(sink, first.schema, compression="zstd") as writer:
                for table in tables:
                    writer.write_table(table)
                    rows += table.num_rows
        else:
            for table in tables:
                sink.write(_lines(table).encode())
                rows += table.num_rows
    return rows


def _write_for(section: Export, tables: Iterator[pa.Table]) -> int:
    """The rows as the program that `export.format` names reads them, and nothing else."""
    rows = 0
    with created(section.path, f"export.path {section.path}") as sink:
        for table in tables:
            for row in table.to_pylist():
                sink.write((json.dumps(conversation_as(section.format, row), ensure_ascii=False) + "\n").encode())
                rows += 1
    return rows


def _lines(table: pa.Table) -> str:
    """The rows as `json.dumps` writes them, a line each; column by column, which takes a third of the time.

    What is null in a turn is left out, and a number that is none is null.
    """
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
