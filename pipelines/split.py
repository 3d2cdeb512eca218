"""Split: which rows are held out for testing.

A row's side follows from a seeded hash of its group, so that the answers to one question, or copies of one answer,
never stand on both sides, and from nothing else: not from the number of rows, shards or workers. Where the first rows
are held out, the rest of their groups goes with them.

simhash      only where near-duplicates are the groups: a signature for each row, by which they are found
groups/      and for each shard the group of each of its rows
test_source/ only where the rows held out have a source of their own: as ingest leaves it
rows         the two sides
"""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines.artifacts.reports.rows import RowsReport, SideFiles, Sides, SplitReport
from pipelines.artifacts.rows import RowDigest, one_chunk, texts_of
from pipelines.artifacts.shards import Attempt, Commit, Shard, Work, read_tables, run_shards
from pipelines.artifacts.stage import Inputs, Output, Stage
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import DataError, InputError, Problem, nearest
from pipelines.recipe.ingest import Ingest, Source
from pipelines.recipe.split import Split
from pipelines.similarity.hamming import Signatures, first_of_near
from pipelines.similarity.on_ray import find_near
from pipelines.similarity.simhash import simhash
from pipelines.sources.read import VERSION, check_source, read_once, source_fingerprint

SIDES = ("train", "test")
NEAR_DUPLICATES = "near_duplicates"
"""The value of split.group that stands for no column."""
HAMMING_DISTANCE = 6
"""Bits in which the signatures of nearly the same text differ at most; the shingles are of five characters."""
SIGNED = pa.schema([pa.field("pos", pa.int64(), False), pa.field("signature", pa.uint64(), False)])
"""A row's signature."""


@dataclass(frozen=True)
class SplitInputs(Inputs):
    """The rows to divide."""

    rows: Output[RowsReport]


@dataclass(frozen=True)
class SplitStage(Stage[SplitInputs, SplitReport]):
    """The rows in two: those to train on, and those held out."""

    section: Split
    ingest: Ingest | None
    """How the rows were read, and so how a test source is read."""
    text_key: str
    """The column whose near-duplicates are one group."""
    seed: int

    name: ClassVar[str] = "split"
    version: ClassVar[int] = 3

    @property
    def reports(self) -> type[SplitReport]:
        """The class of its report."""
        return SplitReport

    def fingerprint_inputs(self) -> Mapping[str, Any]:
        """The section, without what only changes speed, and the seed; where near-duplicates count, in which text; the
        content of a test source; and, since earlier versions joined them, that rows without a group stand alone."""
        test_source = _test_source(self.section, self.ingest)
        text = {"text_key": self.text_key} if self.section.group == NEAR_DUPLICATES else {}
        test = {"test_source": source_fingerprint(test_source), "reading": VERSION} if test_source else {}
        section = self.section.model_dump(exclude={"concurrency", "test_source"})
        alone = {"without_group": "alone"} if self.section.group not in (None, NEAR_DUPLICATES) else {}
        return {"section": section, "seed": self.seed, **text, **test, **alone}

    def preflight(self) -> list[Problem]:
        """Whether the files of a test source are there."""
        test_source = _test_source(self.section, self.ingest)
        if test_source:
            try:
                check_source(test_source)
            except InputError as error:
                return [Problem("", f"split.test_source: {error}")]
        return []

    def run(self, place: Place, inputs: SplitInputs) -> SplitReport:
        """Write the rows to `train` and `test` files; DataError where a side would be empty."""
        files = inputs.rows.paths(inputs.rows.report.outputs.rows)
        shards = self._shards(place, files)
        section, workspace = self.section, place.workspace
        first = _groups_of_first(workspace, section.group, section.first, shards) if section.first else None
        work = _divide(workspace, section, self.seed, first)
        commits = run_shards(place, "rows", lambda: shards, work, concurrency=section.concurrency, title="split")
        return _report(place, commits, inputs.rows)

    def _shards(self, place: Place, files: list[str]) -> list[Shard]:
        """A shard for each file, with the `side` of all its rows or the file of their `groups`, where that is known."""
        test_source = _test_source(self.section, self.ingest)
        if test_source:
            test = read_once(test_source, place.within("test_source"))
            sides = {"train": files, "test": test.paths(test.report.outputs.rows)}
            parts = [(side, path) for side, paths in sides.items() for path in paths]
            return [{"index": index, "path": path, "side": side} for index, (side, path) in enumerate(parts)]
        shards = [{"index": index, "path": path} for index, path in enumerate(files)]
        group = self.section.group
        if group == NEAR_DUPLICATES:
            _check_column(place.workspace, files, self.text_key.split(".")[0])
            return _with_groups(place, shards, self.text_key, self.section.concurrency)
        if group is not None:
            _check_column(place.workspace, files, group)
        return shards


