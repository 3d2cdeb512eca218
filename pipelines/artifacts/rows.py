"""The records that stages exchange, as Arrow schemas.

A canonical row has the columns of `ROW` that its source provides, then the source's own columns (`upvotes`, …).
`pos` gives the order of the data set: ties, duplicates and output order go by it. `row_id` is for people.
"""

import json
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines.errors import DataError

MESSAGE = pa.struct(
    [
        pa.field("role", pa.string()),  # system, user, assistant or tool
        pa.field("content", pa.string()),
        pa.field("reasoning", pa.string()),  # what an assistant thinks before it answers
        pa.field("loss", pa.bool_()),  # false: context without labels; null: as the role has it
        pa.field("tool_calls", pa.string()),  # JSON, a list in OpenAI's form
        pa.field("tool_call_id", pa.string()),  # in a tool's turn, which call it answers
    ]
)
"""A turn. Rows that were written by earlier versions have role and content alone."""
MESSAGES = pa.list_(MESSAGE)

TOOLS = pa.field("tools", pa.string())
"""JSON, a list in OpenAI's form: a column of data sets in which a row has tools."""

ROW = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("pos", pa.int64(), nullable=False),
        pa.field("system", pa.string()),
        pa.field("query", pa.string()),
        pa.field("response", pa.string()),
        # Only where a row has several turns or a turn says more than text; query and response are then its last pair.
        pa.field("messages", MESSAGES),
    ]
)

DROPPED = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("pos", pa.int64(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("operator", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("stats", pa.map_(pa.string(), pa.float64())),
        pa.field("text", pa.string()),
    ]
)

SPEAKERS = {"system": "system", "query": "user", "response": "assistant"}
"""Columns that stand in `messages` too, where a row has them, and whose turns they are there."""

Turn = dict[str, Any]
"""A turn of `MESSAGE`."""

DIGESTED_ROWS = 4096
"""Rows that are written out at a time to be hashed."""


class RowDigest:
    """A digest over rows that does not depend on how they are cut into files or in which order those are read.

    The sum, modulo 2**128, of a 128-bit hash of each row. A row contains its `pos`, so rows in another order give
    another digest; sums of parts add up, so that workers compute it side by side.
    """

    def __init__(self, value: int = 0, rows: int = 0) -> None:
        self.value = value
        self.rows = rows

    def update(self, table: pa.Table) -> None:
        """Add the rows of `table`; columns count by name, and null values as absent."""
        for begin in range(0, table.num_rows, DIGESTED_ROWS):
            rows = _written_out(table.slice(begin, DIGESTED_ROWS))
            _, offsets, data = rows.buffers()
            ends = memoryview(offsets).cast("q")[rows.offset : rows.offset + len(rows) + 1].tolist()
            view = memoryview(data or b"")
            self.value += sum(xxhash.xxh3_128_intdigest(view[low:high]) for low, high in pairwise(ends))
            self.rows += len(rows)
        self.value %= 1 << 128

    def add(self, hexdigest: str, rows: int) -> None:
        """Add the digest of another part of the same data."""
        self.value = (self.value + int(hexdigest, 16)) % (1 << 128)
        self.rows += rows

    def hexdigest(self) -> str:
        """The digest so far, 32 hexadecimal digits."""
        return f"{self.value:032x}"


def _written_out(table: pa.Table) -> pa.LargeStringArray:
    """Each row as one text: of every value the name of its column, its kind, its length and itself."""
    entries = [_entries(name, table[name].combine_chunks()) for name in sorted(table.column_names)]
    row = pa.repeat(pa.scalar("row", pa.large_string()), table.num_rows)  # Arrow joins nothing but nulls to no row
    return pc.binary_join_element_wise(row, *entries, pa.scalar("\n", pa.large_string()), null_handling="skip")


def _entries(name: str, column: pa.Array) -> pa.Array:
    kind = column.type
    if column.null_count == len(column):
        return pa.nulls(len(column), pa.large_string())
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        label, texts = "text", column.cast(pa.large_string())
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        label, texts = ("bool" if pa.types.is_boolean(kind) else "integer"), column.cast(pa.large_string())
    else:
        label, values = "value", column.to_pylist()
        if kind == MESSAGES:  # the same as of rows whose turns have no fields but role and content
            values = [None if turns is None else [without_nulls(turn) for turn in turns] for turns in values]
        texts = pa.array([None if value is None else repr(value) for value in values], pa.large_string())
    lengths = pc.binary_length(texts).cast(pa.large_string())
    head, space = (pa.scalar(text, pa.large_string()) for text in (f"{name} {label}", " "))
    return pc.binary_join_element_wise(head, lengths, texts, space)


def field_of(table: pa.Table, key: str) -> pa.Array | None:
    """A column, or with dots a field of a nested one; None where the table has none."""
    if key in table.column_names:
        return one_chunk(table[key])
    name, *parts = key.split(".")
    if name not in table.column_names:
        return None
    array = one_chunk(table[name])
    for part in parts:
        if not pa.types.is_struct(array.type) or array.type.get_field_index(part) < 0:
            return None
        array = pc.struct_field(array, part)
    return array


def one_chunk(column: pa.ChunkedArray) -> pa.Array:
    """The column as one array; not copied where it is one already."""
    return column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)


