"""Split: which rows are held out for testing.

A row's side follows from a seeded hash of its group, so that the answers to one question, or copies of one answer,
never stand on both sides, and from nothing else: not from the number of rows, shards or workers. Where the first rows
are held out, the rest of their groups goes with them.

signatures   only where near-duplicates are the groups: a signature for each row, by which they are found
groups/      and for each shard the group of each of its rows
test_source/ only where the rows held out have a source of their own: as ingest leaves it
rows         the two sides
"""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines.artifacts.rows import RowDigest
from pipelines.artifacts.shards import Attempt, Commit, Shard, read_tables, run_shards
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.clean.fused import key_names
from pipelines.clean.passes import keys_work
from pipelines.clean.plan import Phase, build_plan
from pipelines.clean.stage import find_near
from pipelines.errors import DataError, InputError, nearest
from pipelines.ingest.stage import determinants as ingested
from pipelines.ingest.stage import ingest_once
from pipelines.ingest.stage import preflight as preflight_source
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.schema import Recipe
from pipelines.recipe.split import Split

VERSION = 3
SIDES = ("train", "test")
NEAR_DUPLICATES = "near_duplicates"
"""The value of split.group that stands for no column."""
NEAR = {
    "tokenization": "character",
    "window_size": 5,
    "ignore_pattern": r"\p{P}",
    "num_blocks": 8,
    "hamming_distance": 6,
}
"""What is nearly the same text, as parameters of document_simhash_deduplicator."""


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section, without what only changes speed, and the seed; where near-duplicates count, in which text; and the
    content of a test source."""
    assert recipe.split
    text = {"text_key": _text_key(recipe)} if recipe.split.group == NEAR_DUPLICATES else {}
    test = {"test_source": ingested(_reading_tests(recipe))} if recipe.split.test_source else {}
    section = recipe.split.model_dump(exclude={"concurrency", "test_source"})
    return {"section": section, "seed": recipe.seed, **text, **test}


def preflight(recipe: Recipe) -> None:
    """InputError where the files of a test source are not there."""
    assert recipe.split
    if recipe.split.test_source:
        try:
            preflight_source(_reading_tests(recipe))
        except InputError as error:
            raise InputError(f"split.test_source: {error}") from None


def split(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Write the rows of the stage before to `train` and `test` files; DataError where a side would be empty."""
    section = recipe.split
    assert section
    (source,) = place.inputs.values()
    shards = _shards(recipe, place, source.outputs("rows"))
    first = _groups_of_first(place.workspace, section, shards) if section.first else None
    work = _divider(place.workspace, section, recipe.seed, first)
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


def _reading_tests(recipe: Recipe) -> Recipe:
    """The recipe with the test source in the place of its own: read the same way, all of it, whatever its schema."""
    assert recipe.split and recipe.split.test_source
    changed = {"source": recipe.split.test_source, "adapter": "auto", "limit": None}
    section = recipe.ingest.model_copy(update=changed) if recipe.ingest else Ingest(source=recipe.split.test_source)
    return recipe.model_copy(update={"ingest": section})


def _shards(recipe: Recipe, place: Place, files: list[str]) -> list[Shard]:
    """A shard for each file, with the `side` of all its rows, or the file with their `groups`, where that is known."""
    section = recipe.split
    assert section
    if section.test_source:
        folder = Place(place.workspace, f"{place.stage}/{place.fingerprint}", "test_source")
        sides = {"train": files, "test": ingest_once(_reading_tests(recipe), folder).outputs("rows")}
        parts = [(side, path) for side, paths in sides.items() for path in paths]
        return [{"index": index, "path": path, "side": side} for index, (side, path) in enumerate(parts)]
    shards = [{"index": index, "path": path} for index, path in enumerate(files)]
    if section.group is None:
        return shards
    if section.group == NEAR_DUPLICATES:
        _check_column(place.workspace, files, _text_key(recipe).split(".")[0])
        return _near_duplicates(place, shards, _text_key(recipe), section.concurrency)
    _check_column(place.workspace, files, section.group)
    return shards


