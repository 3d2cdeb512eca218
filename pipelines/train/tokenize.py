"""Rows to tokens, once: shards of memory-mapped arrays, and an index that says which samples are trained.

Each shard has `tokens` and `labels`, int32 of the same length, all samples one after another, and `sample_offsets`,
int64 with one entry more than it has samples. Samples are numbered through, over all shards, in the order of the
rows. `index` lists the numbers that are trained: repeated where more rows were asked for than there are.
"""

import io
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.errors import DataError, Problem, RecipeError, nearest
from pipelines.records import messages_of
from pipelines.shards import Attempt, Commit, Shard, run_shards
from pipelines.train.chat import IGNORED, Encoded, control_tokens, encode, with_system
from pipelines.workspace import Place, Workspace

SHARD_ROWS = 4096
KINDS = ("tokens", "labels", "sample_offsets")
COUNTS = ("samples", "truncated", "without_loss", "tokens", "loss_tokens")


@dataclass(frozen=True)
class Source:
    """Rows of one origin: its Parquet files, and how many of its rows to take (None: all, once)."""

    files: list[str]
    take: int | None


@dataclass(frozen=True)
class Tokenized:
    """Where the tokens lie: `shards` with a path per kind and their number of samples, `index` and its length."""

    shards: list[dict[str, Any]]
    index: str
    trained: int
    counts: dict[str, int]


def parse_data(item: str) -> tuple[str, int | None]:
    """`train#4000` as name and number of rows."""
    match = re.fullmatch(r"(.+?)(?:#(\d+))?", item)
    if match is None or match[2] == "0":
        raise RecipeError("the recipe", [Problem("train.data", f"{item!r}: written NAME or NAME#ROWS, ROWS above 0")])
    return match[1], int(match[2]) if match[2] else None


def split_source(place: Place, item: str) -> Source:
    """The rows of one entry of `train.data`: a side of the split, all of it or a number of rows."""
    name, take = parse_data(item)
    sides = place.inputs["split"].report()["outputs"]
    if name not in sides:
        raise RecipeError(
            "the recipe", [Problem("train.data", f"{name!r} is no side of the split; {nearest(name, sides)}")]
        )
    return Source(place.inputs["split"].outputs(name), take)


def tokenize(
    place: Place, name: str, model: Path, sources: Sequence[Source], *, max_length: int, system: str | None, seed: int
) -> Tokenized:
    """Tokenize the sources into shards under `name`, those that are not there yet.

    Samples longer than `max_length` are cut at the end; those in which the cut leaves no answer are left out of
    the index. Both are counted. DataError where nothing is left.
    """
    drawn = [_draw(place.workspace, source, seed, number) for number, source in enumerate(sources)]
    work = _tokenizer(place.workspace, model, max_length, system)
    commits = run_shards(
        place, name, lambda: _plan(place.workspace, sources, drawn), work, concurrency=None, title=name
    )
    counts = {key: sum(commit["result"][key] for commit in commits) for key in COUNTS}
    shards = [{**commit["files"], "samples": commit["result"]["samples"]} for commit in commits]
    index = _index(commits, drawn)
    path = place.path(name, "index.npy")
    place.workspace.write(path, _npy(index))
    if not len(index):
        raise DataError(
            f"{name}: none of {counts['samples']} samples has an answer within train.max_length {max_length} tokens"
        )
    return Tokenized(shards, path, len(index), counts)


@dataclass(frozen=True)
class _Drawn:
    """The distinct rows of a source that are used, ascending, and how they are repeated, by place in `rows`."""

    rows: NDArray[np.int64]
    repeated: NDArray[np.int64]