def has_turns(table: pa.Table) -> pa.Array | None:
    """Which rows have several turns in `messages`; None where no row has."""
    if "messages" not in table.column_names or table["messages"].null_count == table.num_rows:
        return None
    return pc.is_valid(one_chunk(table["messages"]))


def turns_of(messages: pa.ListArray, speaker: str) -> tuple[pa.LargeStringArray, npt.NDArray[np.int64]]:
    """All that one speaker says in rows of turns, and how many turns that is in each row."""
    lengths = pc.list_value_length(messages).to_numpy(zero_copy_only=False).astype(np.int64)
    turns = messages.flatten()
    spoken = pc.equal(turns.field("role"), speaker).to_numpy(zero_copy_only=False)
    owners = np.repeat(np.arange(len(messages)), lengths)[spoken]
    per_row = np.bincount(owners, minlength=len(messages)).astype(np.int64)
    contents = pc.fill_null(turns.field("content").filter(pa.array(spoken)), "").cast(pa.large_string())
    return contents, per_row


def joined_turns(turns: pa.LargeStringArray, per_row: npt.NDArray[np.int64]) -> pa.LargeStringArray:
    """One text per row: its turns with newlines between them."""
    offsets = pa.array(np.append(0, np.cumsum(per_row)), pa.int32())
    lists = pa.ListArray.from_arrays(offsets, turns.cast(pa.string()))
    return pc.binary_join(lists, "\n").cast(pa.large_string())


def texts_of(table: pa.Table, name: str) -> pa.LargeStringArray:
    """One text per row: what stands in a column, null where nothing does.

    Of a row with several turns in `messages` it is all that the column's speaker says, with newlines between the turns.
    """
    column = one_chunk(table[name]).cast(pa.large_string())
    several = has_turns(table) if name in SPEAKERS else None
    if several is None:
        return column
    turns, per_row = turns_of(one_chunk(table["messages"]).filter(several), SPEAKERS[name])
    spoken = pc.if_else(pa.array(per_row > 0), joined_turns(turns, per_row), None)
    return pc.replace_with_mask(column, several, spoken)


def turns_said(row: Mapping[str, Any]) -> list[Turn]:
    """The chat of one canonical row with all that its turns say: its `messages`, or system, query and response."""
    turns = row.get("messages")
    if isinstance(turns, list) and turns:
        return [without_nulls(turn) for turn in turns]
    pairs = (("system", row.get("system")), ("user", row.get("query")), ("assistant", row.get("response")))
    return [{"role": role, "content": str(text)} for role, text in pairs if text]


def is_plain_text(row: Mapping[str, Any]) -> bool:
    """Whether one canonical row is a text and no chat: nobody asks, and its response is all that it has."""
    return row.get("query") is None and not row.get("messages") and bool(row.get("response"))


def messages_of(row: Mapping[str, Any]) -> list[dict[str, str]]:
    """The chat of one canonical row as roles and texts, for those who ask a model or read what is said.

    DataError for a conversation with tools, of which that would be a part.
    """
    turns = turns_said(row)
    if row.get("tools") or any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns):
        raise DataError(f"row {row.get('row_id')}: a conversation with tools can be trained, but not asked or judged")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def without_nulls(turn: Mapping[str, Any]) -> Turn:
    """A turn without the fields that say nothing."""
    return {name: value for name, value in turn.items() if value is not None}


def with_same_messages(changed: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A row that was changed from `before`, with `messages` that say the same as its columns.

    What was changed of system, query or response is changed in the messages; where the messages themselves were, they
    decide. DataError where those do not end with a question and its answer.
    """
    turns = changed.get("messages")
    if not turns:
        return changed
    if turns != before.get("messages"):
        said = _columns_of(changed["row_id"], turns)
        for name, value in said.items():
            if changed.get(name) not in (before.get(name), value):
                raise DataError(
                    f"row {changed['row_id']}: {name} and messages are both changed, and differ; change one"
                )
        return {**changed, **said}
    new = {name for name in ("system", "query", "response") if changed.get(name) != before.get(name)}
    head = [turn for turn in turns if turn["role"] == "system"]
    if "system" in new:
        head = [{"role": "system", "content": changed["system"]}] if changed["system"] else []
    talk = [turn for turn in turns if turn["role"] != "system"]
    for column in ("query", "response"):
        last = max((i for i, turn in enumerate(talk) if turn["role"] == SPEAKERS[column]), default=None)
        if column in new and last is not None:
            talk[last] = {**talk[last], "content": changed[column]}
    return {**changed, "messages": [*head, *talk]}


def _columns_of(row_id: str, turns: list[Turn]) -> dict[str, str | None]:
    """What system, query and response are where these are the messages."""
    asked = [turn["content"] for turn in turns if turn["role"] == "user"]
    if turns[-1]["role"] != "assistant" or not asked:
        raise DataError(f"row {row_id}: messages must have a user's turn and end with an assistant's")
    system = turns[0]["content"] if turns[0]["role"] == "system" else None
    return {"system": system, "query": asked[-1], "response": turns[-1]["content"]}


def is_text(value: Any) -> bool:
    """Whether all text in a JSON value can be written; half of a character, a lone surrogate, cannot."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True
