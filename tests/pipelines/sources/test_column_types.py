"""Types of columns: nothing is lost where values, batches and files differ."""

from collections.abc import Callable, Iterable
from typing import Any

import pyarrow as pa
import pytest

from pipelines.errors import DataError
from pipelines.sources.column_types import as_schema, flat_column, merged, nested_column, settled, text_of, union

INT, FLOAT, TEXT, BOOL, NULL = pa.int64(), pa.float64(), pa.string(), pa.bool_(), pa.null()


def columns_of(tables: list[pa.Table]) -> Callable[[int, str], Iterable[pa.ChunkedArray]]:
    return lambda number, name: [tables[number][name]]


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        (NULL, INT, INT),
        (INT, FLOAT, FLOAT),
        (pa.int8(), pa.int32(), INT),
        (pa.float32(), FLOAT, FLOAT),
        (INT, TEXT, TEXT),
        (BOOL, INT, TEXT),
        (pa.uint64(), INT, TEXT),
        (pa.timestamp("s"), TEXT, TEXT),
        (pa.list_(INT), pa.list_(FLOAT), pa.list_(FLOAT)),
        (pa.list_(INT), INT, TEXT),
        (pa.struct([("a", INT)]), pa.struct([("b", TEXT)]), pa.struct([("a", INT), ("b", TEXT)])),
        (pa.struct([("a", INT)]), pa.struct([("a", TEXT)]), pa.struct([("a", TEXT)])),
    ],
)
def test_types_widen(one: pa.DataType, other: pa.DataType, both: pa.DataType) -> None:
    assert merged(one, other) == both
    assert merged(other, one) == both or pa.types.is_struct(both)
    assert settled(merged(NULL, NULL)) == TEXT


@pytest.mark.parametrize(
    ("values", "kind", "read"),
    [
        ([1, None], INT, [1, None]),
        ([1, 2.5], FLOAT, [1.0, 2.5]),
        ([2**60 + 1, 2.5], TEXT, ["1152921504606846977", "2.5"]),
        ([10**30], TEXT, [str(10**30)]),
        ([True, 1, "x"], TEXT, ["true", "1", "x"]),
        ([5.0, "x"], TEXT, ["5", "x"]),
    ],
)
def test_columns_of_mixed_values(values: list[object], kind: pa.DataType, read: list[object]) -> None:
    for column in (flat_column, nested_column):
        array, is_widened = column(values)
        assert (array.type, array.to_pylist()) == (kind, read)
        assert is_widened == (values != [1, None])


def test_nested_values_keep_their_late_keys() -> None:
    array, _ = nested_column([{"a": 1}, {"b": {"c": "x"}}, {"a": "y"}])
    assert array.to_pylist() == [{"a": "1", "b": None}, {"a": None, "b": {"c": "x"}}, {"a": "y", "b": None}]
    assert flat_column([{"a": 1}, {"b": [2]}])[0].to_pylist() == ['{"a": 1}', '{"b": [2]}']


def test_structures_without_fields_can_be_written() -> None:
    array, _ = nested_column([{}, {"p": {}}])
    assert settled(array.type) == pa.struct([("p", TEXT)])


def test_deep_and_wide_values_become_text() -> None:
    deep: object = 1
    for _ in range(60):
        deep = [deep]
    assert nested_column([deep])[0].to_pylist() == [text_of(deep)]
    wide = [{f"k{n}": n} for n in range(600)]
    assert nested_column(wide)[0].to_pylist()[599] == '{"k599": 599}'


def test_tables_of_different_files_become_one() -> None:
    tables = [
        pa.table({"n": pa.array([1, 2], INT), "m": pa.nulls(2)}),
        pa.table({"n": pa.array([0.5]), "late": ["x"], "m": [{"k": 1}]}),
    ]
    schema, widened = union([table.schema for table in tables], columns_of(tables))
    rows = [row for table in tables for row in as_schema(table, schema).to_pylist()]
    assert rows == [
        {"n": 1.0, "m": None, "late": None},
        {"n": 2.0, "m": None, "late": None},
        {"n": 0.5, "m": {"k": 1}, "late": "x"},
    ]
    assert widened == ["n"]


@pytest.mark.parametrize(
    ("whole", "fraction"),
    [
        (2**60 + 1, 0.5),
        ({"n": 2**60 + 1}, {"n": 0.5}),
        ([2**60 + 1], [0.5]),
        ({"m": [{"n": 2**60 + 1}]}, {"m": [{"n": 0.5}]}),
    ],
    ids=["top", "in a structure", "in a list", "deeper"],
)
def test_whole_numbers_keep_their_digits_beside_fractions_at_any_depth(whole: Any, fraction: Any) -> None:
    def text(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: text(inner) for name, inner in value.items()}
        return [*map(text, value)] if isinstance(value, list) else str(value)

    array, is_widened = nested_column([whole, fraction])
    assert (array.to_pylist(), is_widened) == ([text(whole), text(fraction)], True)
    tables = [pa.table({"n": [value]}) for value in (whole, fraction)]
    schema, widened = union([table.schema for table in tables], columns_of(tables))
    rows = [row["n"] for table in tables for row in as_schema(table, schema).to_pylist()]
    assert (rows, widened) == ([text(whole), text(fraction)], ["n"])


def test_whole_numbers_that_fractions_hold_stay_numbers_in_structures() -> None:
    tables = [pa.table({"n": [{"m": 3}]}), pa.table({"n": [{"m": 0.5}]})]
    schema, widened = union([table.schema for table in tables], columns_of(tables))
    assert [row for table in tables for row in as_schema(table, schema)["n"].to_pylist()] == [{"m": 3.0}, {"m": 0.5}]
    assert widened == []


def test_bytes_never_become_text() -> None:
    for values in ([b"x"], [{"image": {"bytes": b"x"}}], [b"x", "y"]):
        with pytest.raises(ValueError, match="holds bytes, which are no text"):
            flat_column(values)
    tables = [pa.table({"n": [{"b": b"x"}]}), pa.table({"n": [{"b": "x"}]})]
    with pytest.raises(DataError, match="column n holds bytes in some files"):
        union([table.schema for table in tables], columns_of(tables))
