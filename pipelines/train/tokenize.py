"""Rows to tokens, once: shards of memory-mapped arrays, and an index that says which samples are trained.

Each shard has `tokens` and `labels`, int32 of the same length, all samples one after another, and `sample_offsets`,
int64 with one entry more than it has samples. Samples are numbered through, over all shards, in the order of the
rows. `index` lists the numbers that are trained: repeated where more rows were asked for than there are. OWNERS has the
row of each of them.
"""

import hashlib
import io
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.rows import ROW, TOOLS, is_plain_text, turns_said
from pipelines.artifacts.shards import Attempt, Commit, Shard, run_shards
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import DataError
from pipelines.models.tokenizer import MORE_TEMPLATES, load_tokenizer
from pipelines.owned_folder import owned_folder
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.train import Train, further_source, parse_data
from pipelines.sources.read import read_once
from pipelines.train.chats import chat_of, require_plain_text
from pipelines.train.ends import embedding_rows, require_embeddings
from pipelines.train.loss_mask import Encoded, encode, encode_text, require_texts
from pipelines.train.truncation import Fitted, TokenLimits, encode_within, loss_tokens, text_within

SHARD_ROWS = 4096
KINDS = ("tokens", "labels", "sample_offsets")
COUNTS = ("rows", "samples", "truncated", "left_out", "tokens", "loss_tokens")

OWNERS = "rows.npy"
"""Beside `index`: the row of each sample that is trained."""


@dataclass(frozen=True)
class TrainingSource:
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


def source_of(
    section: Train, ingest: Ingest | None, place: Place, split: Output[SplitReport], item: str
) -> TrainingSource:
    """The rows of one entry of `train.data`: a side of the split, or a file or hub data set, read once below `place`.

    `ingest`: how the recipe reads its own rows; see `further_source`.
    """
    name, take = parse_data(item)
    further = further_source(section, ingest, name)
    if further is None:
        sides = split.report.outputs
        return TrainingSource(split.paths(sides.train if name == "train" else sides.test), take)
    digest = hashlib.sha256(name.encode()).hexdigest()[:16]
    read = read_once(further, place.within("data", digest))
    return TrainingSource(read.paths(read.report.outputs.rows), take)


def tokenize(
    place: Place,
    name: str,
    model: Path,
    sources: Sequence[TrainingSource],
    section: Train,
    seed: int,
) -> Tokenized:
    """Tokenize the sources into shards under `name`, those that are not there yet.

    A row without a question is plain text; what is trained of the others, the section says. Rows above a limit are
    counted as truncated; truncation.py says what happens to them. Rows that give no sample with an answer are left
    out, and counted. DataError where none does.
    """
    limits = TokenLimits(section.max_length, section.overlong, section.max_input_length, section.max_output_length)
    drawn = [_draw(place.workspace, source, seed, number) for number, source in enumerate(sources)]
    work = _tokenizer(place.workspace, _small_files(model), embedding_rows(model), limits, section)
    commits = run_shards(
        place, name, lambda: _plan(place.workspace, sources, drawn), work, concurrency=None, title=name
    )
    counts = {key: sum(commit["result"][key] for commit in commits) for key in COUNTS}
    shards = [{**commit["files"], "samples": commit["result"]["samples"]} for commit in commits]
    index, owners = _index(commits, drawn)
    path = place.path(name, "index.npy")
    place.workspace.write(path, _npy(index))
    place.workspace.write(place.path(name, OWNERS), _npy(owners))
    if not len(index):
        raise DataError(f"{name}: none of {counts['rows']} rows has an answer within {limits} tokens")
    return Tokenized(shards, path, len(index), counts)


def tokens_here(place: Place, name: str, data: Tokenized) -> Tokenized:
    """Tokens that were made where every node sees them, as they lie in the folder that stands for it on this one."""
    origin = place.workspace.origin
    if origin is None:
        return data
    origin.fetch(place.stage, place.fingerprint, name)

    def here(path: str) -> str:
        return place.path(*place.seen_by_all.relative([path]))

    shards = [{**shard, **{kind: here(shard[kind]) for kind in KINDS}} for shard in data.shards]
    return replace(data, shards=shards, index=here(data.index))


def mean_by_row(data: Tokenized, means: Sequence[float], tokens: Sequence[int]) -> tuple[list[float], list[float]]:
    """Means over the tokens of each sample as means over those of each row that gave samples, and the rows' tokens.

    Samples of one row go together, so that they are not as much evidence as as many rows.
    """
    owners = np.load(Path(data.index).with_name(OWNERS))
    counts = np.bincount(owners, weights=np.asarray(tokens, dtype=np.float64))
    sums = np.bincount(owners, weights=np.asarray(means) * np.asarray(tokens))
    there = counts > 0
    return (sums[there] / counts[there]).tolist(), counts[there].tolist()


@dataclass(frozen=True)
class _Drawn:
    """The distinct rows of a source that are used, ascending, and how they are repeated, by place in `rows`."""

    rows: NDArray[np.int64]
    repeated: NDArray[np.int64]


def _draw(workspace: Workspace, source: TrainingSource, seed: int, number: int) -> _Drawn:
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


def _plan(workspace: Workspace, sources: Sequence[TrainingSource], drawn: Sequence[_Drawn]) -> list[Shard]:
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


