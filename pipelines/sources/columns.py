"""Tables from rows: a shard's rows with the types that they have, and any table as it is, with `row_id` and `pos`."""

import json
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.rows import DROPPED, ROW, RowDigest, is_text
from pipelines.artifacts.shards import Attempt, Shard, Work
from pipelines.errors import DataError
from pipelines.sources.arrow_rows import unreadable
from pipelines.sources.column_types import (
    UNFIT,
    as_schema,
    converted,
    nested_column,
    plain,
    union,
)
from pipelines.sources.files import parquet_batches, read_shard, schema_of
from pipelines.sources.own_names import own_id
from pipelines.sources.row_keys import OWN_KEYS
from pipelines.sources.turns import says_nothing

BATCH_ROWS = 2048
COLUMN_ROWS = 8192
"""Rows that are read at a time where they stay columns."""
MAX_COLUMNS = 2000
"""Columns of a data set: more are keys that stand for values."""

LEFT_OUT = "left_out"
"""What drops a message that a chat's adapter leaves out on purpose; it is not broken."""

ToColumn = Callable[[list[Any]], tuple[pa.Array, bool]]
"""Makes a column of values, and says whether their types had to be widened."""


@dataclass
class Rows:
    """The rows of one shard, as far as they are read; in memory, as columns, until their types are known."""

    fixed: pa.Schema
    """Columns whose types are known."""
    to_column: ToColumn
    """Makes the others."""
    reader: str
    """What rows that cannot be read are recorded as not being."""
    tables: list[pa.Table] = field(default_factory=list)
    broken: list[dict[str, Any]] = field(default_factory=list)
    """Schema `DROPPED`."""
    widened: set[str] = field(default_factory=set)
    _given: set[str] = field(default_factory=set)

    def add(self, rows: list[dict[str, Any]], names: Iterable[str]) -> None:
        """Add rows that have no other columns than `names`, their names and places; what no column can hold becomes
        broken."""
        self._given = {*names, "row_id", "pos"}
        given = [name for name in names if name not in self.fixed.names]
        own = [name for name in given if is_text(name)]
        if len(own) > MAX_COLUMNS:
            raise DataError(
                f"row {rows[0]['row_id']} and those after it have more than {MAX_COLUMNS} different columns; where "
                "keys stand for values, make a list of them"
            )
        try:
            if len(own) < len(given):
                raise UnicodeError  # some row has a column that no table can have
            self.tables.append(self._table(rows, own))
        except (*UNFIT, ValueError, RecursionError):
            fitting = [row for row in rows if self._fits(row, own)]
            self.tables.append(self._table(fitting, own))

    def _table(self, rows: list[dict[str, Any]], names: list[str]) -> pa.Table:
        columns = [
            pa.array([row.get(name) for row in rows], kind) if name in self._given else pa.nulls(len(rows), kind)
            for name, kind in self._kinds()
        ]
        for name in names:
            try:
                column, is_widened = self.to_column([row.get(name) for row in rows])
            except ValueError as error:
                raise ValueError(f"column {name}: {error}") from None
            columns.append(column)
            if is_widened:
                self.widened.add(name)
        return pa.table(columns, schema=pa.schema([*self.fixed, *map(_field, names, columns[len(self.fixed) :])]))

    def _kinds(self) -> list[tuple[str, pa.DataType]]:
        return [(field.name, field.type) for field in self.fixed]

    def _fits(self, row: dict[str, Any], names: list[str]) -> bool:
        try:
            if not is_text({name: value for name, value in row.items() if name != "pos"}):
                raise ValueError("holds half a character, a lone surrogate")
            self._table([row], names)
        except (*UNFIT, ValueError, RecursionError) as error:
            reason = "is nested too deep" if isinstance(error, RecursionError) else str(error)
            self.broken.append(broken_row(self.reader, row, reason, row))
            return False
        return True

    def write(self, attempt: Attempt) -> dict[str, Any]:
        """Write what was added; returns counts, the rows' digest, and `schema`, in hexadecimal digits."""
        found = [self.fixed, *(table.schema for table in self.tables)]
        schema, widened = union(found, lambda number, name: [self.tables[number - 1][name]])
        return {
            **write_shard(attempt, schema, (as_schema(table, schema) for table in self.tables), self.broken),
            "widened": sorted({*self.widened, *widened}),
        }


