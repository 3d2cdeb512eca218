"""Told to leave, training saves at once and goes on: SIGTERM to a worker, a signal to the driver, a drained node.

`save_steps` is beyond the end, so that the only checkpoint before it is the one that was saved on leaving.
"""

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Output, read_manifest
from pipelines.artifacts.workspace import Place
from pipelines.recipe.schema import Recipe
from pipelines.train.checkpoint import complete_checkpoints, step_of
from pipelines.train.journal import read_journal
from pipelines.train.preemption import ONCE_SECONDS, told_to_end
from tests.pipelines.train.conftest import place_for, train
from tests.pipelines.train.test_stage import DRIVER, is_worker, wait_until

RecipeOf = Callable[..., Recipe]
SplitIn = Callable[[Path, int], Output[SplitReport]]

ROWS, STEPS = 30, 150
SECTION = {
    "max_steps": STEPS,
    "num_train_epochs": 100,
    "save_steps": 1000,
    "eval_rows": 3,
    "eval_steps": 60,
    "learning_rate": 1e-3,  # at 1e-2 two sums in another order are 0.018 apart after 70 steps, undisturbed; here 5e-7
}

TWO_NODES = """
import os, subprocess, sys, threading, time
from pathlib import Path
import ray
from ray.cluster_utils import Cluster
from pipelines.recipe.schema import Recipe
from pipelines.train.journal import read_journal
from pipelines.train.stage import TrainInputs, TrainStage
from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Manifest, Output, read_manifest
from pipelines.artifacts.workspace import Place, Workspace

nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "object_store_memory": 100 << 20})
other = nodes.add_node(num_cpus=1, object_store_memory=100 << 20)
ray.init(address=nodes.address, log_to_driver=False)
workspace = Workspace(sys.argv[1])
split, place = Place(workspace, "split", "s"), Place(workspace, "train", "f")
inputs = TrainInputs(Output("split", split, read_manifest(split, SplitReport)))

def drain():
    while len(read_journal(place.local("metrics.jsonl"))) < 10:
        time.sleep(0.1)
    ray_command = str(Path(sys.executable).with_name("ray"))
    command = [ray_command, "drain-node", "--address", nodes.address, "--node-id", other.node_id]
    command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
    command += ["--deadline-remaining-seconds", "60"]
    subprocess.run(command, check=True)

threading.Thread(target=drain, daemon=True).start()
recipe = Recipe.model_validate_json(sys.argv[2])
report = TrainStage(recipe.train, recipe.ingest, recipe.seed).run(place, inputs)
Manifest[TrainReport](report=report).write(place)
ray.shutdown()
nodes.shutdown()
"""


@pytest.fixture(scope="module")
def straight(
    ray_cluster: None, recipe_of: RecipeOf, split_in: SplitIn, tmp_path_factory: pytest.TempPathFactory
) -> TrainReport:
    """The report of a run that nothing disturbed."""
    return train(recipe_of(**SECTION), split_in(tmp_path_factory.mktemp("straight"), ROWS)).report


def assert_same_end(report: TrainReport, straight: TrainReport) -> None:
    same = {"loss", "grad_norm", "lr", "tokens", "step"}
    losses, undisturbed = ([entry.model_dump(include=same) for entry in one.losses] for one in (report, straight))
    assert losses == undisturbed
    assert report.eval_losses == straight.eval_losses
    assert report.digest == straight.digest


def steps_in(place: Place) -> int:
    return sum("loss" in entry for entry in read_journal(place.local("metrics.jsonl")))


@pytest.mark.slow
def test_a_worker_that_gets_sigterm_saves_first(
    straight: TrainReport, recipe_of: RecipeOf, split_in: SplitIn, tmp_path: Path
) -> None:
    split = split_in(tmp_path, ROWS)
    place = place_for(split)
    seen: list[int] = []

    def terminate_one() -> None:
        wait_until(lambda: steps_in(place) >= 10, seconds=400)
        workers = [process for process in psutil.Process().children(recursive=True) if is_worker(process)]
        workers[0].terminate()
        wait_until(lambda: bool(complete_checkpoints(place.local("checkpoints"))), seconds=100)
        seen.append(step_of(complete_checkpoints(place.local("checkpoints"))[0]))

    terminator = threading.Thread(target=terminate_one)
    terminator.start()
    report = train(recipe_of(**SECTION, max_failures=0), split).report
    terminator.join()
    assert 10 <= seen[0] < STEPS and report.resumed_at == seen[0]
    assert_same_end(report, straight)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "stopped")]
)
def test_a_driver_that_is_told_to_end_saves_and_goes_on_when_started_again(
    straight: TrainReport, recipe_of: RecipeOf, split_in: SplitIn, tmp_path: Path, number: int, code: int, word: str
) -> None:
    split = split_in(tmp_path, ROWS)
    place = place_for(split)
    recipe = recipe_of(**SECTION)
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path), recipe.model_dump_json()], stdout=log, stderr=log
        )
    try:
        wait_until(lambda: steps_in(place) >= 10 or driver.poll() is not None, seconds=400)
        driver.send_signal(number)
        assert driver.wait(timeout=200) == code
    finally:
        driver.kill()
        driver.wait()
    (saved,) = map(step_of, complete_checkpoints(place.local("checkpoints")))
    assert 10 <= saved < STEPS
    told = f"{word}; training saved step {saved}, and the same command goes on from there"
    assert told in (tmp_path / "log").read_text()
    report = train(recipe, split).report
    assert report.resumed_at == saved
    assert_same_end(report, straight)


@pytest.mark.slow
def test_a_node_that_is_drained_is_left_and_training_goes_on_with_one_worker(
    straight: TrainReport, recipe_of: RecipeOf, split_in: SplitIn, tmp_path: Path
) -> None:
    place = place_for(split_in(tmp_path, ROWS))
    recipe = recipe_of(**{**SECTION, "num_workers": [1, 2]}, max_failures=0)
    command = [sys.executable, "-c", TWO_NODES, str(tmp_path), recipe.model_dump_json()]
    with tempfile.TemporaryDirectory(prefix="danlu-d-", ignore_cleanup_errors=True) as folder:  # a short path: sockets
        environment = {**os.environ, "RAY_TMPDIR": folder, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "1"}
        result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert result.returncode == 0, result.stderr[-4000:]
    manifest = read_manifest(place, TrainReport)
    assert manifest and manifest.report.workers == 1 and 10 <= manifest.report.resumed_at < STEPS
    losses, undisturbed = ([entry.loss for entry in one.losses] for one in (manifest.report, straight))
    assert losses == pytest.approx(undisturbed, abs=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_once_however_often_it_is_passed_on(tmp_path: Path, number: signal.Signals) -> None:
    mark = tmp_path / "leave"
    before = signal.getsignal(number)
    with told_to_end(mark) as told:
        assert told.by is None
        signal.raise_signal(number)
        assert told.by == number and mark.exists()
        signal.raise_signal(number)  # as `timeout` does
        told.at -= ONCE_SECONDS
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(number) is before