def held_out(groups: pa.Array, seed: int, test_ratio: float) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which rows are held out: those whose group's hash, as a number in [0, 1), is below `test_ratio`."""
    encoded = groups.dictionary_encode(null_encoding="encode")
    hashes = [
        xxhash.xxh3_64_intdigest(f"{seed}\0{value}".encode("utf-8", "surrogatepass"))
        for value in encoded.dictionary.to_pylist()
    ]
    chosen = np.array([value / 2**64 < test_ratio for value in hashes], dtype=bool)
    mask: np.ndarray[Any, np.dtype[np.bool_]] = chosen[encoded.indices.to_numpy(zero_copy_only=False)]
    return mask


def _test_source(section: Split, ingest: Ingest | None) -> Source | None:
    """How the rows held out are read where they have a source of their own: as the others, all of it, any schema."""
    if not section.test_source:
        return None
    changed = {"source": section.test_source, "adapter": "auto", "limit": None}
    return ingest.model_copy(update=changed) if ingest else Source(source=section.test_source)


def _check_column(workspace: Workspace, files: list[str], column: str) -> None:
    with workspace.parquet_file(files[0]) as file:
        names = file.schema_arrow.names
        nested = column in names and pa.types.is_nested(file.schema_arrow.field(column).type)
    if column not in names:
        raise DataError(f"split.group {column}: the rows have no such column; {nearest(column, names)}")
    if nested:
        raise DataError(f"split.group {column}: holds lists; name a column of texts or numbers")


def _with_groups(place: Place, shards: list[Shard], text_key: str, concurrency: int | None) -> list[Shard]:
    """The shards, each with a file that has the `group` of every row by `pos`: the near-duplicates of its text.

    In memory are a signature and a position for each row, never the rows.
    """
    work = _sign(place.workspace, text_key)
    commits = run_shards(place, "simhash", lambda: shards, work, concurrency=concurrency, title="split signatures")
    tables = []
    for commit in commits:  # a file without rows has no tables
        signed = read_tables(place.workspace, [commit["files"]["signatures"]])
        tables.append(pa.concat_tables([SIGNED.empty_table(), *signed]))
    groups = pa.array(_groups(pa.concat_tables(tables)["signature"].to_numpy()))
    begin = 0
    grouped = []
    for shard, table in zip(shards, tables, strict=True):
        path = place.path("groups", f"{shard['index']:05d}.parquet")
        rows = table.select(["pos"]).append_column("group", groups.slice(begin, table.num_rows))
        with place.workspace.parquet_writer(path, rows.schema) as writer:
            writer.write_table(rows)
        grouped.append({**shard, "groups": path})
        begin += table.num_rows
    return grouped


def _sign(workspace: Workspace, text_key: str) -> Work:
    """The work on one shard: a `signature` for each row, by `pos`; DataError names a row without a text."""
    needed = {"row_id", "pos", "messages", text_key}

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        with workspace.parquet_file(shard["path"]) as file:
            columns = [name for name in file.schema_arrow.names if name in needed]
        with attempt.writer("signatures", SIGNED) as writer:
            for table in read_tables(workspace, [shard["path"]], columns):
                texts = texts_of(table, text_key)
                if texts.null_count:
                    raise _without_text(table, texts, text_key)
                signatures = simhash(
                    texts,
                    tokenization="character",
                    window_size=5,
                    lowercase=True,
                    ignore_pattern=r"\p{P}",
                    short_texts="hash",
                )
                writer.write_table(pa.table([table["pos"], pa.array(signatures)], schema=SIGNED))
        return {}

    return work


def _without_text(table: pa.Table, texts: pa.Array, text_key: str) -> DataError:
    row = pc.index(texts.is_null(), True).as_py()
    name = f"row {table['row_id'][row]} (pos {table['pos'][row]})"
    return DataError(f"split.group {NEAR_DUPLICATES}: {name} has no {text_key}; drop such rows, or name another group")


def _groups(signatures: Signatures) -> Signatures:
    """For each row the lowest signature of its cluster."""
    lowest = signatures.copy()
    first = first_of_near(signatures, HAMMING_DISTANCE, find_near)
    np.minimum.at(lowest, first, signatures)
    return lowest[first]


