"""The records that stages exchange, as Arrow schemas.

A canonical row has the columns of `ROW` that its source provides, then the source's own columns (`upvotes`, …).
`pos` gives the order of the data set: ties, duplicates and output order go by it. `row_id` is for people.
"""

import pyarrow as pa
import xxhash

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
        names = sorted(table.column_names)
        for batch in table.select(names).to_batches(max_chunksize=4096):
            columns = [batch.column(i).to_pylist() for i in range(batch.num_columns)]
            for values in zip(*columns, strict=True):
                row = repr([pair for pair in zip(names, values, strict=True) if pair[1] is not None])
                self.value += xxhash.xxh3_128_intdigest(row.encode("utf-8", "surrogatepass"))
            self.rows += batch.num_rows
        self.value %= 1 << 128

    def add(self, hexdigest: str, rows: int) -> None:
        """Add the digest of another part of the same data."""
        self.value = (self.value + int(hexdigest, 16)) % (1 << 128)
        self.rows += rows

    def hexdigest(self) -> str:
        """The digest so far, 32 hexadecimal digits."""
        return f"{self.value:032x}"


def messages_of(row: dict[str, object]) -> list[dict[str, str]]:
    """The chat of one canonical row: its `messages`, or system, query and response as turns."""
    turns = row.get("messages")
    if isinstance(turns, list) and turns:
        return [{"role": turn["role"], "content": turn["content"]} for turn in turns]
    pairs = (("system", row.get("system")), ("user", row.get("query")), ("assistant", row.get("response")))
    return [{"role": role, "content": str(text)} for role, text in pairs if text]
