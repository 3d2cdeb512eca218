"""Rows of Arrow batches, as Parquet files have them, in Python; those that it cannot hold have a reason."""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa

from pipelines.errors import DataError


def python_rows(path: str, batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Each row, or None and why it cannot be read.

    A structure has the fields of all rows, null where this row has none of that name: those are left out. A map is a
    dict. DataError where two columns have one name.
    """
    if twice := [name for name in batch.schema.names if batch.schema.names.count(name) > 1]:
        raise DataError(f"{path}: column {twice[0]} is there twice; rename one")
    filled_up = [(field.name, field.type) for field in batch.schema if _has_null_fields(batch[field.name])]
    for row, why in _held(batch):
        for name, kind in filled_up:
            if row is not None:
                row[name] = _given(row[name], kind)
        yield row, why


def _held(batch: pa.RecordBatch) -> Iterator[tuple[dict[str, Any] | None, str]]:
    try:
        yield from ((row, "") for row in batch.to_pylist(maps_as_pydicts="strict"))
    except (ValueError, OverflowError, KeyError):
        reasons = unreadable(batch)
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist(maps_as_pydicts="strict")[0], ""
            except (ValueError, OverflowError, KeyError) as error:
                yield None, reasons.get(number, f"cannot be read ({error})")


def unreadable(batch: pa.RecordBatch) -> dict[int, str]:
    """Why rows cannot be held by Python, by their number in the batch: text that is not UTF-8, the year 10000."""
    reasons: dict[int, str] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if _is_sound(column):
            continue
        for number, value in enumerate(column):
            try:
                value.as_py()
            except (ValueError, OverflowError) as error:
                reasons.setdefault(number, f"column {name} cannot be read ({error})")
    return reasons


def _is_sound(column: pa.Array) -> bool:
    try:
        column.validate(full=True)
        if _holds(column.type, pa.types.is_temporal):
            column.to_pylist()
    except (ValueError, OverflowError):
        return False
    return True


def holds_bytes(kind: pa.DataType) -> bool:
    """Whether values of the type have bytes that are no text, at any depth."""
    tests = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return _holds(kind, lambda inner: any(is_one(inner) for is_one in tests))


def _holds(kind: pa.DataType, is_one: Callable[[pa.DataType], bool]) -> bool:
    """Whether the type, or one inside it, is such a one."""
    if pa.types.is_dictionary(kind):
        return _holds(kind.value_type, is_one)
    inner = (kind.field(number).type for number in range(kind.num_fields)) if pa.types.is_nested(kind) else ()
    return bool(is_one(kind)) or any(_holds(each, is_one) for each in inner)


def _has_null_fields(array: pa.Array) -> bool:
    """Whether a structure, at any depth, has a field that is null."""
    if pa.types.is_struct(array.type):
        return any(field.null_count or _has_null_fields(field) for field in array.flatten())
    if pa.types.is_map(array.type):
        return _has_null_fields(array.items)
    is_list = pa.types.is_nested(array.type) and not pa.types.is_union(array.type)
    return is_list and _has_null_fields(array.flatten())


def _given(value: Any, kind: pa.DataType) -> Any:
    """A value without the null fields of its structures; entries of lists and maps stay as they are."""
    if value is None:
        return None
    if pa.types.is_struct(kind):
        return {field.name: _given(value[field.name], field.type) for field in kind if value[field.name] is not None}
    if pa.types.is_map(kind):
        return {key: _given(inner, kind.item_type) for key, inner in value.items()}
    if isinstance(value, list):
        return [_given(entry, kind.value_type) for entry in value]
    return value
