"""The texts that operators read and write: a column of a table, or one speaker's turns where rows have several."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.rows import SPEAKERS, field_of, has_turns, joined_turns, one_chunk, turns_of
from pipelines.clean.column import Column, Indices, Mask


@dataclass(frozen=True)
class Texts:
    """The texts of a table's rows; `turns` has one entry per row, or `per_row` of them."""

    turns: Column
    present: Mask
    """Rows that have a text; the others count as empty."""
    per_row: Indices | None = None

    @cached_property
    def joined(self) -> Column:
        """One text per row: its turns with newlines between them."""
        if self.per_row is None:
            return self.turns
        return Column(joined_turns(self.turns.array, self.per_row))

    def row_of_turn(self, turn: int) -> int:
        """The row a turn belongs to."""
        if self.per_row is None:
            return turn
        return int(np.searchsorted(np.cumsum(self.per_row), turn, side="right"))

    def sum_per_row(self, values: Indices) -> Indices:
        """Numbers of texts as numbers of rows."""
        if self.per_row is None:
            return values
        return np.asarray(np.diff(np.append(0, np.cumsum(values))[np.append(0, np.cumsum(self.per_row))]))

    def changed_from(self, before: "Texts") -> Mask:
        """Rows whose text is another than `before`."""
        changed = pc.not_equal(self.turns.array, before.turns.array).to_numpy(zero_copy_only=False)
        if self.per_row is None:
            return np.asarray(changed)
        rows = np.zeros(len(self.per_row), dtype=np.bool_)
        rows[np.repeat(np.arange(len(self.per_row)), self.per_row)[changed]] = True
        return rows

    def filter(self, keep: Mask) -> "Texts":
        """The rows where `keep`."""
        if self.per_row is None:
            return Texts(self.turns.filter(keep), self.present[keep])
        return Texts(self.turns.filter(np.repeat(keep, self.per_row)), self.present[keep], self.per_row[keep])

    def with_turns(self, array: pa.Array) -> "Texts":
        """The same rows with changed texts."""
        return replace(self, turns=Column(array))


def read_texts(table: pa.Table, key: str) -> Texts | None:
    """The texts under a column; None where the table has no such column.

    Under a column of `SPEAKERS`, in a table whose rows all have `messages`, the texts are that speaker's turns.
    """
    if key in SPEAKERS and has_turns(table) is not None:
        turns, per_row = turns_of(one_chunk(table["messages"]), SPEAKERS[key])
        return Texts(Column(turns), per_row > 0, per_row)
    array = field_of(table, key)
    if array is None:
        return None
    present = pc.is_valid(array).to_numpy(zero_copy_only=False)
    if array.null_count:
        array = pc.fill_null(array.cast(pa.string()), "")
    return Texts(Column(array.cast(pa.large_string())), present)


def write_texts(table: pa.Table, key: str, texts: Texts) -> pa.Table:
    """The table with `texts` in the column they were read from; rows without a text stay null."""
    if texts.per_row is not None:
        return _write_turns(table, key, texts)
    array = texts.turns.array
    if not texts.present.all():
        array = pc.if_else(pa.array(texts.present), array, None)
    name, *parts = [key] if key in table.column_names else key.split(".")
    index = table.column_names.index(name)
    column = _with_field(one_chunk(table[name]), parts, array)
    return table.set_column(index, table.schema.field(index), column)


def _with_field(array: pa.Array, parts: list[str], texts: pa.Array) -> pa.Array:
    """The array with `texts` in the field that `parts` lead to; rows where a struct on the way is null stay null."""
    if not parts:
        return texts.cast(array.type)
    name, *rest = parts
    fields = {field.name: pc.struct_field(array, field.name) for field in array.type}
    fields[name] = _with_field(fields[name], rest, texts)
    mask = pc.is_null(array) if array.null_count else None
    return pa.StructArray.from_arrays(list(fields.values()), fields=list(array.type), mask=mask)


def _write_turns(table: pa.Table, key: str, texts: Texts) -> pa.Table:
    """One speaker's turns back into `messages`, and each row's last one into its column."""
    messages = one_chunk(table["messages"])
    turns = messages.flatten()
    spoken = pc.equal(turns.field("role"), SPEAKERS[key])
    spoken = pc.fill_null(spoken, False)
    contents = pc.replace_with_mask(turns.field("content"), spoken, texts.turns.array.cast(pa.string()))
    rebuilt = pa.StructArray.from_arrays([turns.field("role"), contents], fields=list(messages.type.value_type))
    lengths = pc.list_value_length(messages).to_numpy(zero_copy_only=False)
    offsets = pa.array(np.append(0, np.cumsum(lengths)), type=pa.int32())
    index = table.column_names.index("messages")
    table = table.set_column(
        index, table.schema.field(index), pa.ListArray.from_arrays(offsets, rebuilt, type=messages.type)
    )
    index = table.column_names.index(key)
    return table.set_column(index, table.schema.field(index), _last_turns(texts, one_chunk(table[key])))


def _last_turns(texts: Texts, otherwise: pa.Array) -> pa.Array:
    assert texts.per_row is not None
    if not len(texts.turns):
        return otherwise
    last = pa.array(np.maximum(np.cumsum(texts.per_row) - 1, 0))
    return pc.if_else(pa.array(texts.present), texts.turns.array.take(last).cast(pa.string()), otherwise)