@dataclass(frozen=True)
class _First:
    """What the first rows hold out: all rows of their groups, and by `pos` those of them that have no group."""

    groups: pa.Array
    alone: pa.Array


def _groups_of_first(workspace: Workspace, group: str | None, count: int, shards: list[Shard]) -> _First:
    """What the first rows hold out; DataError where there are not as many rows."""
    left, found, alone = count, list[pa.Array](), list[pa.Array]()
    kind, column = ("groups", "group") if group == NEAR_DUPLICATES else ("path", group or "pos")
    for table in read_tables(workspace, [shard[kind] for shard in shards], [*{column, "pos"}]):
        rows = table.slice(0, left)
        without = _without_group(rows[column])
        found += rows[column].filter(pc.invert(without)).chunks
        alone += rows["pos"].filter(without).chunks
        left -= rows.num_rows
        if not left:
            kinds = table.schema.field(column).type, pa.int64()
            values = (pa.chunked_array(c, kind) for c, kind in zip((found, alone), kinds, strict=True))
            return _First(*map(pc.unique, values))
    raise DataError(f"split.first {count}: there are only {count - left} rows")


def _divide(workspace: Workspace, section: Split, seed: int, first: _First | None) -> Work:
    """The work on one shard: each row goes to the file of its side."""

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        with workspace.parquet_file(shard["path"]) as file:
            schema = file.schema_arrow
        groups = pa.concat_tables(read_tables(workspace, [shard["groups"]])) if "groups" in shard else None
        digests = {side: RowDigest() for side in SIDES if shard.get("side", side) == side}
        with ExitStack() as stack:
            writers = {side: stack.enter_context(attempt.writer(side, schema)) for side in digests}
            for table in read_tables(workspace, [shard["path"]]):
                if "side" in shard:
                    parts = {shard["side"]: table}
                else:
                    mask = _mask(table, groups, section, seed, first)
                    parts = {"train": table.filter(pc.invert(mask)), "test": table.filter(mask)}
                for side, rows in parts.items():
                    writers[side].write_table(rows)
                    digests[side].update(rows)
        return {side: {"rows": digest.rows, "digest": digest.hexdigest()} for side, digest in digests.items()}

    return work


def _mask(table: pa.Table, groups: pa.Table | None, section: Split, seed: int, first: _First | None) -> pa.Array:
    if groups is not None:
        column = groups["group"].take(pc.index_in(table["pos"], groups["pos"]))
    else:
        column = table[section.group or "pos"]
    without = _without_group(column)
    if first is not None:
        return pc.if_else(without, pc.is_in(table["pos"], first.alone), pc.is_in(column, first.groups))
    ratio = section.test_ratio or 0.0
    groups_of_rows = one_chunk(column) if isinstance(column, pa.ChunkedArray) else column
    mask = pa.array(held_out(groups_of_rows, seed, ratio))
    if not pc.any(without).as_py():
        return mask
    return pc.if_else(without, pa.array(held_out(one_chunk(table["pos"]), seed, ratio)), mask)


def _without_group(column: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """Rows without a group, each of which stands alone: it is null, no number, or as tables in text have it empty."""
    without = pc.is_null(column, nan_is_null=True)
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        without = pc.or_(without, pc.fill_null(pc.equal(column, ""), False))
    return without


def _report(place: Place, commits: list[Commit], rows: Output[RowsReport]) -> SplitReport:
    digests = {side: RowDigest() for side in SIDES}
    for commit in commits:
        for side, part in commit["result"].items():
            digests[side].add(part["digest"], part["rows"])
    counts = {side: digest.rows for side, digest in digests.items()}
    for side, count in counts.items():
        if not count:
            way = "raise test_ratio" if side == "test" else "lower test_ratio or first, or another group"
            raise DataError(
                f"split: no row on the {side} side (of {sum(counts.values())}); change split ({way}), drop fewer rows "
                f"before it, or bring more; {rows.stage}: {rows.report.summary}"
            )
    files = {side: place.relative(c["files"][side] for c in commits if side in c["files"]) for side in SIDES}
    return SplitReport(
        summary=f"{counts['train']} rows to train, {counts['test']} to test",
        digest="-".join(digest.hexdigest() for digest in digests.values()),
        rows=Sides(**counts),
        outputs=SideFiles(**files),
    )
