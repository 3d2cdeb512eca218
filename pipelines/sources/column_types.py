"""Types of columns: what a batch of values is, and the one type that holds what several batches or files hold.

Integers widen to floating-point numbers, where these hold them exactly, and everything else that differs to text.
Structures keep the fields of all of them.
"""

import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

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
        kind = reduce(merged, map(_type_of, values), pa.null())
        if pa.types.is_floating(kind) and any(isinstance(value, int) and abs(value) > EXACT for value in values):
            kind = pa.string()
        return pa.array([fitted(value, kind) for value in values], kind), True
    if _is_large(array.type):
        return pa.array([fitted(value, pa.string()) for value in values], pa.string()), False
    kind = plain(array.type)
    is_mixed = pa.types.is_floating(kind) and any(isinstance(value, int) for value in values)
    return (array, is_mixed) if kind == array.type else (converted(array, kind), is_mixed)


def text_of(value: Any) -> str:
    """Any value as text: what JSON has for it, and a text itself."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool | dict | list):
        return json.dumps(value, ensure_ascii=False, default=str)
    if isinstance(value, float):  # 5.0 is 5, as where the column began as integers
        return str(int(value)) if value.is_integer() and abs(value) <= EXACT else json.dumps(value)
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


def union(schemas: Iterable[pa.Schema], exceeds: Callable[[int, str], bool]) -> tuple[pa.Schema, list[str]]:
    """The schema that holds what all of them hold, and the columns for which a type was widened.

    `exceeds`: whether column `name` of schema number `n` holds integers that floating-point numbers do not.
    """
    schemas = [*schemas]
    names = dict.fromkeys(name for schema in schemas for name in schema.names)
    fields, widened = [], []
    for name in names:
        found = [(number, schema.field(name)) for number, schema in enumerate(schemas) if name in schema.names]
        kinds = [plain(field.type) for _, field in found]
        kind = reduce(merged, kinds)
        if kind == pa.float64() and any(
            pa.types.is_integer(own) and exceeds(number, name) for (number, _), own in zip(found, kinds, strict=True)
        ):
            kind = pa.string()
        if any(not pa.types.is_null(own) and own != kind and not _is_nested(kind) for own in kinds):
            widened.append(name)
        is_always_there = len(found) == len(schemas) and not any(field.nullable for _, field in found)
        fields.append(pa.field(name, kind, nullable=not is_always_there))
    return pa.schema(fields), widened


def exceeds_float(column: pa.ChunkedArray) -> bool:
    """Whether integers are among the values that floating-point numbers do not hold."""
    ends = pc.min_max(column).as_py()
    return any(end is not None and abs(end) > EXACT for end in ends.values())


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
