"""Finished splits to train a tiny random model on, which has a real chat template."""

import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.reports.rows import SideFiles, Sides, SplitReport
from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.recipe.schema import Recipe
from pipelines.train.stage import TrainInputs, TrainStage
from tests.model_families import tiny_model
from tests.outputs import finished

__all__ = ["tiny_model"]


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


def finished_split(
    workspace: Workspace, train: list[dict[str, Any]], test: list[dict[str, Any]]
) -> Output[SplitReport]:
    """What a split leaves, the training rows in two files."""
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
    sides, written = Sides(train=len(train), test=len(test)), SideFiles(train=outputs["train"], test=outputs["test"])
    return finished(place, SplitReport(summary="", digest="d", rows=sides, outputs=written))


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


def train_stage(recipe: Recipe) -> TrainStage:
    """The recipe's stage, as the pipeline makes it."""
    assert recipe.train
    return TrainStage(recipe.train, recipe.ingest, recipe.seed)


def problems_of(recipe: Recipe) -> str:
    """What would stop training, for `match`."""
    return "\n".join(f"{problem.key}: {problem.message}" for problem in train_stage(recipe).preflight())


def place_for(split: Output[SplitReport]) -> Place:
    """Where what is trained on the split belongs."""
    return Place(split.folder.workspace, "train", "f")


def train(recipe: Recipe, split: Output[SplitReport]) -> Output[TrainReport]:
    """Train, and finish the place as the pipeline does."""
    return finished(place_for(split), train_stage(recipe).run(place_for(split), TrainInputs(split)))


@pytest.fixture(scope="session")
def recipe_of(tiny_model: Path) -> Callable[..., Recipe]:
    """Make a recipe that trains the tiny model; keywords override its train section."""
    return partial(train_recipe, tiny_model)


@pytest.fixture(scope="session")
def split_in() -> Callable[[Path, int], Output[SplitReport]]:
    """Make a finished split of some training rows and four test rows in a workspace."""

    def make(workspace: Path, rows: int) -> Output[SplitReport]:
        data = chats(rows + 4)
        return finished_split(Workspace(str(workspace)), data[:rows], data[rows:])

    return make


@pytest.fixture
def split_of(
    split_in: Callable[[Path, int], Output[SplitReport]], tmp_path: Path
) -> Callable[[int], Output[SplitReport]]:
    """Make such a split in a workspace of this test's own."""
    return partial(split_in, tmp_path / "ws")
