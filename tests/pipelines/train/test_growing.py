"""Training on a cluster that an autoscaler plans."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines import placement
from pipelines.errors import HardwareError, StageError
from pipelines.placement import lacking_for_good
from pipelines.recipe.schema import Recipe
from pipelines.train.worker_group import check_resources
from tests.autoscaling_cluster import autoscaling_cluster
from tests.pipelines.train.conftest import chats

TYPES: dict[str, dict[str, Any]] = {
    "cpu": {"resources": {"CPU": 2}, "node_config": {}, "min_workers": 0, "max_workers": 2},
    "gpu": {
        "resources": {"CPU": 1, "GPU": 1, "accelerator_type:T4": 1},
        "node_config": {},
        "min_workers": 0,
        "max_workers": 1,
    },
}


def cpus_alive() -> list[float]:
    """The CPUs of each node that is alive; one of them is the head's 0."""
    return sorted(node.get("CPU", 0) for node in placement.alive())


def wait_until_only_the_head_is_left() -> None:
    until = time.monotonic() + 300
    while len(placement.alive()) > 1 and time.monotonic() < until:
        time.sleep(1)
    assert cpus_alive() == [0]


@pytest.mark.slow
def test_a_cluster_grows_from_nothing_for_workers_and_shrinks_after(
    recipe_of: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import ray

    monkeypatch.setattr(placement, "SAY_SECONDS", 3)
    with autoscaling_cluster(TYPES, idle_minutes=0.2) as address:
        ray.init(address, log_to_driver=False)
        try:
            assert cpus_alive() == [0]
            section = recipe_of(num_workers=2, resources_per_worker={"CPU": 2}).train
            assert section
            began = time.monotonic()
            wrong = section.model_copy(update={"resources_per_worker": {"GPU": 1, "accelerator_type:H100": 0.01}})
            told = r"2 workers of .*; the cluster lacks 2 GPU \(there: 0\), 0.02 accelerator_type:H100 .*or add nodes"
            with pytest.raises(HardwareError, match=told):
                check_resources(wrong)
            assert time.monotonic() - began < placement.GROW_SECONDS / 20
            check_resources(section)
            assert cpus_alive() == [0, 2, 2]
            assert "waiting for the cluster to grow" in capsys.readouterr().err
            with pytest.raises(HardwareError, match=r"4 workers of .*lacks 8 CPU"):
                check_resources(section.model_copy(update={"num_workers": 4}))
            one = {"num_workers": 1, "resources_per_worker": {"GPU": 1, "accelerator_type:T4": 0.01}}
            check_resources(section.model_copy(update=one))
            assert sum(node.get("GPU", 0) for node in placement.alive()) == 1
            wait_until_only_the_head_is_left()
            monkeypatch.setattr(placement, "GROW_SECONDS", 0)
            monkeypatch.setattr(placement, "LOOK_SECONDS", 0.01)  # sooner than a node of this cluster comes
            with pytest.raises(StageError, match=r"did not grow to it .*`ray status` says why"):
                lacking_for_good([{"CPU": 2}], "training needs 1 worker")
        finally:
            ray.shutdown()


@pytest.mark.slow
def test_a_whole_job_finds_no_worker_trains_on_those_that_come_and_lets_them_go(
    tiny_model: Path, tmp_path: Path
) -> None:
    import ray

    source = tmp_path / "rows.jsonl"
    rows = [{"query": row["query"], "response": row["response"]} for row in chats(40)]
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    train = {"model": str(tiny_model), "num_workers": 2, "resources_per_worker": {"CPU": 2}, "dtype": "float32"}
    recipe = {
        "name": "grows",
        "ingest": {"source": str(source)},
        "clean": {"process": [{"text_length_filter": {"min_len": 1}}]},
        "split": {"test_ratio": 0.2},
        "train": {**train, "max_length": 256, "global_batch_size": 4, "max_steps": 4, "eval_rows": 4},
    }
    (tmp_path / "grows.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    danlu = [str(Path(sys.executable).with_name("danlu")), "train", str(tmp_path / "grows.yaml")]
    with autoscaling_cluster(TYPES, idle_minutes=0.2) as address:
        ray.init(address, log_to_driver=False)
        try:
            assert cpus_alive() == [0]
            command = [*danlu, "--address", address, "--workspace", str(tmp_path / "w")]
            environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
            job = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
            widest: list[float] = []
            try:
                while job.poll() is None:
                    widest = max(widest, cpus_alive(), key=sum)
                    time.sleep(0.5)
                said = job.communicate()[1]
            finally:
                job.kill()
                job.wait()
            assert job.returncode == 0, said[-4000:]
            assert re.search("train: done in .* 4 steps", said), said
            (manifest,) = tmp_path.glob("w/train/*/manifest.json")
            assert json.loads(manifest.read_text(encoding="utf-8"))["report"]["workers"] == 2
            assert widest == [0, 2, 2]
            wait_until_only_the_head_is_left()
        finally:
            ray.shutdown()