def _drawn_of_groups(
    workspace: Workspace, source: TrainingSource, chosen: _Drawn
) -> Iterator[tuple[str, int, list[int]]]:
    first = 0
    for path in source.files:
        for group, count in enumerate(_rows_in_groups(workspace, path)[1]):
            low, high = np.searchsorted(chosen.rows, [first, first + count])
            if high > low:
                yield path, group, (chosen.rows[low:high] - first).tolist()
            first += count


WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".tflite", ".npz")
"""How files with weights end, of this and of other programs."""
Files = tuple[tuple[str, bytes], ...]
"""Names of files with their content."""


def _small_files(model: Path) -> Files:
    """The files of a model but its weights: what its tokenizer is loaded from, on whatever node a shard is done.

    Folders in it are left out, such as `original` with the weights once more, but for that of templates.
    """
    beside = [path for folder in (model, model / MORE_TEMPLATES) if folder.is_dir() for path in folder.iterdir()]
    files = [path for path in sorted(beside) if path.is_file() and path.suffix not in WEIGHTS]
    return tuple((str(path.relative_to(model)), path.read_bytes()) for path in files)


@lru_cache(maxsize=1)
def _loaded(files: Files) -> tuple[Any, "re.Pattern[str]"]:
    """The tokenizer of a model's small files, and the pattern of its control tokens."""
    with owned_folder(tempfile.gettempdir(), "danlu-tokenizer-") as folder:
        for name, content in files:
            path = Path(folder, "model", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        return load_tokenizer(Path(folder, "model"))


def _tokenizer(
    workspace: Workspace, model: Files, rows: int | None, limits: TokenLimits, section: Train
) -> Callable[[Shard, Attempt], dict[str, Any]]:
    """The work on a shard, with the small files of a model that has embeddings for so many tokens."""

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        tokenizer, control = _loaded(model)
        fitted: list[Fitted] = []
        for row in _rows(workspace, shard):
            try:
                if is_plain_text(row) or section.objective == "pretrain":
                    require_plain_text(section, row)
                    fitted.append(text_within(limits, encode_text(tokenizer, control, row["response"])))
                else:
                    messages = chat_of(section, turns_said(row))
                    require_texts(messages)
                    mask_empty = section.thinking == "mask_empty"
                    encoder = partial(encode, tokenizer, control, tools=row.get("tools"), mask_empty=mask_empty)
                    fitted.append(encode_within(limits, encoder, tokenizer, messages))
                require_embeddings(tokenizer, fitted[-1].samples, rows)
            except DataError as error:
                raise DataError(f"row {row['row_id']}: {error}") from None
        _write_shard(workspace, attempt, [row.samples for row in fitted])
        return _count(fitted)

    return work


def _rows(workspace: Workspace, shard: Shard) -> Iterator[dict[str, Any]]:
    for part in shard["parts"]:
        with workspace.parquet_file(part["path"]) as file:
            names = set(file.schema_arrow.names)
            columns = [name for name in (*ROW.names, TOOLS.name) if name in names]
            yield from file.read_row_group(part["group"], columns=columns).take(part["rows"]).to_pylist()


def _write_shard(workspace: Workspace, attempt: Attempt, cut: Sequence[list[Encoded]]) -> None:
    """Write the samples of all rows, one after another."""
    samples = [sample for row in cut for sample in row]
    arrays: dict[str, NDArray[Any]] = {
        "tokens": np.array([token for sample in samples for token in sample.tokens], dtype=np.int32),
        "labels": np.array([label for sample in samples for label in sample.labels], dtype=np.int32),
        "sample_offsets": np.cumsum([0, *[len(sample.tokens) for sample in samples]], dtype=np.int64),
    }
    for kind in KINDS:
        with workspace.create(attempt.path(kind, "npy")) as stream:
            stream.write(_npy(arrays[kind]))


def _count(fitted: Sequence[Fitted]) -> dict[str, Any]:
    """What became of a shard's rows: counts, and `samples_of_row`, how many samples each row gave."""
    samples = [sample for row in fitted for sample in row.samples]
    return {
        "rows": len(fitted),
        "samples": len(samples),
        "truncated": sum(row.too_long for row in fitted),
        "left_out": sum(not row.samples for row in fitted),
        "tokens": sum(len(sample.tokens) for sample in samples),
        "loss_tokens": sum(map(loss_tokens, samples)),
        "samples_of_row": [len(row.samples) for row in fitted],
    }


def _npy(array: NDArray[Any]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=False)
    return stream.getvalue()


def _index(commits: Sequence[Commit], drawn: Sequence[_Drawn]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The numbers of the samples that are trained, source after source, each row's as often as it is repeated; and of
    each of them its row, by its place among those that are drawn."""
    samples_of_row = np.array([count for commit in commits for count in commit["result"]["samples_of_row"]])
    first_of_row = np.cumsum([0, *samples_of_row])
    row_of_source = np.cumsum([0, *[len(source.rows) for source in drawn]])
    rows = np.concatenate([begin + source.repeated for begin, source in zip(row_of_source, drawn, strict=False)])
    numbers = [np.arange(first_of_row[row], first_of_row[row + 1]) for row in rows]
    owners = np.repeat(rows, np.array([len(some) for some in numbers], dtype=np.int64)).astype(np.int64)
    return np.concatenate([np.empty(0, dtype=np.int64), *numbers]), owners
