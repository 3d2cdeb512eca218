"""Types of columns: what a batch of values is, and the one type that holds what several batches or files hold.

Integers widen to floating-point numbers, where these hold them exactly, and everything else that differs to text.
Structures keep the fields of all of them.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from functools import reduce
from typing import Any

import pyarrow as pa

from pipelines.errors import DataError
from pipelines.sources.arrow_rows import holds_bytes

EXACT = 1 << 53
"""Integers up to here are the same as 64-bit floating-point numbers."""
MAX_DEPTH, MAX_FIELDS = 32, 512
"""Nested deeper than this, or with more fields, a value becomes JSON text."""
UNFIT = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError)
"""What Arrow says of values that are not of one type."""


def flat_column(values: list[Any]) -> tuple[pa.Array, bool]:
    """A column of what an adapter carries along, and whether types had to be widened; nested values become JSON."""
    kinds = {type(value) for value in values} - {type(None)}
    if not kinds:
        return pa.nulls(len(values)), False
    if kinds == {str}:
        return pa.array(values, pa.string()), False
    if kinds == {bool}:
        return pa.array(values, pa.bool_()), False
    if kinds == {int}:
        with suppress(OverflowError):
            return pa.array(values, pa.int64()), False
    if kinds == {float}:
        return pa.array(values, pa.float64()), False
    if kinds == {int, float} and all(not isinstance(value, int) or abs(value) <= EXACT for value in values):
        return pa.array([None if value is None else float(value) for value in values], pa.float64()), True
    texts = [None if value is None else text_of(value) for value in values]
    return pa.array(texts, pa.string()), not kinds <= {dict, list} and (len(kinds) > 1 or kinds == {int})


def nested_column(values: list[Any]) -> tuple[pa.Array, bool]:
    """A column of any values, and whether types had to be widened."""
    try:
        array = pa.array(values)
    except UNFIT:
        kind = reduce(exact, values, reduce(merged, map(_type_of, values), pa.null()))
        return pa.array([fitted(value, kind) for value in values], kind), True
    if _is_large(array.type):
        return pa.array([fitted(value, pa.string()) for value in values], pa.string()), False
    kind = plain(array.type)
    is_mixed = pa.types.is_floating(kind) and any(isinstance(value, int) for value in values)
    return (array, is_mixed) if kind == array.type else (converted(array, kind), is_mixed)


def text_of(value: Any) -> str:
    """Any value as text: what JSON has for it, and a text itself; ValueError for bytes."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False, default=_beyond_json)
    if isinstance(value, float):  # 5.0 is 5, as where the column began as integers
        return str(int(value)) if value.is_integer() and abs(value) <= EXACT else json.dumps(value)
    return _beyond_json(value)


def _beyond_json(value: Any) -> str:
    """What JSON has not, such as a date, as text; ValueError for bytes, which are none."""
    if isinstance(value, bytes):
        raise ValueError("holds bytes, which are no text; leave the column out of the file")
    return str(value)


def merged(one: pa.DataType, other: pa.DataType) -> pa.DataType:
    """The type that holds the values of both."""
    if one == other or pa.types.is_null(other):
        return one
    if pa.types.is_null(one):
        return other
    if pa.types.is_struct(one) and pa.types.is_struct(other):
        fields = {field.name: field.type for field in one}
        for field in other:
            fields[field.name] = merged(fields.get(field.name, pa.null()), field.type)
        return pa.struct(list(fields.items())) if len(fields) <= MAX_FIELDS else pa.string()
    if _is_list(one) and _is_list(other):
        return pa.list_(merged(one.value_type, other.value_type))
    if pa.types.is_integer(one) and pa.types.is_integer(other):
        return pa.string() if pa.uint64() in (one, other) else pa.int64()
    if _is_number(one) and _is_number(other):
        return pa.float64()
    return pa.string()


def exact(kind: pa.DataType, value: Any) -> pa.DataType:
    """The type with text in place of floating-point numbers where the value has an integer that those do not hold."""
    if pa.types.is_floating(kind) and isinstance(value, int) and abs(value) > EXACT:
        return pa.string()
    if pa.types.is_struct(kind) and isinstance(value, dict):
        return pa.struct([(field.name, exact(field.type, value.get(field.name))) for field in kind])
    if _is_list(kind) and isinstance(value, list):
        return pa.list_(reduce(exact, value, kind.value_type))
    return kind


def plain(kind: pa.DataType) -> pa.DataType:
    """The type without what only says how it is stored; a structure without fields says nothing."""
    if pa.types.is_dictionary(kind):
        return plain(kind.value_type)
    if kind == pa.string_view():
        return pa.string()
    if kind == pa.binary_view():
        return pa.binary()
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, plain(field.type)) for field in kind]) if kind.num_fields else pa.null()
    return pa.list_(plain(kind.value_type)) if _is_list(kind) else kind


def settled(kind: pa.DataType) -> pa.DataType:
    """The type in the end, when all values are known: where there were none, it is text."""
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, settled(field.type)) for field in kind])
    return pa.list_(settled(kind.value_type)) if _is_list(kind) else kind


