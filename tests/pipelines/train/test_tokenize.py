import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.stage import Output
from pipelines.errors import DataError, RecipeError
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import Train
from pipelines.train import tokenize as module
from pipelines.train.samples import Samples
from pipelines.train.tokenize import Tokenized, TrainingSource, tokenize
from tests.outputs import rows_of
from tests.pipelines.train.conftest import place_for, problems_of, train_stage

Split = Output[SplitReport]
SplitOf = Callable[[int], Split]


def run(
    split: Split,
    model: Path,
    take: int | None,
    name: str = "t",
    max_length: int = 256,
    overlong: str = "truncate",
) -> Tokenized:
    sources = [TrainingSource(split.paths(split.report.outputs.train), take)]
    section = Train.model_validate({"model": str(model), "max_length": max_length, "overlong": overlong})
    return tokenize(place_for(split), name, model, sources, section, seed=1)


def source_of(recipe: Recipe, split: Split, item: str) -> TrainingSource:
    assert recipe.train
    return module.source_of(recipe.train, recipe.ingest, place_for(split), split, item)


def numbers(data: Tokenized) -> list[int]:
    return np.load(data.index).tolist()


def test_all_rows_become_samples_in_their_order(ray_cluster: None, split_of: SplitOf, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    split = split_of(10)
    data = run(split, tiny_model, None)
    samples = Samples(data)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [tokenizer.decode(samples[number][0]) for number in range(10)]
    rows = rows_of(split, split.report.outputs.train)
    for text, row in zip(texts, rows, strict=True):
        assert text == (
            f"<|im_start|>user\n{row['query']}<|im_end|>\n<|im_start|>assistant\n{row['response']}<|im_end|>\n"
        )
    assert data.counts["samples"] == 10 and data.counts["truncated"] == 0
    assert data.counts["tokens"] == sum(len(samples[number][0]) for number in range(10))
    assert data.counts["loss_tokens"] == sum(
        len(tokenizer.encode(row["response"])) + 1 for row in rows
    )  # and the end of the turn


def test_no_weights_are_sent_with_a_tokenizer(tmp_path: Path) -> None:
    names = {
        "tokenizer.json",
        "chat_template.jinja",
        "qwen.tiktoken",
        "spiece.model",
        "additional_chat_templates/t.jinja",
    }
    weights = {
        "model.safetensors",
        "pytorch_model.bin",
        "model.gguf",
        "original/consolidated.00.pth",
        "onnx/model.onnx",
    }
    for name in names | weights:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    assert module._small_files(tmp_path) == tuple((name, name.encode()) for name in sorted(names))


def test_samples_of_one_row_are_one_piece_of_evidence(tmp_path: Path) -> None:
    commits = [{"result": {"samples_of_row": [2, 0]}}, {"result": {"samples_of_row": [1]}}]
    drawn = [module._Drawn(np.array([4, 5, 9]), np.array([0, 1, 2]))]
    index, owners = module._index(commits, drawn)
    assert index.tolist() == [0, 1, 2] and owners.tolist() == [0, 0, 2]
    assert [len(array) for array in module._index(commits, [module._Drawn(np.arange(0), np.arange(0))])] == [0, 0]
    np.save(tmp_path / module.OWNERS, owners)
    data = Tokenized([], str(tmp_path / "index.npy"), 3, {})
    assert module.mean_by_row(data, [1.0, 4.0, 7.0], [10, 20, 5]) == ([3.0, 7.0], [30.0, 5.0])


def test_fewer_rows_are_drawn_and_more_are_repeated(ray_cluster: None, split_of: SplitOf, tiny_model: Path) -> None:
    split = split_of(10)
    few = run(split, tiny_model, 4, "few")
    assert few.counts["samples"] == 4 and numbers(few) == [0, 1, 2, 3]
    many = run(split, tiny_model, 23, "many")
    assert many.counts["samples"] == 10
    assert np.bincount(numbers(many)).tolist().count(3) == 3 and len(numbers(many)) == 23
    assert numbers(run(split, tiny_model, 23, "again")) == numbers(many)


def test_long_samples_are_cut_and_those_without_an_answer_left_out(
    ray_cluster: None, split_of: SplitOf, tiny_model: Path
) -> None:
    split = split_of(10)
    whole = Samples(run(split, tiny_model, None, "whole"))
    prompts = [int(np.argmax(labels != -100)) for _, labels in (whole[number] for number in range(10))]
    limit = sorted(prompts)[5] + 1  # the shorter half keeps its first token of answer
    data = run(split, tiny_model, None, "cut", max_length=limit)
    left = [number for number, prompt in enumerate(prompts) if prompt < limit]
    assert numbers(data) == list(range(len(left)))
    assert data.counts["left_out"] == 10 - len(left) and data.counts["samples"] == len(left)
    assert data.counts["truncated"] == data.counts["rows"] == 10
    for number, row in enumerate(left):
        assert [array.tolist() for array in Samples(data)[number]] == [array[:limit].tolist() for array in whole[row]]
    with pytest.raises(DataError, match=r"none of 10 rows has an answer within train.max_length 3"):
        run(split, tiny_model, None, "nothing", max_length=3)


def test_what_is_tokenized_already_is_not_done_again(ray_cluster: None, split_of: SplitOf, tiny_model: Path) -> None:
    split = split_of(6)
    first = run(split, tiny_model, None)
    times = {
        path: Path(path).stat().st_mtime_ns
        for shard in first.shards
        for path in map(str, shard.values())
        if path.endswith(".npy")
    }
    assert run(split, tiny_model, None) == first
    assert {path: Path(path).stat().st_mtime_ns for path in times} == times


def test_long_rows_are_dropped_or_split_where_the_recipe_says_so(
    ray_cluster: None, split_of: SplitOf, tiny_model: Path
) -> None:
    split = split_of(10)
    whole = Samples(run(split, tiny_model, None, "whole"))
    lengths = whole.lengths.tolist()
    limit = sorted(lengths)[4]
    dropped = run(split, tiny_model, None, "dropped", max_length=limit, overlong="drop")
    assert Samples(dropped).lengths.tolist() == [length for length in lengths if length <= limit]
    pieced = run(split, tiny_model, 25, "split", max_length=limit, overlong="split")
    labels = [array.tolist() for _, array in (whole[number] for number in range(10))]
    pieces = [[row[at : at + limit] for at in range(0, len(row), limit)] for row in labels]
    kept = [[piece for piece in row if any(label != -100 for label in piece[1:])] for row in pieces]
    opened = Samples(pieced)
    drawn = [opened[number][1].tolist() for number in range(len(opened))]
    assert drawn[: sum(map(len, kept))] == [piece for row in kept for piece in row]
    assert pieced.counts["samples"] == sum(map(len, kept)) and len(opened) > 2 * pieced.counts["samples"]


def test_a_file_is_ingested_once_and_mixed_in(
    ray_cluster: None, split_of: SplitOf, tiny_model: Path, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    split = split_of(6)
    file = tmp_path / "more.jsonl"
    rows = [{"instruction": f"say {number}", "input": "", "output": f"it is {number}"} for number in range(5)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    items = ["train", f"{file}#7"]
    recipe = recipe_of(data=items)
    sources = [source_of(recipe, split, item) for item in items]
    data = tokenize(place_for(split), "t", tiny_model, sources, Train(model="x", max_length=256), seed=1)
    assert len(numbers(data)) == 6 + 7 and data.counts["rows"] == 6 + 5
    times = [Path(path).stat().st_mtime_ns for path in sources[1].files]
    assert source_of(recipe, split, items[1]) == sources[1]
    assert [Path(path).stat().st_mtime_ns for path in sources[1].files] == times
    before = train_stage(recipe).fingerprint_inputs()
    file.write_text(file.read_text().replace("it is 3", "it is three"))
    assert train_stage(recipe).fingerprint_inputs() != before


def test_a_source_of_its_own_settings_is_mixed_in(
    ray_cluster: None, split_of: SplitOf, tiny_model: Path, recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    split = split_of(6)
    file = tmp_path / "自我认知.csv"
    file.write_bytes("query,response\n你是谁？,我是{{NAME}}。\n".encode("gb18030"))
    settings = {"source": str(file), "encoding": "gb18030", "replace": {"{{NAME}}": "爱莉"}}
    recipe = recipe_of(data=["train", "who#2"], sources={"who": settings})
    sources = [source_of(recipe, split, item) for item in ("train", "who#2")]
    (row,) = pq.read_table(sources[1].files[0]).to_pylist()
    assert (row["query"], row["response"], sources[1].take) == ("你是谁？", "我是爱莉。", 2)
    data = tokenize(place_for(split), "t", tiny_model, sources, Train(model="x", max_length=256), seed=1)
    assert len(numbers(data)) == 6 + 2
    other = recipe_of(data=["train", "who#2"], sources={"who": {**settings, "replace": {"{{NAME}}": "小炉"}}})
    assert train_stage(other).fingerprint_inputs() != train_stage(recipe).fingerprint_inputs()


def test_a_file_that_is_not_there_is_said_before_anything_runs(recipe_of: Callable[..., Recipe]) -> None:
    told = problems_of(recipe_of(data=["train", "missing.jsonl#5"]))
    assert told.startswith("train.data: ingest.source missing.jsonl: no such file")
    told = problems_of(recipe_of(data=["train", "who", "whom"], sources={"who": {"source": "x.jsonl"}}))
    assert "train.data: ingest.source x.jsonl: no such file" in told
    assert "train.data: 'whom' is no side of the split; did you mean 'who'?" in told


def test_data_entries_name_a_side_and_a_number(split_of: SplitOf, recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of()
    split = split_of(6)
    assert source_of(recipe, split, "test#2") == TrainingSource(split.paths(split.report.outputs.test), 2)
    with pytest.raises(RecipeError, match=r"train.data.*did you mean 'train'"):
        source_of(recipe, split, "trian#4")
