"""A tiny random model with a real chat template, and finished splits to train on."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.workspace import Place, Workspace
from pipelines.recipe.schema import Recipe
from tests.pipelines.train.families import CHATML, byte_level_tokenizer


def make_model(folder: Path) -> Path:
    """A Qwen2 of two layers with random weights and a byte-level tokenizer, as a Hugging Face folder."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", CHATML).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's folder."""
    return make_model(tmp_path_factory.mktemp("model"))


def chats(count: int) -> list[dict[str, Any]]:
    """Rows of questions and answers, different from each other, always the same."""
    draw = random.Random(0)
    return [
        {
            "row_id": f"r{number}",
            "pos": number,
            "system": None,
            "query": f"What is {draw.randint(0, 99)} and {draw.randint(0, 99)}?",
            "response": " ".join(draw.choice(("red", "green", "blue", "一", "二")) for _ in range(draw.randint(2, 12))),
        }
        for number in range(count)
    ]


def finished_split(workspace: Workspace, train: list[dict[str, Any]], test: list[dict[str, Any]]) -> Place:
    """A split stage's place as the split leaves it, the training rows in two files."""
    place = Place(workspace, "split", "s")
    half = len(train) // 2
    files = {"train": [train[:half], train[half:]], "test": [test]}
    outputs: dict[str, list[str]] = {}
    for side, parts in files.items():
        for number, rows in enumerate(parts):
            name = f"rows/{number}.{side}.parquet"
            place.local(name).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows), place.local(name))
            outputs.setdefault(side, []).append(name)
    place.finish({"report": {"digest": "d", "outputs": outputs}})
    return place


def train_recipe(model: Path, **train: Any) -> Recipe:
    """A recipe that trains the tiny model on two workers; `train` overrides its section."""
    section = {
        "model": str(model),
        "num_workers": 2,
        "dtype": "float32",
        "max_length": 256,
        "global_batch_size": 4,
        "learning_rate": 1e-2,
        **train,
    }
    tree = {"name": "t", "ingest": {"source": "x"}, "split": {"test_ratio": 0.1}, "train": section, "merge": {}}
    return Recipe.model_validate(json.loads(json.dumps(tree)))


@pytest.fixture(scope="session")
def recipe_of(tiny_model: Path) -> Callable[..., Recipe]:
    """Make a recipe that trains the tiny model; keywords override its train section."""
    return partial(train_recipe, tiny_model)


@pytest.fixture(scope="session")
def split_in() -> Callable[[Path, int], Place]:
    """Make a finished split of some training rows and four test rows in a workspace."""

    def make(workspace: Path, rows: int) -> Place:
        data = chats(rows + 4)
        return finished_split(Workspace(str(workspace)), data[:rows], data[rows:])

    return make


@pytest.fixture
def split_of(split_in: Callable[[Path, int], Place], tmp_path: Path) -> Callable[[int], Place]:
    """Make such a split in a workspace of this test's own."""
    return partial(split_in, tmp_path / "ws")
