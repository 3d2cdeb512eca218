"""Training whose workers see no folder of the driver's, only a bucket: what comes of it is what comes of one folder."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Workspace
from pipelines.models.tokenizer import open_tokenizer
from pipelines.recipe.schema import Recipe
from pipelines.train.nodes import PREFIX
from tests.pipelines.train.conftest import train
from tests.pipelines.train.test_stage import is_worker

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

STEPS = 80
SECTION = {"num_train_epochs": 20, "save_steps": 4, "eval_rows": 3, "eval_steps": 40, "save_total_limit": 1}
DRIVER = """
import sys
from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.stage import Output, read_manifest
from pipelines.artifacts.staging import Staging
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.recipe.schema import Recipe
from pipelines.train.stage import TrainInputs, TrainStage
from rayjobs.cluster import Cluster

workspace, recipe = Workspace(sys.argv[1]), Recipe.model_validate_json(sys.argv[2])
split, place = Place(workspace, "split", "s"), Place(workspace, "train", "f")
inputs = TrainInputs(Output("split", split, read_manifest(split, SplitReport)))
stage = TrainStage(recipe.train, recipe.ingest, recipe.seed)
with Cluster() as cluster, Staging(workspace) as staging:
    cluster.connect()
    with staging.work(place, inputs, stage.on_disk, spread=True) as (own, read):
        report = stage.run(own, read)
print(report.model_dump_json())
"""


def copied(split: Output[SplitReport], workspace: Workspace) -> Output[SplitReport]:
    """A finished split in another workspace."""
    at = Path(split.folder.workspace.root)
    for path in filter(Path.is_file, at.rglob("*")):
        workspace.store(path, workspace.path(str(path.relative_to(at))))
    return replace(split, place=replace(split.folder, workspace=workspace))


def lose_a_worker(driver: "subprocess.Popen[str]", there: Workspace) -> None:
    """Kill a worker once there is a checkpoint to go on from."""
    while not any(path.endswith("/complete.json") for path in there.files(there.path("train/f/checkpoints"))):
        assert driver.poll() is None
        time.sleep(0.1)
    workers = [process for process in psutil.Process(driver.pid).children(recursive=True) if is_worker(process)]
    workers[0].kill()


def test_workers_on_disks_of_their_own_leave_what_workers_in_one_folder_leave(
    ray_cluster: None,
    recipe_of: Callable[..., Recipe],
    split_of: Callable[[int], Output[SplitReport]],
    bucket: str,
    tiny_model: Path,
    tmp_path: Path,
) -> None:
    split, there = split_of(16), Workspace(f"{bucket}/run")
    copied(split, there)
    template = open_tokenizer(tiny_model).chat_template  # so that the workspace has a model of its own
    recipe = recipe_of(**SECTION, chat_template=template)
    straight = train(recipe, split).report
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, there.root, recipe.model_dump_json()],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
    try:
        lose_a_worker(driver, there)
        said, _ = driver.communicate(timeout=1800)
    finally:
        driver.terminate()
    told = (tmp_path / "log").read_text(encoding="utf-8")
    assert driver.returncode == 0, told[-4000:]
    assert "a worker was lost" in told
    report = TrainReport.model_validate_json(said.splitlines()[-1])  # Ray prints too
    assert 0 < report.resumed_at < STEPS
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