def _text_key(recipe: Recipe) -> str:
    return recipe.clean.text_keys if recipe.clean else "response"


def _check_column(workspace: Workspace, files: list[str], column: str) -> None:
    with workspace.parquet_file(files[0]) as file:
        names = file.schema_arrow.names
        nested = column in names and pa.types.is_nested(file.schema_arrow.field(column).type)
    if column not in names:
        raise DataError(f"split.group {column}: the rows have no such column; {nearest(column, names)}")
    if nested:
        raise DataError(f"split.group {column}: holds lists; name a column of texts or numbers")


def _near_duplicates(place: Place, shards: list[Shard], text_key: str, concurrency: int | None) -> list[Shard]:
    """The shards, each with a file that has the `group` of every row by `pos`: the cluster of its text.

    In memory are a signature and a position for each row, never the rows.
    """
    (phase,) = build_plan([{"document_simhash_deduplicator": NEAR}], "zh", text_key).phases
    work = keys_work(place.workspace, phase, text_key)
    commits = run_shards(place, "signatures", lambda: shards, work, concurrency=concurrency, title="split signatures")
    (step,) = phase.whole
    names = ["pos", *key_names(step)]
    tables = [pa.concat_tables(read_tables(place.workspace, [c["files"]["keys"]], names)) for c in commits]
    groups = _clusters(pa.concat_tables(tables), phase)
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


def _clusters(keys: pa.Table, phase: Phase) -> pa.Array:
    """For each row the lowest signature of its cluster; null for rows without a text, which are one group."""
    (step,) = phase.whole
    assert step.operator.cluster
    key, present = (keys[name].combine_chunks() for name in key_names(step))
    signatures = key.filter(present)
    first = step.operator.cluster(signatures, step.parameters, find_near)
    values = signatures.to_numpy(zero_copy_only=False)
    lowest = values.copy()
    np.minimum.at(lowest, first, values)
    return pc.replace_with_mask(pa.nulls(len(key), pa.uint64()), present, pa.array(lowest[first]))


def _groups_of_first(workspace: Workspace, section: Split, shards: list[Shard]) -> pa.Array:
    """The groups of the first rows, all of whose rows are held out; DataError where there are not as many rows."""
    assert section.first
    left, found = section.first, list[pa.Array]()
    kind, column = ("groups", "group") if section.group == NEAR_DUPLICATES else ("path", section.group or "pos")
    for table in read_tables(workspace, [shard[kind] for shard in shards], [column]):
        values = table[column].slice(0, left)
        found += values.chunks
        left -= len(values)
        if not left:
            return pc.unique(pa.chunked_array(found))
    raise DataError(f"split.first {section.first}: there are only {section.first - left} rows")


def _divider(
    workspace: Workspace, section: Split, seed: int, first: pa.Array | None
) -> Callable[[Shard, Attempt], dict[str, Any]]:
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


def _mask(table: pa.Table, groups: pa.Table | None, section: Split, seed: int, first: pa.Array | None) -> pa.Array:
    if groups is not None:
        column = groups["group"].take(pc.index_in(table["pos"], groups["pos"]))
    else:
        column = table[section.group or "pos"]
    if first is not None:
        return pc.is_in(column, value_set=first)
    assert section.test_ratio is not None
    return pa.array(held_out(column.combine_chunks(), seed, section.test_ratio))


def _report(place: Place, commits: list[Commit]) -> dict[str, Any]:
    digests = {side: RowDigest() for side in SIDES}
    for commit in commits:
        for side, part in commit["result"].items():
            digests[side].add(part["digest"], part["rows"])
    counts = {side: digest.rows for side, digest in digests.items()}
    for side, count in counts.items():
        if not count:
            raise DataError(f"split: no row on the {side} side ({counts}); change split or bring more rows")
    return {
        "summary": f"{counts['train']} rows to train, {counts['test']} to test",
        "digest": "-".join(digest.hexdigest() for digest in digests.values()),
        "rows": counts,
        "outputs": {side: place.relative(c["files"][side] for c in commits if side in c["files"]) for side in SIDES},
    }
