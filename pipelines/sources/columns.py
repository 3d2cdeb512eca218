"""Any table: the source's columns with their names and types, and a `row_id` and `pos` beside them."""

import json
from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.rows import DROPPED, RowDigest, is_text
from pipelines.artifacts.shards import Attempt, Shard, Work
from pipelines.errors import InputError
from pipelines.sources.files import parquet_batches, read_shard, sample_rows, schema_of

BATCH_ROWS = 2048
COLUMN_ROWS = 8192
"""Rows that are read at a time where they stay columns."""
SAMPLED = 1000
"""Rows that types are inferred from where a source does not tell them."""
_UNFIT = (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError)
"""What Arrow says of a value that a column cannot hold."""


def source_schema(files: list[str]) -> pa.Schema:
    """The source's columns: as a Parquet file says, else inferred from the first rows.

    Raises InputError where a column has the name of one that every row gets.
    """
    schema = schema_of(files[0])
    if schema is None:
        rows = sample_rows(files[0], SAMPLED)
        names = dict.fromkeys(name for row in rows for name in row)
        schema = pa.schema([pa.field(name, _type([row.get(name) for row in rows], name, files[0])) for name in names])
    if "pos" in schema.names:
        raise InputError(f"{files[0]}: column pos has the name that the order of the rows has here; rename it")
    return schema.remove_metadata()


def _type(values: list[Any], name: str, file: str) -> pa.DataType:
    try:
        found = pa.array(values).type
    except UnicodeEncodeError:  # half a character, for which its row is set aside
        return _type([value for value in values if is_text(value)], name, file)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise InputError(f"{file}: column {name} holds values of several types ({error})") from None
    return pa.string() if pa.types.is_null(found) else found


def table_reader(schema: pa.Schema) -> Work:
    """The work on one shard of a source with that schema."""

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        own = [field for field in schema if field.name != "row_id"]
        written = pa.schema([pa.field("row_id", pa.string(), False), pa.field("pos", pa.int64(), False), *own])
        broken: list[dict[str, Any]] = []
        return write_shard(attempt, written, _tables(shard, schema, written, broken), broken)

    return work


def write_shard(
    attempt: Attempt, schema: pa.Schema, tables: Iterable[pa.Table], broken: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write a shard's rows, and what reading them has added to `broken`; returns the counts and the rows' digest."""
    digest = RowDigest()
    with attempt.writer("rows", schema) as writer:
        for table in tables:
            writer.write_table(table)
            digest.update(table)
    with attempt.writer("dropped", DROPPED) as writer:
        writer.write_table(pa.Table.from_pylist(sorted(broken, key=lambda row: row["pos"]), schema=DROPPED))
    return {"rows": digest.rows, "digest": digest.hexdigest(), "broken": len(broken)}


def _tables(shard: Shard, schema: pa.Schema, written: pa.Schema, broken: list[dict[str, Any]]) -> Iterator[pa.Table]:
    """The rows of a shard as tables; whole columns where its file has the source's schema."""
    if "groups" not in shard or not schema.equals(schema_of(shard["path"])):
        for rows in batches(_rows(shard, schema, broken), BATCH_ROWS):
            yield table_of(rows, written, "columns", broken)
        return
    end = shard["first"] + shard["rows"]
    for number, batch in parquet_batches(shard["path"], shard, COLUMN_ROWS):
        if number < end:
            yield _numbered(pa.table(batch.slice(0, end - number)), number, shard).cast(written)


def _numbered(table: pa.Table, number: int, shard: Shard) -> pa.Table:
    """The table with `row_id` and `pos` in front; its first row is row `number` of its file."""
    names = _own_ids(table)
    if names.null_count:
        file = PurePosixPath(shard["path"]).name
        names = pc.coalesce(names, pa.array([f"{file}:{i + 1}" for i in range(number, number + table.num_rows)]))
    pos = pa.array(np.arange(table.num_rows) + (shard["pos"] + number - shard["first"]))
    rest = {name: table[name] for name in table.column_names if name != "row_id"}
    return pa.table({"row_id": names, "pos": pos, **rest})


def _own_ids(table: pa.Table) -> pa.Array:
    """What `own_id` gives for each row, null where it gives nothing."""
    key = next((name for name in ("row_id", "id") if name in table.column_names), None)
    if key is None:
        return pa.nulls(table.num_rows, pa.string())
    if pa.types.is_integer(table.schema.field(key).type):
        return table[key].combine_chunks().cast(pa.string())
    return pa.array([None if value in (None, "") else str(value) for value in table[key].to_pylist()], pa.string())


def _rows(shard: Shard, schema: pa.Schema, broken: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of a shard with `row_id` and `pos`; what cannot be read goes to `broken`."""
    file = PurePosixPath(shard["path"]).name
    known = set(schema.names)
    for number, row, raw in read_shard(shard):
        place = {"row_id": f"{file}:{number + 1}", "pos": shard["pos"] + number - shard["first"]}
        if row is None:
            broken.append(broken_row("columns", place, raw, None))
        elif extra := set(row) - known:
            reason = f"column {', '.join(sorted(extra))} is not in the first rows"
            broken.append(broken_row("columns", place, reason, row))
        else:
            yield {**row, **place, **own_id(row)}


def table_of(rows: list[dict[str, Any]], schema: pa.Schema, reader: str, broken: list[dict[str, Any]]) -> pa.Table:
    """The rows as a table; those that do not fit into it go to `broken`, as what `reader` could not read."""
    try:
        return pa.Table.from_pylist(rows, schema=schema)
    except _UNFIT:
        fitting = []
        for row in rows:
            try:
                pa.Table.from_pylist([row], schema=schema)
            except UnicodeEncodeError:
                broken.append(broken_row(reader, row, "holds half a character, a lone surrogate", row))
            except _UNFIT as error:
                broken.append(broken_row(reader, row, f"not like the first rows: {error}", row))
            else:
                fitting.append(row)
        return pa.Table.from_pylist(fitting, schema=schema)


def broken_row(reader: str, place: dict[str, Any], reason: str, row: dict[str, Any] | None) -> dict[str, Any]:
    """An entry of schema `DROPPED` for a row, if there is one, at the `row_id` and `pos` of `place`."""
    text = "" if row is None else json.dumps(row, ensure_ascii=False, default=str)[:1000]
    texts = {"row_id": place["row_id"], "reason": reason, "text": text}
    return {
        **{name: value.encode("utf-8", "backslashreplace").decode() for name, value in texts.items()},
        "pos": place["pos"],
        "stage": "ingest",
        "operator": reader,
    }


def own_id(row: dict[str, Any]) -> dict[str, str]:
    """The source's own key, where it has one; otherwise the file and line stay the row's name."""
    key = row.get("row_id", row.get("id"))
    return {} if key is None or key == "" else {"row_id": str(key)}


def batches(rows: Iterator[dict[str, Any]], size: int) -> Iterator[list[dict[str, Any]]]:
    """The rows in lists of `size`."""
    batch: list[dict[str, Any]] = []
    for row in rows:
        batch.append(row)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
