"""The stages as Ray jobs, on a cluster that was started by `ray start --head`."""

import re
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.foreign_packages import OURS, foreign_folder, run_task
from tests.rayjobs.conftest import ADDRESS

PROJECT = Path(__file__).parents[2]


def submit(head: dict[str, str], *entrypoint: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ray", "job", "submit", "--working-dir", ".", "--", *entrypoint],
        cwd=PROJECT,
        env=head,
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.slow
def test_clean_runs_as_a_job_and_is_read_from_outside(head: dict[str, str], tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    command = ("python", "-m", "rayjobs.clean", "tiny", "--workspace", str(workspace))
    result = submit(head, *command, "ingest.shard_bytes=20000")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "succeeded" in result.stdout + result.stderr
    rows = [pq.read_table(path).num_rows for path in workspace.glob("clean/*/*/data/*.rows.parquet")]
    assert sum(rows) > 450
    again = submit(head, *command, "ingest.shard_bytes=20000")
    assert again.returncode == 0
    assert re.search("clean: up to date", again.stdout + again.stderr), again.stdout


def test_a_relative_workspace_is_refused(head: dict[str, str]) -> None:
    result = submit(head, "python", "-m", "rayjobs.clean", "tiny", "--workspace", "runs/tiny")
    said = result.stdout + result.stderr
    assert "absolute folder that every node sees" in said
    assert "exit code 2" in said or "code 2" in said, said[-2000:]
    assert "Traceback" not in said.split("Running entrypoint")[-1].split("failed")[0]


def test_workers_of_a_cluster_search_no_driver_s_folder(head: dict[str, str], tmp_path: Path) -> None:
    assert run_task(foreign_folder(tmp_path), head[ADDRESS], **head) == f"{OURS} False"
