"""Real learning: the 135M model on real wishes, by the command that people give."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Manifest

pytestmark = pytest.mark.slow


def trained(folder: Path, wishes: Path, *overrides: str) -> TrainReport:
    """The report of `danlu run tiny --to train` on the wishes."""
    command = [str(Path(sys.executable).parent / "danlu"), "run", "tiny", "--to", "train", "--workspace", str(folder)]
    source = [f"ingest.source={wishes}", "ingest.adapter=conversation"]
    result = subprocess.run(
        [*command, *source, *overrides],
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    (manifest,) = folder.glob("train/*/manifest.json")
    return Manifest[TrainReport].model_validate_json(manifest.read_text(encoding="utf-8")).report


@pytest.fixture(scope="module")
def wishes(shared_data: Path) -> Path:
    return shared_data / "tianji-wishes-chinese-v0.1.json"


def test_two_hundred_wishes_lower_the_held_out_loss_by_a_third(wishes: Path, tmp_path: Path) -> None:
    report = trained(tmp_path, wishes, "train.data=[train#200]", "train.num_train_epochs=2")
    assert report.samples.samples == 200 and report.steps == 100
    assert report.eval_loss and report.eval_loss_base and report.eval_loss < report.eval_loss_base * 2 / 3
    assert report.eval_loss_delta and report.eval_loss_delta.high < 0


def test_twenty_rows_twenty_times_overfit_and_an_earlier_checkpoint_is_recommended(
    wishes: Path, tmp_path: Path
) -> None:
    overrides = ["train.data=[train#20]", "train.num_train_epochs=20", "train.eval_rows=16"]
    overrides += ["train.eval_steps=10", "train.save_steps=10", "train.load_best_model_at_end=true"]
    report = trained(tmp_path, wishes, *overrides)
    assert report.steps == 100
    held_out = {entry.step: entry.eval_loss for entry in report.eval_losses}
    assert report.losses[-1].loss < 0.5 * report.losses[0].loss
    assert held_out[100] > min(held_out.values()) + 0.1
    assert report.best_step and 0 < report.best_step < 100 and report.trained_step == report.best_step
    assert report.eval_loss == min(held_out.values())