def _field(name: str, column: pa.Array) -> pa.Field:
    return pa.field(name, column.type)


def write_shard(
    attempt: Attempt, schema: pa.Schema, tables: Iterable[pa.Table], broken: list[dict[str, Any]]
) -> dict[str, Any]:
    """Write a shard's rows, and what reading them has added to `broken`; returns counts, digest and schema."""
    digest = RowDigest()
    with attempt.writer("rows", schema) as writer:
        for table in tables:
            writer.write_table(table)
            digest.update(table)
    with attempt.writer("dropped", DROPPED) as writer:
        writer.write_table(pa.Table.from_pylist(sorted(broken, key=lambda row: row["pos"]), schema=DROPPED))
    counts = {"rows": digest.rows, "digest": digest.hexdigest(), "broken": len(broken)}
    return {**counts, "schema": schema.serialize().to_pybytes().hex()}


def table_reader(named_by: str | None) -> Work:
    """The work on one shard of any table; `named_by`: see `row_keys.classify`."""
    keys = OWN_KEYS if named_by is None else (named_by,)

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        if "groups" in shard:
            return _copy_columns(shard, attempt, keys)
        rows = Rows(pa.schema([ROW.field("row_id"), ROW.field("pos")]), nested_column, "columns")
        named: set[str] = set()
        for batch in batches(_rows(shard, keys, named, rows.broken), BATCH_ROWS):
            names = dict.fromkeys(name for row in batch for name in row)
            rows.add(batch, [name for name in names if name not in rows.fixed.names])
        unread = shard.get("unread", [])
        written = rows.write(attempt)
        found = ["row_id"] if named.intersection(keys) else []
        named_rows = {"own_keys": bool(named), "has_row_id": "row_id" in named, "found": found}
        return {**written, **named_rows, "counts": {}, "unread": unread}

    return work


def _copy_columns(shard: Shard, attempt: Attempt, keys: tuple[str, ...]) -> dict[str, Any]:
    """Whole columns of a Parquet file, never row by row."""
    schema = require_usable(shard["path"], schema_of(shard["path"]))
    own = [pa.field(f.name, plain(f.type), f.nullable) for f in schema if f.name != "row_id"]
    written = pa.schema([ROW.field("row_id"), ROW.field("pos"), *own])
    end = shard["first"] + shard["rows"]
    broken: list[dict[str, Any]] = []

    def tables() -> Iterator[pa.Table]:
        for number, batch in parquet_batches(shard["path"], shard, COLUMN_ROWS):
            if number < end:
                batch = batch.slice(0, end - number)
                reasons = unreadable(batch)
                reasons |= _lost_ids(batch, keys, reasons)
                broken.extend(
                    broken_row("columns", _place(shard, number + at), why, None) for at, why in reasons.items()
                )
                kept = np.delete(np.arange(batch.num_rows), list(reasons))
                table = pa.table(batch.take(pa.array(kept)) if reasons else batch)
                yield as_schema(_numbered(table, number + kept, shard, keys), written)

    counts = write_shard(attempt, written, tables(), broken)
    has_keys = any(key in schema.names for key in keys)
    named_rows = {"own_keys": has_keys, "has_row_id": "row_id" in schema.names, "found": ["row_id"] * has_keys}
    return {**counts, **named_rows, "widened": [], "counts": {}}


def _lost_ids(batch: pa.RecordBatch, keys: tuple[str, ...], others: Container[int]) -> dict[int, str]:
    """Why rows, by their number, would lose what their column `row_id` says; `others` are looked at no more."""
    if "row_id" not in batch.schema.names:
        return {}
    kind = batch.schema.field("row_id").type
    if keys[0] == "row_id" and (pa.types.is_integer(kind) or pa.types.is_string(kind)):
        return {}
    ids = ((number, value.as_py()) for number, value in enumerate(batch.column("row_id")) if number not in others)
    return {number: why for number, value in ids if (why := _lost_id(value, keys))}


