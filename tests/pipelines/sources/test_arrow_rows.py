"""Rows of Arrow batches: what Python cannot hold has a reason, and what a structure fills up is left out."""

from typing import Any

import pyarrow as pa
import pytest

from pipelines.sources.arrow_rows import python_rows, unreadable


def batch_of(**columns: Any) -> pa.RecordBatch:
    return pa.RecordBatch.from_pydict(columns)


NOT_UTF8 = pa.array([b"good", b"\xff\xfe"], pa.binary()).view(pa.string())
YEARS = pa.array([0, 2**61], pa.timestamp("s"))


@pytest.mark.parametrize(
    "column",
    [
        NOT_UTF8,
        YEARS,
        pa.StructArray.from_arrays([NOT_UTF8], ["inner"]),
        pa.ListArray.from_arrays(pa.array([0, 1, 2], pa.int32()), YEARS),
        pa.DictionaryArray.from_arrays(pa.array([0, 1]), NOT_UTF8),
        pa.array([0, 2**30], pa.date32()),
    ],
    ids=["text", "time", "structure", "list", "dictionary", "date"],
)
def test_a_row_that_python_cannot_hold_is_named_with_its_column(column: pa.Array) -> None:
    batch = batch_of(n=pa.array([1, 2]), odd=column)
    (number, why), *others = unreadable(batch).items()
    assert (number, others) == (1, []) and why.startswith("column odd cannot be read (")
    (first, _), (second, reason) = python_rows("a.parquet", batch)
    assert first is not None and first["n"] == 1 and (second, reason) == (None, why)


def test_fields_that_only_other_rows_have_are_left_out() -> None:
    given = [
        {"name": "f", "arguments": {"city": "北京", "days": [1, None]}},
        {"name": "g", "arguments": {"at": {"x": 1.5}, "note": "null"}},
        None,
        {"name": "h", "arguments": None},
    ]
    calls = pa.array([[call] for call in given])
    assert calls.to_pylist()[0][0]["arguments"]["note"] is None  # as Arrow fills it up
    rows = [row for row, _ in python_rows("a.parquet", batch_of(calls=calls, top=pa.nulls(4)))]
    assert [row["calls"] for row in rows if row] == [[call] for call in (*given[:3], {"name": "h"})]
    assert all(row is not None and row["top"] is None for row in rows)


def test_maps_are_dicts_whose_nulls_were_given() -> None:
    kind = pa.map_(pa.string(), pa.struct([("a", pa.int64()), ("b", pa.int64())]))
    maps = pa.array([[("x", {"a": 1}), ("y", None)], [("x", {"b": 2}), ("x", {"b": 3})]], kind)
    (row, _), (none, reason) = python_rows("a.parquet", batch_of(m=maps))
    assert row == {"m": {"x": {"a": 1}, "y": None}} and none is None and "x" in reason
