"""Real learning: the 135M model on real wishes, by the command that people give."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow


def trained(folder: Path, wishes: Path, *overrides: str) -> dict[str, Any]:
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
    report: dict[str, Any] = json.loads(manifest.read_text(encoding="utf-8"))["report"]
    return report


@pytest.fixture(scope="module")
def wishes(shared_data: Path) -> Path:
    return shared_data / "tianji-wishes-chinese-v0.1.json"


def test_two_hundred_wishes_lower_the_held_out_loss_by_a_third(wishes: Path, tmp_path: Path) -> None:
    report = trained(tmp_path, wishes, "train.data=[train#200]", "train.num_train_epochs=2")
    assert report["samples"]["samples"] == 200 and report["steps"] == 100
    assert report["eval_loss"] < report["eval_loss_base"] * 2 / 3
    assert report["eval_loss_delta"]["high"] < 0
