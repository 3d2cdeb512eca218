"""The texts that operators read and write: a column of a table, or one speaker's turns where rows have several."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.clean.column import Column, Indices, Mask

SPEAKERS = {"system": "system", "query": "user", "response": "assistant"}
"""Columns that stand in `messages` too, where a row has them, and whose turns they are there."""


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
        offsets = pa.array(np.append(0, np.cumsum(self.per_row)), pa.int32())
        turns = pa.ListArray.from_arrays(offsets, self.turns.array.cast(pa.string()))
        return Column(pc.binary_join(turns, "\n").cast(pa.large_string()))

    def row_of_turn(self, turn: int) -> int:
        """The row a turn belongs to."""
        if self.per_row is None:
            return turn
        return int(np.searchsorted(np.cumsum(self.per_row), turn, side="right"))

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


def field_of(table: pa.Table, key: str) -> pa.Array | None:
    """A column, or with dots a field of a nested one; None where the table has none."""
    if key in table.column_names:
        return _one_chunk(table[key])
    name, *parts = key.split(".")
    if name not in table.column_names:
        return None
    array = _one_chunk(table[name])
    for part in parts:
        if not pa.types.is_struct(array.type) or array.type.get_field_index(part) < 0:
            return None
        array = pc.struct_field(array, part)
    return array


def _one_chunk(column: pa.ChunkedArray) -> pa.Array:
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def has_turns(table: pa.Table) -> pa.Array | None:
    """Which rows have several turns in `messages`; None where no row has."""
    if "messages" not in table.column_names or table["messages"].null_count == table.num_rows:
        return None
    return pc.is_valid(_one_chunk(table["messages"]))


def read_texts(table: pa.Table, key: str) -> Texts | None:
    """The texts under a column; None where the table has no such column.

    Under a column of `SPEAKERS`, in a table whose rows all have `messages`, the texts are that speaker's turns.
    """
    if key in SPEAKERS and has_turns(table) is not None:
        return _turns_of(SPEAKERS[key], _one_chunk(table["messages"]))
    array = field_of(table, key)
    if array is None:
        return None
    present = pc.is_valid(array).to_numpy(zero_copy_only=False)
    if array.null_count:
        array = pc.fill_null(array.cast(pa.string()), "")
    return Texts(Column(array.cast(pa.large_string())), present)


def _turns_of(speaker: str, messages: pa.ListArray) -> Texts:
    lengths = pc.list_value_length(messages).to_numpy(zero_copy_only=False).astype(np.int64)
    turns = messages.flatten()
    spoken = pc.equal(turns.field("role"), speaker).to_numpy(zero_copy_only=False)
    owners = np.repeat(np.arange(len(messages)), lengths)[spoken]
    per_row = np.bincount(owners, minlength=len(messages)).astype(np.int64)
    contents = pc.fill_null(turns.field("content").filter(pa.array(spoken)), "").cast(pa.large_string())
    return Texts(Column(contents), per_row > 0, per_row)


def write_texts(table: pa.Table, key: str, texts: Texts) -> pa.Table:
    """The table with `texts` in the column they were read from; rows without a text stay null."""
    if texts.per_row is not None:
        return _write_turns(table, key, texts)
    index = table.column_names.index(key)
    array = texts.turns.array.cast(table.schema.field(index).type)
    if not texts.present.all():
        array = pc.if_else(pa.array(texts.present), array, None)
    return table.set_column(index, table.schema.field(index), array)


def _write_turns(table: pa.Table, key: str, texts: Texts) -> pa.Table:
    """One speaker's turns back into `messages`, and each row's last one into its column."""
    messages = _one_chunk(table["messages"])
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
    return table.set_column(index, table.schema.field(index), _last_turns(texts, _one_chunk(table[key])))


def _last_turns(texts: Texts, otherwise: pa.Array) -> pa.Array:
    assert texts.per_row is not None
    if not len(texts.turns):
        return otherwise
    last = pa.array(np.maximum(np.cumsum(texts.per_row) - 1, 0))
    return pc.if_else(pa.array(texts.present), texts.turns.array.take(last).cast(pa.string()), otherwise)
