"""kill -9 of the whole process group in the middle of a stage: running again finishes, with the same result."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.artifacts.workspace import Workspace
from pipelines.recipe.load import load_recipe
from rayjobs import pipeline
from tests.model_families import write_qwen2

CLEAN = ["tiny", "ingest.shard_bytes=3000"]

TRAIN = """
name: crash
ingest: {source: "recipes://data/tiny.jsonl", limit: 150}
split: {test_ratio: 0.1}
train:
  model: MODEL
  num_workers: 2
  dtype: float32
  lora: {r: 4}
  max_length: 256
  global_batch_size: 4
  max_steps: 16
  eval_rows: 8
  eval_steps: 8
  save_steps: 4
  save_total_limit: 2
"""


ENDS = {signal.SIGINT: (130, "stopped"), signal.SIGTERM: (143, "terminated")}
"""What a command says and ends with that is told to stop."""


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder with a short path, since Ray puts sockets below TMPDIR; by its name its processes are found."""
    folder = Path(tempfile.mkdtemp(prefix="dk-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "danlu"), *arguments, "--workspace", str(folder / "w")],
        env={**os.environ, "TMPDIR": str(folder)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_when(
    process: subprocess.Popen[str], folder: Path, pattern: str, count: int, how: signal.Signals = signal.SIGKILL
) -> list[Path]:
    """Signal the whole process group, as a terminal does, once `count` files match; returns them."""
    deadline = time.monotonic() + 300
    while len(found := sorted(folder.glob(pattern))) < count:
        if process.poll() is not None or time.monotonic() > deadline:
            process.kill()
            raise AssertionError(f"ended with {process.returncode} before {pattern}: {process.communicate()[0]}")
        time.sleep(0.01)
    os.killpg(process.pid, how)
    said, _ = process.communicate(timeout=60)
    if how in ENDS:
        code, word = ENDS[how]
        assert process.returncode == code and "Traceback" not in said and "*** SIG" not in said, said
        kept = r"(what is finished is kept|training saved step \d+), and the same command goes on from there\n"
        assert re.search(rf"{word}; {kept}$", said), said
    return found


def survivors(folder: Path) -> list[str]:
    """Processes that the killed run started and that still live."""
    alive = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                alive.append(" ".join(process.cmdline())[:200])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return alive


def assert_nothing_survives(folder: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and survivors(folder):
        time.sleep(0.2)
    assert survivors(folder) == []


def finish(folder: Path, *arguments: str) -> str:
    process = start(folder, *arguments)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    return said


def report(folder: Path, stage: str, arguments: list[str]) -> Any:
    recipe = load_recipe(arguments[0], arguments[1:])
    return pipeline.status(recipe, Workspace(str(folder / "w")))[stage].report


@pytest.mark.slow
def test_clean_goes_on_from_the_last_shard(short_tmp: Path) -> None:
    straight = short_tmp / "straight"
    finish(straight, "clean", *CLEAN)
    killed = short_tmp / "killed"
    committed = "w/clean/*/*/commits/*.json"
    for more, how in ((2, signal.SIGINT), (1, signal.SIGTERM), (2, signal.SIGKILL)):
        before = len(sorted(killed.glob(committed)))
        commits = kill_when(start(killed, "clean", *CLEAN), killed, committed, before + more, how)
        assert_nothing_survives(killed)
    stamps = {path: path.stat().st_mtime_ns for path in commits}
    finish(killed, "clean", *CLEAN)
    assert {path: path.stat().st_mtime_ns for path in commits} == stamps  # finished shards were not done again
    reports = [report(folder, "clean", CLEAN) for folder in (straight, killed)]
    assert reports[0].digest == reports[1].digest
    assert reports[0].rows == reports[1].rows
    assert "up to date" in finish(killed, "clean", *CLEAN)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["raylet", "gcs_server"])
def test_where_ray_s_own_process_is_killed_the_command_ends_soon_and_says_so(short_tmp: Path, name: str) -> None:
    process = start(short_tmp, "clean", *CLEAN)
    deadline = time.monotonic() + 300
    while not sorted(short_tmp.glob("w/clean/*/*/commits/*.json")) and time.monotonic() < deadline:
        time.sleep(0.01)
    (victim,) = [child for child in psutil.Process(process.pid).children() if child.name() == name]
    victim.kill()
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 1, said
    assert f"error: Ray's {name} was killed" in said and "the same command goes on from there" in said
    assert_nothing_survives(short_tmp)
    finish(short_tmp, "clean", *CLEAN)


@pytest.mark.slow
def test_train_goes_on_from_the_last_checkpoint(short_tmp: Path) -> None:
    recipe = short_tmp / "crash.yaml"
    recipe.write_text(TRAIN.replace("MODEL", str(write_qwen2(short_tmp / "model"))), encoding="utf-8")
    arguments = [str(recipe)]
    straight, killed = short_tmp / "straight", short_tmp / "killed"
    finish(straight, "train", *arguments)
    for step, how in ((4, signal.SIGINT), (8, signal.SIGKILL)):
        checkpoint = f"w/train/*/checkpoints/checkpoint-{step}/complete.json"
        kill_when(start(killed, "train", *arguments), killed, checkpoint, 1, how)
        assert_nothing_survives(killed)
    said = finish(killed, "train", *arguments)
    assert "step 1/16" not in said  # it did not begin again
    reports = [report(folder, "train", arguments) for folder in (straight, killed)]
    losses = [[(entry.step, entry.loss, entry.grad_norm) for entry in found.losses] for found in reports]
    assert [step for step, _, _ in losses[0]] == list(range(1, 17))
    assert losses[0] == losses[1]
    assert reports[0].digest == reports[1].digest


EVALUATE = ["tiny", "ingest.limit=200", "train.max_steps=2", "train.eval_rows=4", "evaluate.limit=12"]


@pytest.mark.slow
def test_evaluate_goes_on_from_the_last_answer(short_tmp: Path) -> None:
    finish(short_tmp, "merge", *EVALUATE)
    (answers,) = kill_when(
        start(short_tmp, "evaluate", *EVALUATE), short_tmp, "w/evaluate/*/**/predictions/base/*.jsonl", 1
    )
    assert_nothing_survives(short_tmp)
    kept = answers.read_text(encoding="utf-8").splitlines()[:-1]  # the last line may be torn
    finish(short_tmp, "evaluate", *EVALUATE)
    assert report(short_tmp, "evaluate", EVALUATE).results["test"].rows == 12
    after = answers.read_text(encoding="utf-8").splitlines()
    assert len(after) == 12
    assert after[: len(kept)] == kept
    assert_nothing_survives(short_tmp)
