from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.errors import DataError, RecipeError
from pipelines.train.samples import Samples
from pipelines.train.tokenize import Source, Tokenized, parse_data, split_source, tokenize
from pipelines.workspace import Place

SplitOf = Callable[[int], Place]


def stage(split: Place) -> Place:
    return Place(split.workspace, "train", "f", {"split": split})


def run(place: Place, model: Path, take: int | None, name: str = "t", max_length: int = 256) -> Tokenized:
    sources = [Source(place.inputs["split"].outputs("train"), take)]
    return tokenize(place, name, model, sources, max_length=max_length, system=None, seed=1)


def read_rows(place: Place) -> list[dict[str, Any]]:
    return [row for path in place.inputs["split"].outputs("train") for row in pq.read_table(path).to_pylist()]


def numbers(data: Tokenized) -> list[int]:
    return np.load(data.index).tolist()


def test_all_rows_become_samples_in_their_order(ray_cluster: None, split_of: SplitOf, tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    place = stage(split_of(10))
    data = run(place, tiny_model, None)
    samples = Samples(data)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = [tokenizer.decode(samples[number][0]) for number in range(10)]
    rows = read_rows(place)
    for text, row in zip(texts, rows, strict=True):
        assert text == (
            f"<|im_start|>user\n{row['query']}<|im_end|>\n<|im_start|>assistant\n{row['response']}<|im_end|>\n"
        )
    assert data.counts["samples"] == 10 and data.counts["truncated"] == 0
    assert data.counts["tokens"] == sum(len(samples[number][0]) for number in range(10))
    assert data.counts["loss_tokens"] == sum(
        len(tokenizer.encode(row["response"])) + 1 for row in rows
    )  # and the end of the turn


def test_fewer_rows_are_drawn_and_more_are_repeated(ray_cluster: None, split_of: SplitOf, tiny_model: Path) -> None:
    place = stage(split_of(10))
    few = run(place, tiny_model, 4, "few")
    assert few.counts["samples"] == 4 and numbers(few) == [0, 1, 2, 3]
    many = run(place, tiny_model, 23, "many")
    assert many.counts["samples"] == 10
    assert np.bincount(numbers(many)).tolist().count(3) == 3 and len(numbers(many)) == 23
    assert numbers(run(place, tiny_model, 23, "again")) == numbers(many)


def test_long_samples_are_cut_and_those_without_an_answer_left_out(
    ray_cluster: None, split_of: SplitOf, tiny_model: Path
) -> None:
    place = stage(split_of(10))
    whole = Samples(run(place, tiny_model, None, "whole"))
    prompts = [int(np.argmax(labels != -100)) for _, labels in (whole[number] for number in range(10))]
    limit = sorted(prompts)[5] + 1  # the shorter half keeps its first token of answer
    data = run(place, tiny_model, None, "cut", max_length=limit)
    left = [number for number, prompt in enumerate(prompts) if prompt < limit]
    assert numbers(data) == left
    assert data.counts["without_loss"] == 10 - len(left)
    assert data.counts["truncated"] == 10
    assert all(len(tokens) == limit for tokens, _ in (Samples(data)[number] for number in range(len(left))))
    with pytest.raises(DataError, match=r"none of 10 samples has an answer within train.max_length 3"):
        run(place, tiny_model, None, "nothing", max_length=3)


def test_what_is_tokenized_already_is_not_done_again(ray_cluster: None, split_of: SplitOf, tiny_model: Path) -> None:
    place = stage(split_of(6))
    first = run(place, tiny_model, None)
    times = {
        path: Path(path).stat().st_mtime_ns
        for shard in first.shards
        for path in map(str, shard.values())
        if path.endswith(".npy")
    }
    assert run(place, tiny_model, None) == first
    assert {path: Path(path).stat().st_mtime_ns for path in times} == times


def test_data_entries_name_a_side_and_a_number(split_of: SplitOf) -> None:
    assert parse_data("train") == ("train", None)
    assert parse_data("train#4000") == ("train", 4000)
    place = stage(split_of(6))
    assert split_source(place, "test#2") == Source(place.inputs["split"].outputs("test"), 2)
    with pytest.raises(RecipeError, match=r"train.data.*did you mean 'train'"):
        split_source(place, "trian#4")
    with pytest.raises(RecipeError, match="ROWS above 0"):
        parse_data("train#0")
