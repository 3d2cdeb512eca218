"""The GPU benchmark's own workings: every part runs on a CPU, and a broken run goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu.parts import Ended
from benchmarks.gpu.setting import MissingPackageError, Setting, need
from benchmarks.gpu.training import section_of, write_recipe
from rayjobs import pipeline

PROJECT = Path(__file__).parents[2]


def command(folder: Path, *options: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.gpu", "--folder", str(folder), *options]


def test_without_a_card_it_says_so_and_exits_3(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    result = subprocess.run(command(tmp_path), cwd=PROJECT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 3
    assert "no CUDA device" in result.stderr and "--dry" in result.stderr
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("dry", [True, False])
def test_the_recipes_of_the_parts_are_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry: bool) -> None:
    monkeypatch.setattr(Setting, "model", lambda setting, size: setting.folder)  # the 7B is not written here
    setting = Setting(tmp_path, dry)
    for changed in ({"zero_stage": 0}, {"method": "full", "zero_stage": 2, "offload_optimizer": True}):
        path = write_recipe(setting, "part", section_of(setting, "7b", 4, changed))
        recipe = pipeline.load(str(path), [])
        assert recipe.train and recipe.train.zero_stage == changed["zero_stage"]


@pytest.mark.slow
def test_every_part_runs_on_a_cpu_in_under_four_minutes(tmp_path: Path) -> None:
    began = time.monotonic()
    result = subprocess.run(command(tmp_path, "--dry"), cwd=PROJECT, capture_output=True, text=True, timeout=800)
    seconds = time.monotonic() - began
    found = json.loads(result.stdout.splitlines()[-1])["parts"]
    assert {name: part["state"] for name, part in found.items()} == dict.fromkeys(gpu.PARTS, "done"), found
    assert result.returncode == 0
    assert found["lora-zero0"]["figures"]["loss"][0] > found["lora-zero0"]["figures"]["loss"][1]
    assert found["batch"]["figures"]["equal"] == found["batch"]["figures"]["rows"]
    assert (tmp_path / "profile.txt").read_text(encoding="utf-8").count("aten::") >= 10
    print(f"all parts: {seconds:.0f} s")


@pytest.mark.slow
def test_a_killed_run_goes_on_with_the_next_part(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    started = command(tmp_path, "--dry", "--only", "machine", "lora-zero0")
    process = subprocess.Popen(started, cwd=PROJECT, start_new_session=True, stderr=subprocess.PIPE, text=True)
    assert process.stderr
    for line in process.stderr:
        if line.startswith("lora-zero0: "):
            break
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert kept["lora-zero0"]["state"] == "running"
    results = gpu._read(Setting(tmp_path, dry=True))
    assert results["lora-zero0"]["state"] == "interrupted"
    wanted = [name for name in gpu.PARTS if name not in results]
    assert "lora-zero0" not in wanted and "lora-zero2" in wanted


def test_a_part_without_its_package_is_skipped_by_name(tmp_path: Path) -> None:
    with pytest.raises(MissingPackageError, match="no_such_package"):
        need("json", "no_such_package")


def test_a_part_that_fails_is_kept_with_what_it_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "run_part", lambda *_: Ended(None, "RuntimeError: losses that do not fall\n", 1))
    results: dict[str, dict[str, object]] = {}
    gpu._do(Setting(tmp_path, dry=True), results, "full")
    assert results["full"]["state"] == "failed" and "losses that do not fall" in str(results["full"]["output"])
    monkeypatch.setattr(gpu, "run_part", lambda *_: Ended({"missing": "bitsandbytes"}, "", 0))
    gpu._do(Setting(tmp_path, dry=True), results, "qlora")
    assert results["qlora"]["state"] == "skipped"
    monkeypatch.setattr(gpu, "run_part", lambda *_: Ended(None, "", None))
    gpu._do(Setting(tmp_path, dry=True), results, "offload")
    assert "stopped after 360 s" in str(results["offload"]["figures"])
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == results