def _draw(workspace: Workspace, source: Source, seed: int, number: int) -> _Drawn:
    total = sum(_rows_in_groups(workspace, path)[0] for path in source.files)
    if source.take is None or total == 0:
        return _Drawn(np.arange(total), np.arange(total))
    chosen = np.random.default_rng([seed, number]).permutation(total)[: source.take % total]
    if source.take < total:
        return _Drawn(np.sort(chosen), np.arange(source.take))
    return _Drawn(np.arange(total), np.concatenate([*[np.arange(total)] * (source.take // total), np.sort(chosen)]))


def _rows_in_groups(workspace: Workspace, path: str) -> tuple[int, list[int]]:
    """Rows of a Parquet file, and of each of its row groups."""
    with workspace.parquet_file(path) as file:
        groups = [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)]
    return sum(groups), groups


def _plan(workspace: Workspace, sources: Sequence[Source], drawn: Sequence[_Drawn]) -> list[Shard]:
    """Row groups joined to shards of about SHARD_ROWS drawn rows."""
    shards: list[Shard] = []
    filled = SHARD_ROWS
    for source, chosen in zip(sources, drawn, strict=True):
        for path, group, rows in _drawn_of_groups(workspace, source, chosen):
            if filled >= SHARD_ROWS:
                shards.append({"index": len(shards), "parts": []})
                filled = 0
            shards[-1]["parts"].append({"path": path, "group": group, "rows": rows})
            filled += len(rows)
    return shards


def _drawn_of_groups(workspace: Workspace, source: Source, chosen: _Drawn) -> Iterator[tuple[str, int, list[int]]]:
    first = 0
    for path in source.files:
        for group, count in enumerate(_rows_in_groups(workspace, path)[1]):
            low, high = np.searchsorted(chosen.rows, [first, first + count])
            if high > low:
                yield path, group, (chosen.rows[low:high] - first).tolist()
            first += count


def _tokenizer(
    workspace: Workspace, model: Path, max_length: int, system: str | None
) -> Callable[[Shard, Attempt], dict[str, Any]]:
    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        tokenizer, control = load_tokenizer(model)
        encoded: list[Encoded] = []
        for row in _rows(workspace, shard):
            try:
                encoded.append(encode(tokenizer, control, with_system(messages_of(row), system)))
            except DataError as error:
                raise DataError(f"row {row['row_id']}: {error}") from None
        return _write_shard(workspace, attempt, encoded, max_length)

    return work


@lru_cache(maxsize=1)
def load_tokenizer(model: Path) -> tuple[Any, "re.Pattern[str]"]:
    """The tokenizer of a model folder, and the pattern of its control tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer, control_tokens(tokenizer)


def _rows(workspace: Workspace, shard: Shard) -> Iterator[dict[str, Any]]:
    for part in shard["parts"]:
        with workspace.parquet_file(part["path"]) as file:
            names = set(file.schema_arrow.names)
            columns = [name for name in ("row_id", "system", "query", "response", "messages") if name in names]
            yield from file.read_row_group(part["group"], columns=columns).take(part["rows"]).to_pylist()


def _write_shard(workspace: Workspace, attempt: Attempt, encoded: Sequence[Encoded], max_length: int) -> dict[str, Any]:
    kept = [Encoded(sample.tokens[:max_length], sample.labels[:max_length]) for sample in encoded]
    with_loss = [sum(label != IGNORED for label in sample.labels[1:]) for sample in kept]
    arrays: dict[str, NDArray[Any]] = {
        "tokens": np.array([token for sample in kept for token in sample.tokens], dtype=np.int32),
        "labels": np.array([label for sample in kept for label in sample.labels], dtype=np.int32),
        "sample_offsets": np.cumsum([0, *[len(sample.tokens) for sample in kept]], dtype=np.int64),
    }
    for kind in KINDS:
        with workspace.create(attempt.path(kind, "npy")) as stream:
            stream.write(_npy(arrays[kind]))
    empty = [number for number, count in enumerate(with_loss) if count == 0]
    return {
        "samples": len(kept),
        "truncated": sum(len(sample.tokens) > max_length for sample in encoded),
        "without_loss": len(empty),
        "empty": empty,
        "tokens": len(arrays["tokens"]),
        "loss_tokens": sum(with_loss),
    }


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _index(commits: Sequence[Commit], drawn: Sequence[_Drawn]) -> NDArray[np.int64]:
    """The sample numbers that are trained, without the samples that have no loss."""
    first, empty = 0, []
    for commit in commits:
        empty += [first + number for number in commit["result"]["empty"]]
        first += commit["result"]["samples"]
    starts = np.cumsum([0, *[len(source.rows) for source in drawn]])
    index = np.concatenate([start + source.repeated for start, source in zip(starts, drawn, strict=False)])
    trained: NDArray[np.int64] = index[~np.isin(index, np.array(empty, dtype=np.int64))].astype(np.int64)
    return trained
