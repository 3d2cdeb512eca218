"""The work of each pass over the shards: reads one shard, writes through its attempt, returns what it counted."""

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, Field

from pipelines.artifacts.reports.clean import ChangedRow, EditCounts, OperatorStats
from pipelines.artifacts.rows import DROPPED, RowDigest, field_of
from pipelines.artifacts.shards import Attempt, Commit, Shard, Work, read_tables
from pipelines.artifacts.stage import Record
from pipelines.artifacts.workspace import Workspace
from pipelines.clean.dataset_ops import apply_decisions
from pipelines.clean.fused import SAMPLES, apply
from pipelines.clean.plan import Phase

BATCH_BYTES = 8 << 20
"""Rows are worked on in batches of about this size."""
SORTED_ROWS = 1 << 16
"""Rows per file where they are sorted into a new order."""

Write = Callable[[str, pa.Table], None]


class PassResult(Record):
    """What a pass counted on one shard, as its commit keeps it."""

    model_config = ConfigDict(validate_by_name=True, serialize_by_alias=True)

    rows_in: int = 0
    rows: int = 0
    digest: str | None = None
    """Of the rows kept, where they are the stage's output."""
    operators: list[OperatorStats] = Field(
        default_factory=list, validation_alias="tallies", serialization_alias="tallies"
    )
    samples: list[ChangedRow] = Field(default_factory=list)
    manual_edits: EditCounts = Field(EditCounts(), validation_alias="by_hand", serialization_alias="by_hand")


def result_of(commit: Commit) -> PassResult:
    """What was counted on a finished shard."""
    return PassResult.model_validate(commit["result"])


def rows_work(workspace: Workspace, phase: Phase, text_key: str, final: bool) -> Work:
    """Carry out the decisions before a phase, and run its operators; the final pass also digests the rows it keeps."""

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        totals = _Totals(digested=final)
        with ExitStack() as stack:
            write = shard_writer(attempt, stack)
            for table, gone in _decided_batches(workspace, shard, text_key):
                outcome = apply(phase.row_ops, table, text_key, phase.dataset_ops)
                write("rows", outcome.kept)
                write("dropped", pa.concat_tables([gone, outcome.dropped]).sort_by("pos"))
                if phase.row_ops:
                    write("stats", outcome.stats)
                if phase.dataset_ops:
                    write("keys", outcome.keys)
                totals.add(table.num_rows + gone.num_rows, outcome.kept, outcome.operators, outcome.samples)
        return totals.result()

    return work


def keys_work(workspace: Workspace, phase: Phase, text_key: str) -> Work:
    """Only the keys of a phase without operators over single rows, from the columns they are made of; the rows stay
    where they are."""
    keys = [key for step in phase.dataset_ops for key in (step.column, step.question_key) if key]
    needed = {"row_id", "pos", "messages", *(key.split(".")[0] for key in keys)}

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        totals = _Totals(digested=False)
        with ExitStack() as stack:
            write = shard_writer(attempt, stack)
            for table in row_batches(workspace, shard["path"], needed):
                outcome = apply((), table, text_key, phase.dataset_ops)
                write("keys", outcome.keys)
                totals.add(table.num_rows, outcome.kept, outcome.operators, [])
        return totals.result()

    return work


def bucket_work(workspace: Workspace, text_key: str) -> Work:
    """Carry out decisions that change the order: each row goes to the file of its range of new positions."""

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        with ExitStack() as stack:
            write = shard_writer(attempt, stack)
            for table, gone in _decided_batches(workspace, shard, text_key):
                write("dropped", gone)
                bucket = table["pos"].to_numpy() // SORTED_ROWS
                write(_bucket_name(0), table.slice(0, 0))  # so that there is a file where no row is left
                for number in np.unique(bucket):
                    write(_bucket_name(number), table.filter(pa.array(bucket == number)))
        return PassResult().model_dump(mode="json")

    return work


