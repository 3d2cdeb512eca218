"""Training whose workers see no folder of the driver's, only a bucket: what comes of it is what comes of one folder."""

import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Output
from pipelines.artifacts.staging import Staging
from pipelines.artifacts.workspace import Workspace
from pipelines.models.tokenizer import open_tokenizer
from pipelines.recipe.schema import Recipe
from pipelines.train.nodes import PREFIX
from pipelines.train.stage import TrainInputs
from tests.pipelines.train.conftest import place_for, train, train_stage
from tests.pipelines.train.test_stage import is_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 40
SECTION = {"num_train_epochs": 10, "save_steps": 4, "eval_rows": 3, "eval_steps": 20, "save_total_limit": 1}


def copied(split: Output[SplitReport], workspace: Workspace) -> Output[SplitReport]:
    """A finished split in another workspace."""
    at = Path(split.folder.workspace.root)
    for path in filter(Path.is_file, at.rglob("*")):
        workspace.store(path, workspace.path(str(path.relative_to(at))))
    return replace(split, place=replace(split.folder, workspace=workspace))


def spread(recipe: Recipe, split: Output[SplitReport]) -> TrainReport:
    """Train on a bucket, as on a cluster."""
    stage, place = train_stage(recipe), place_for(split)
    with (
        Staging(place.workspace) as staging,
        staging.work(place, TrainInputs(split), stage.on_disk, spread=True) as (own, inputs),
    ):
        return stage.run(own, inputs)


def test_workers_on_disks_of_their_own_leave_what_workers_in_one_folder_leave(
    ray_cluster: None,
    recipe_of: Callable[..., Recipe],
    split_of: Callable[[int], Output[SplitReport]],
    s3_bucket: str,
    tiny_model: Path,
) -> None:
    split, there = split_of(16), Workspace(f"{s3_bucket}/run")
    template = open_tokenizer(tiny_model).chat_template  # so that the workspace has a model of its own
    recipe = recipe_of(**SECTION, chat_template=template)
    straight = train(recipe, split).report
    lost: list[int] = []

    def lose_a_worker() -> None:
        """Once there is a checkpoint to go on from."""
        while not any(path.endswith("/complete.json") for path in there.files(there.path("train/f/checkpoints"))):
            time.sleep(0.1)
        worker = next(process for process in psutil.Process().children(recursive=True) if is_worker(process))
        lost.append(worker.pid)
        worker.kill()

    bucket_split = copied(split, there)
    killer = threading.Thread(target=lose_a_worker, daemon=True)
    killer.start()
    report = spread(recipe, bucket_split)
    assert lost and 0 < report.resumed_at <= STEPS
    assert report.digest == straight.digest
    same = {"step", "loss", "lr", "tokens"}
    losses, undisturbed = ([entry.model_dump(include=same) for entry in one.losses] for one in (report, straight))
    assert losses == undisturbed and report.eval_losses == straight.eval_losses
    names = [path.removeprefix(there.path("train/f/")) for path in there.files(there.path("train/f"))]
    assert {"metrics.jsonl", "loss.png", "adapter/adapter_model.safetensors"} <= set(names)
    assert [name for name in names if name.endswith("complete.json")] == [
        f"checkpoints/checkpoint-{STEPS}/complete.json"
    ]
    assert report.checkpoints == [f"checkpoints/checkpoint-{STEPS}"]
    assert not list(Path(tempfile.gettempdir()).glob(f"{PREFIX}*"))
