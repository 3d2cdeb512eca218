"""The whole chain on a small slice, with real Ray, DeepSpeed, vLLM and evalscope, as one command."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.pipelines.evaluate.fake_endpoint import chat_server_running

SLICE = [
    "ingest.limit=200",
    "train.max_steps=3",
    "train.eval_rows=4",
    "train.eval_steps=3",
    "evaluate.limit=2",
    "evaluate.generation.max_tokens=16",
    "compare.queries=1",
    "compare.generation.max_tokens=16",
]


def danlu(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "danlu"), *arguments, "--workspace", str(folder), *SLICE],
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=850,
    )


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of a run of the whole recipe."""
    folder = tmp_path_factory.mktemp("chain")
    result = danlu("run", "tiny", folder=folder)
    assert result.returncode == 0, result.stderr[-4000:]
    assert "base against tiny" in result.stdout
    assert str(folder / "report.html") in result.stdout.replace("\n", "")
    return folder


def manifest(folder: Path, stage: str) -> dict[str, object]:
    (path,) = folder.glob(f"{stage}/*/manifest.json")
    report: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))["report"]
    return report


def test_training_lowers_the_held_out_loss(finished: Path) -> None:
    report = manifest(finished, "train")
    assert report["steps"] == 3
    assert float(str(report["eval_loss"])) < float(str(report["eval_loss_base"])) - 0.1


def test_the_merged_model_agrees_with_base_and_adapter(finished: Path) -> None:
    report = manifest(finished, "merge")
    (folder,) = finished.glob("merge/*/model")
    assert (folder / "model.safetensors").is_file()
    assert (folder / "chat_template.jinja").is_file()
    assert float(str(report["merge_difference"])) < 1e-3
    assert float(str(report["reload_difference"])) < 1e-3


def test_every_model_was_asked_and_scored(finished: Path) -> None:
    assert manifest(finished, "evaluate")["models"] == ["base", "tiny", "tiny-merged"]
    (answers,) = finished.glob("compare/*/answers.jsonl")
    asked = {(row["model"], row["query"]) for row in map(json.loads, answers.read_text(encoding="utf-8").splitlines())}
    assert len(asked) == 3 * 6  # four in English, who it is, and one of the test rows
    assert ("base", "你是谁？") in asked


def test_the_report_shows_every_stage(finished: Path) -> None:
    page = (finished / "report.html").read_text(encoding="utf-8")
    for text in ("document_minhash_deduplicator", "Training", "ROUGE", "你是谁？", "Environment", "deepspeed"):
        assert text in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//|@import|url\(["']?http""", page)  # self-contained


def test_a_second_run_does_nothing_and_says_so(finished: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.glob("*/*/manifest.json")}
    began = time.monotonic()
    result = danlu("run", "tiny", folder=finished)
    assert result.returncode == 0
    assert result.stderr.count("up to date") == 7
    assert {path: path.stat().st_mtime_ns for path in finished.glob("*/*/manifest.json")} == before
    assert time.monotonic() - began < 20
    status = danlu("status", "tiny", folder=finished)
    assert status.stdout.count("complete") == 7


@pytest.mark.slow
def test_a_sweeps_recommendation_becomes_the_merged_models_own(finished: Path) -> None:
    with chat_server_running() as server:
        server.answer = lambda model, query: (
            "早睡" * 20 if server.requests[-1]["repetition_penalty"] < 1.2 else "早睡。"
        )
        asked = [f"compare.endpoint={server.url}", "compare.concurrency=1"]
        result = danlu("compare", "tiny", "--sweep", *asked, folder=finished)
    assert result.returncode == 0, result.stderr[-4000:]
    assert len(server.requests) == 3 * 2 + 3 * 3 * 10
    (before,) = finished.glob("merge/*/model/generation_config.json")
    unaccepted = before.read_bytes()
    (accepted,) = re.findall("recommends '(merge.generation={.*})'", result.stderr.replace("\n", ""))
    result = danlu("merge", "tiny", accepted, folder=finished)
    assert result.returncode == 0, result.stderr[-4000:]
    (after,) = set(finished.glob("merge/*/model/generation_config.json")) - {before}
    own = json.loads(after.read_text(encoding="utf-8"))
    assert (own["temperature"], own["do_sample"], own["repetition_penalty"]) == (0, False, 1.2)
    assert before.read_bytes() == unaccepted
    digests = {json.loads(path.read_bytes())["report"]["digest"] for path in finished.glob("merge/*/manifest.json")}
    assert len(digests) == 2  # evaluating and publishing notice
