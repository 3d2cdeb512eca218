"""Export: the rows as one file for people and other tools, in data-set order."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json.encoder import encode_basestring
from pathlib import Path
from typing import IO, Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.utils import glob_translate

from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.workspace import Place
from pipelines.errors import InputError, Problem, RecipeError
from pipelines.recipe.schema import Recipe
from pipelines.recipe.split import Export

VERSION = 1


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section."""
    assert recipe.export
    return {"section": recipe.export.model_dump()}


def preflight(recipe: Recipe) -> None:
    """RecipeError where the file would be written over one that the recipe reads, or among them."""
    assert recipe.export
    path = recipe.export.path
    problems = [
        Problem("export.path", f"{path} is what {key} names, and would be written over; give it another name")
        for key, source in _inputs(recipe).items()
        if _takes_in(source, path)
    ]
    if problems:
        raise RecipeError(recipe.name, problems)


def _inputs(recipe: Recipe) -> dict[str, str]:
    """The files of their own that a recipe names, by key."""
    synthesize = recipe.synthesize
    named = {
        "ingest.source": recipe.ingest and recipe.ingest.source,
        "synthesize.passages.source": synthesize and synthesize.passages and synthesize.passages.source,
        "refine.edited": recipe.refine and recipe.refine.edited,
        "clean.edited": recipe.clean and recipe.clean.edited,
    }
    if recipe.clean:
        named |= {f"clean.assets.{name}": place for name, place in recipe.clean.assets.items()}
    return {key: source for key, source in named.items() if source}


def _takes_in(source: str, path: str) -> bool:
    """Whether a source, which may be a folder or a glob, has a file of that path or would have it."""
    source, path = (_absolute(name) for name in (source, path))
    return path == source or path.startswith(source + "/") or re.match(glob_translate(source), path) is not None


def _absolute(path: str) -> str:
    path = path.removeprefix("file://").rstrip("/")
    return path if "://" in path else os.path.realpath(path)


def export(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Write the rows of the stage before to `export.path`; its columns are those that ingest found."""
    assert recipe.export
    (source,) = place.inputs.values()
    columns = _columns(source)
    tables = (table.select(columns or table.column_names) for table in _tables(source))
    rows = _write(recipe.export, tables)
    digest = source.report()["digest"]
    return {
        "summary": f"{rows} rows in {recipe.export.path}",
        "digest": digest,
        "rows": rows,
        "written": {recipe.export.path: size_of(recipe.export.path)},
    }


def _columns(source: Place) -> list[str] | None:
    """The columns of the source the rows came from, without `pos`; None where they have none."""
    while source.inputs:
        (source,) = source.inputs.values()
    names = source.report().get("columns")
    return None if names is None else [name for name in names if name != "pos"]


def _tables(source: Place) -> Iterator[pa.Table]:
    paths = source.outputs("rows")
    with source.workspace.parquet_file(paths[0]) as file:
        yield file.schema_arrow.empty_table()
    yield from read_tables(source.workspace, paths)


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