def _lost_id(value: Any, keys: tuple[str, ...]) -> str | None:
    """Why a row with that in its column `row_id` would lose it to the row's name; None where it does not."""
    if says_nothing(value) or (keys[0] == "row_id" and own_id(value)):
        return None
    return f"column row_id holds {value!r:.80}, which does not name the row; rename the column"


def require_usable(path: str, schema: pa.Schema) -> pa.Schema:
    """The schema of a Parquet file; DataError where a name stands twice, or is that of the rows' order here."""
    twice = sorted({name for name in schema.names if schema.names.count(name) > 1})
    if twice:
        raise DataError(f"{path}: column {twice[0]} is there twice; rename one")
    if "pos" in schema.names:
        raise DataError(f"{path}: column pos has the name that the order of the rows has here; rename it")
    return schema


def _place(shard: Shard, number: int) -> dict[str, Any]:
    """How row `number` of a shard's file is called, and its position."""
    return {"row_id": f"{shard['name']}:{number + 1}", "pos": shard["pos"] + number - shard["first"]}


def _numbered(table: pa.Table, numbers: npt.NDArray[np.int64], shard: Shard, keys: tuple[str, ...]) -> pa.Table:
    """The table with `row_id` and `pos` in front; `numbers` are those of its rows in their file."""
    names = _own_ids(table, keys)
    if names.null_count:
        names = pc.coalesce(names, pa.array([f"{shard['name']}:{number + 1}" for number in numbers], pa.string()))
    pos = pa.array(numbers + (shard["pos"] - shard["first"]))
    rest = {name: table[name] for name in table.column_names if name != "row_id"}
    return pa.table({"row_id": names, "pos": pos, **rest})


def _own_ids(table: pa.Table, keys: tuple[str, ...]) -> pa.Array:
    """What `own_id` gives for each row, null where it gives nothing."""
    key = next((name for name in keys if name in table.column_names), None)
    if key is None:
        return pa.nulls(table.num_rows, pa.string())
    if pa.types.is_integer(table.schema.field(key).type):
        return converted(table[key].combine_chunks(), pa.string())
    return pa.array([own_id(value) for value in table[key].to_pylist()], pa.string())


def _rows(
    shard: Shard, keys: tuple[str, ...], named: set[str], broken: list[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows of a shard with `row_id` and `pos`; what cannot be read goes to `broken`, and columns that name rows to
    `named`."""
    for number, row, raw in read_shard(shard):
        place = _place(shard, number)
        if row is None:
            broken.append(broken_row("columns", place, raw, None))
        elif "pos" in row:
            reason = "column pos has the name that the order of the rows has here; rename it"
            broken.append(broken_row("columns", place, reason, row))
        elif "row_id" in row and (lost := _lost_id(row["row_id"], keys)):
            broken.append(broken_row("columns", place, lost, row))
        else:
            there = [name for name in ("row_id", *keys) if name in row]
            named.update(there)
            key = next((own for name in keys if name in there and (own := own_id(row[name]))), None)
            yield {**row, **place, **({"row_id": key} if key else {})}


def broken_row(reader: str, place: dict[str, Any], reason: str, row: dict[str, Any] | None) -> dict[str, Any]:
    """An entry of schema `DROPPED` for a row, if there is one, at the `row_id` and `pos` of `place`."""
    try:
        text = "" if row is None else json.dumps(row, ensure_ascii=False, default=str)[:1000]
    except RecursionError:
        text = "(nested too deep to be shown)"
    texts = {"row_id": place["row_id"], "reason": reason[:1000], "text": text}
    return {
        **{name: value.encode("utf-8", "backslashreplace").decode() for name, value in texts.items()},
        "pos": place["pos"],
        "stage": "ingest",
        "operator": reader,
    }


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
