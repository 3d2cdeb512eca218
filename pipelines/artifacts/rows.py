"""The records that stages exchange, as Arrow schemas.

A canonical row has the columns of `ROW` that its source provides, then the source's own columns (`upvotes`, …).
`pos` gives the order of the data set: ties, duplicates and output order go by it. `row_id` is for people.
"""

import json
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines.errors import DataError

MESSAGE = pa.struct([pa.field("role", pa.string()), pa.field("content", pa.string())])
MESSAGES = pa.list_(MESSAGE)

ROW = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("pos", pa.int64(), nullable=False),
        pa.field("system", pa.string()),
        pa.field("query", pa.string()),
        pa.field("response", pa.string()),
        pa.field("messages", MESSAGES),  # only where a row has several turns; then query and response are its last pair
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
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        told, texts = "text", column.cast(pa.large_string())
    elif pa.types.is_integer(kind) or pa.types.is_boolean(kind):
        told, texts = ("bool" if pa.types.is_boolean(kind) else "integer"), column.cast(pa.large_string())
    else:
        values = column.to_pylist()
        told, texts = "value", pa.array([None if value is None else repr(value) for value in values], pa.large_string())
    lengths = pc.binary_length(texts).cast(pa.large_string())
    head, space = (pa.scalar(text, pa.large_string()) for text in (f"{name} {told}", " "))
    return pc.binary_join_element_wise(head, lengths, texts, space)


def messages_of(row: dict[str, object]) -> list[dict[str, str]]:
    """The chat of one canonical row: its `messages`, or system, query and response as turns."""
    turns = row.get("messages")
    if isinstance(turns, list) and turns:
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    pairs = (("system", row.get("system")), ("user", row.get("query")), ("assistant", row.get("response")))
    return [{"role": role, "content": str(text)} for role, text in pairs if text]


def with_same_messages(changed: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """A row that was changed from `before`, with `messages` that say the same as its columns.

    What was changed of system, query or response is changed in the messages; where the messages themselves were, they
    decide. DataError where those do not end with a question and its answer.
    """
    turns = changed.get("messages")
    if not turns:
        return changed
    if turns != before.get("messages"):
        return {**changed, **_columns_of(changed["row_id"], turns)}
    new = {name for name in ("system", "query", "response") if changed.get(name) != before.get(name)}
    head = [turn for turn in turns if turn["role"] == "system"]
    if "system" in new:
        head = [{"role": "system", "content": changed["system"]}] if changed["system"] else []
    *talk, asked, said = (turn for turn in turns if turn["role"] != "system")
    asked = {**asked, "content": changed["query"]} if "query" in new else asked
    said = {**said, "content": changed["response"]} if "response" in new else said
    return {**changed, "messages": [*head, *talk, asked, said]}


def _columns_of(row_id: str, turns: list[dict[str, str]]) -> dict[str, str | None]:
    """What system, query and response are where these are the messages."""
    if [turn["role"] for turn in turns[-2:]] != ["user", "assistant"]:
        raise DataError(f"row {row_id}: messages must end with a user's turn and an assistant's")
    system = turns[0]["content"] if turns[0]["role"] == "system" else None
    return {"system": system, "query": turns[-2]["content"], "response": turns[-1]["content"]}


def is_text(value: Any) -> bool:
    """Whether all text in a JSON value can be written; half of a character, a lone surrogate, cannot."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        return False
    return True