def union(
    schemas: Iterable[pa.Schema], columns: Callable[[int, str], Iterable[pa.ChunkedArray]]
) -> tuple[pa.Schema, list[str]]:
    """The schema that holds what all of them hold, and the columns for which a type was widened.

    `columns`: the values of column `name` of schema number `n`, which are asked for where integers of it come to be
    floating-point numbers. DataError where bytes would become text.
    """
    schemas = [*schemas]
    names = dict.fromkeys(name for schema in schemas for name in schema.names)
    fields, widened = [], []
    for name in names:
        found = [(number, schema.field(name)) for number, schema in enumerate(schemas) if name in schema.names]
        kinds = [plain(field.type) for _, field in found]
        widest = kind = reduce(merged, kinds)
        for (number, _), own in zip(found, kinds, strict=True):
            places = [*_places(kind, own)]
            if any(_is_text(there) and holds_bytes(here) for there, here in places):
                raise DataError(f"column {name} holds bytes in some files and something else in others; rename one")
            if any(pa.types.is_floating(there) and pa.types.is_integer(here) for there, here in places):
                for column in columns(number, name):
                    kind = reduce(exact, column.to_pylist(), kind)
        if kind != widest or any(not pa.types.is_null(own) and own != kind and not _is_nested(kind) for own in kinds):
            widened.append(name)
        is_always_there = len(found) == len(schemas) and not any(field.nullable for _, field in found)
        fields.append(pa.field(name, kind, nullable=not is_always_there))
    return pa.schema(fields), widened


def _places(kind: pa.DataType, own: pa.DataType) -> Iterator[tuple[pa.DataType, pa.DataType]]:
    """Both types wherever they are no longer nested alike; `kind` has all fields that `own` has."""
    if pa.types.is_struct(kind) and pa.types.is_struct(own):
        for field in own:
            yield from _places(kind.field(field.name).type, field.type)
    elif _is_list(kind) and _is_list(own):
        yield from _places(kind.value_type, own.value_type)
    else:
        yield kind, own


def converted(array: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> pa.Array | pa.ChunkedArray:
    """The values as a type that `merged`, `plain` or `settled` gave for theirs."""
    own = array.type
    if own == kind:
        return array
    if pa.types.is_null(own):
        return pa.nulls(len(array), kind)
    is_simple = pa.types.is_integer(own) or pa.types.is_boolean(own) or _is_text(own) or pa.types.is_dictionary(own)
    if is_simple or (_is_number(own) and _is_number(kind)):
        return array.cast(kind)
    return pa.array([fitted(value, kind) for value in array.to_pylist()], kind)


def as_schema(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The table with all columns of the schema, as its types; those that it lacks are null."""
    columns = [
        converted(table[field.name], field.type)
        if field.name in table.column_names
        else pa.nulls(table.num_rows, field.type)
        for field in schema
    ]
    return pa.table(columns, schema=schema)


def fitted(value: Any, kind: pa.DataType) -> Any:
    """A Python value as one that Arrow takes for the type."""
    if value is None or pa.types.is_null(kind):
        return None
    if _is_text(kind):
        return text_of(_without_nulls(value))
    if pa.types.is_struct(kind):
        return {field.name: fitted(value.get(field.name), field.type) for field in kind}
    if _is_list(kind):
        return [fitted(entry, kind.value_type) for entry in value]
    return float(value) if pa.types.is_floating(kind) else value


def _without_nulls(value: Any) -> Any:
    """A nested value without null fields, which structures of several rows have where one row has none."""
    if isinstance(value, dict):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list) else value


def _type_of(value: Any, depth: int = 0) -> pa.DataType:
    if depth > MAX_DEPTH:
        return pa.string()
    if isinstance(value, dict):
        fields = [(str(name), _type_of(inner, depth + 1)) for name, inner in value.items()]
        return pa.struct(fields) if fields else pa.null()
    if isinstance(value, list):
        return pa.list_(reduce(merged, (_type_of(inner, depth + 1) for inner in value), pa.null()))
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > EXACT:
        return pa.int64() if abs(value) < 1 << 63 else pa.string()
    try:
        return pa.scalar(value).type
    except UNFIT:
        return pa.string()


def _is_large(kind: pa.DataType) -> bool:
    """Whether a type is nested too deep, or one of its structures has too many fields."""
    kinds = [kind]
    for _ in range(MAX_DEPTH):
        kinds = [outer.field(n).type for outer in kinds if pa.types.is_nested(outer) for n in range(outer.num_fields)]
        if not kinds or len(kinds) > MAX_FIELDS:
            return bool(kinds)
    return True


def _is_nested(kind: pa.DataType) -> bool:
    return bool(pa.types.is_struct(kind)) or _is_list(kind)


def _is_list(kind: pa.DataType) -> bool:
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    views = (pa.types.is_list_view, pa.types.is_large_list_view)
    return any(is_one(kind) for is_one in (*lists, *views))


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind))


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