def _bucket_name(number: int) -> str:
    return f"bucket-{number:06d}"


def bucket_number(kind: str) -> int | None:
    """The number of the bucket that files of this kind belong to; None where they belong to none."""
    prefix, _, number = kind.partition("-")
    return int(number) if prefix == "bucket" else None


def sort_work(workspace: Workspace, text_key: str) -> Work:
    """Put the rows of one range of positions in order, after the decisions on them where there are any left."""

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        tables = []
        with ExitStack() as stack:
            write = shard_writer(attempt, stack)
            for part in shard["parts"]:
                for kept, gone in _decided_batches(workspace, part, text_key):
                    write("dropped", gone)
                    tables.append(kept)
            table = pa.concat_tables(tables).sort_by("pos")
            write("rows", table)
        totals = _Totals(digested=True)
        totals.add(table.num_rows, table, [], [])
        return totals.result()

    return work


class _Totals:
    """What one attempt at a shard has counted so far."""

    def __init__(self, digested: bool) -> None:
        self.rows_in = self.rows = 0
        self.digest = RowDigest() if digested else None
        self.operators: list[OperatorStats] = []
        self.samples: dict[int, list[ChangedRow]] = {}

    def add(self, rows_in: int, kept: pa.Table, operators: list[OperatorStats], samples: list[ChangedRow]) -> None:
        self.rows_in += rows_in
        self.rows += kept.num_rows
        if self.digest:
            self.digest.update(kept)
        if self.operators:
            self.operators = [a + b for a, b in zip(self.operators, operators, strict=True)]
        else:
            self.operators = operators
        for sample in samples:
            self.samples.setdefault(sample.index, []).append(sample)

    def result(self) -> dict[str, Any]:
        result = PassResult(
            rows_in=self.rows_in,
            rows=self.rows,
            digest=self.digest.hexdigest() if self.digest else None,
            operators=self.operators,
            samples=[sample for samples in self.samples.values() for sample in samples[:SAMPLES]],
        )
        return result.model_dump(mode="json")


def shard_writer(attempt: Attempt, stack: ExitStack) -> Write:
    """Writes tables to the attempt's files by kind, each opened with the schema of its first table."""
    writers: dict[str, pq.ParquetWriter] = {}

    def write(kind: str, table: pa.Table) -> None:
        if kind not in writers:
            writers[kind] = stack.enter_context(attempt.writer(kind, table.schema))
        writers[kind].write_table(table)

    return write


def _decided_batches(workspace: Workspace, shard: Shard, text_key: str) -> Iterator[tuple[pa.Table, pa.Table]]:
    """The shard's rows in batches, after the decisions on them: those that stay, and those that go."""
    if "decisions" not in shard:
        for table in row_batches(workspace, shard["path"]):
            yield table, DROPPED.empty_table()
        return
    decisions = pa.concat_tables(read_tables(workspace, [shard["decisions"]]))
    for table in row_batches(workspace, shard["path"]):
        yield apply_decisions(table, decisions, field_of(table, text_key))


def row_batches(workspace: Workspace, path: str, needed: Collection[str] | None = None) -> Iterator[pa.Table]:
    """The rows of a file in order, in tables of about `BATCH_BYTES`; an empty one where there are none.

    With `needed`, only those of its columns.
    """
    with workspace.parquet_file(path) as file:
        schema, rows = file.schema_arrow, int(file.metadata.num_rows)
    columns = [name for name in schema.names if needed is None or name in needed]
    pending: list[pa.Table] = []
    for table in read_tables(workspace, [path], columns):
        pending.append(table)
        if sum(part.nbytes for part in pending) >= BATCH_BYTES:
            yield pa.concat_tables(pending).combine_chunks()
            pending = []
    if pending or not rows:
        empty = pa.schema([schema.field(name) for name in columns]).empty_table()
        yield pa.concat_tables([empty, *pending]).combine_chunks()
