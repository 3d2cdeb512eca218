"""Split: which rows are held out for testing.

A row's side follows from a seeded hash of its group, so that the answers to one question never stand on both
sides, and from nothing else: not from the number of rows, shards or workers.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines.errors import DataError, nearest
from pipelines.recipe import Recipe, Split
from pipelines.records import RowDigest
from pipelines.shards import Attempt, Commit, Shard, read_tables, run_shards
from pipelines.workspace import Place, Workspace

VERSION = 2
SIDES = ("train", "test")


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section, without what only changes speed, and the seed."""
    assert recipe.split
    return {"section": recipe.split.model_dump(exclude={"concurrency"}), "seed": recipe.seed}


def split(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Write the rows of the stage before to `train` and `test` files; DataError where a side would be empty."""
    section = recipe.split
    assert section
    (source,) = place.inputs.values()
    files = source.outputs("rows")
    _check_group(place.workspace, files, section)
    end = _end_of_first(place.workspace, files, section.first) if section.first else None
    work = _divider(place.workspace, section, recipe.seed, end)
    shards = [{"index": index, "path": path} for index, path in enumerate(files)]
    commits = run_shards(place, "rows", lambda: shards, work, concurrency=section.concurrency, title="split")
    return _report(place, commits)


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


def _check_group(workspace: Workspace, files: list[str], section: Split) -> None:
    with workspace.parquet_file(files[0]) as file:
        names = file.schema_arrow.names
    if section.group is not None and section.group not in names:
        raise DataError(f"split.group {section.group}: the rows have no such column; {nearest(section.group, names)}")


def _end_of_first(workspace: Workspace, files: list[str], first: int) -> int:
    """The position behind the first `first` rows."""
    seen = 0
    for table in read_tables(workspace, files, ["pos"]):
        if seen + table.num_rows >= first:
            return int(table["pos"][first - seen - 1].as_py()) + 1
        seen += table.num_rows
    raise DataError(f"split.first {first}: there are only {seen} rows")


def _divider(
    workspace: Workspace, section: Split, seed: int, end: int | None
) -> Callable[[Shard, Attempt], dict[str, Any]]:
    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        with workspace.parquet_file(shard["path"]) as file:
            schema = file.schema_arrow
        digests = {side: RowDigest() for side in SIDES}
        with attempt.writer("train", schema) as train, attempt.writer("test", schema) as test:
            for table in read_tables(workspace, [shard["path"]]):
                mask = _mask(table, section, seed, end)
                for writer, side, rows in zip(
                    (train, test), SIDES, (table.filter(pc.invert(mask)), table.filter(mask)), strict=True
                ):
                    writer.write_table(rows)
                    digests[side].update(rows)
        return {side: {"rows": digest.rows, "digest": digest.hexdigest()} for side, digest in digests.items()}

    return work


def _mask(table: pa.Table, section: Split, seed: int, end: int | None) -> pa.Array:
    if end is not None:
        return pc.less(table["pos"], end)
    assert section.test_ratio is not None
    column = table[section.group or "pos"].combine_chunks()
    return pa.array(held_out(column, seed, section.test_ratio))


def _report(place: Place, commits: list[Commit]) -> dict[str, Any]:
    digests = {side: RowDigest() for side in SIDES}
    for commit in commits:
        for side, digest in digests.items():
            digest.add(commit["result"][side]["digest"], commit["result"][side]["rows"])
    counts = {side: digest.rows for side, digest in digests.items()}
    for side, count in counts.items():
        if not count:
            raise DataError(f"split: no row on the {side} side ({counts}); change split.test_ratio or bring more rows")
    return {
        "summary": f"{counts['train']} rows to train, {counts['test']} to test",
        "digest": "-".join(digest.hexdigest() for digest in digests.values()),
        "rows": counts,
        "outputs": {side: place.relative(commit["files"][side] for commit in commits) for side in SIDES},
    }
