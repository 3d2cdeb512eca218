"""The stages as Ray jobs, on a cluster that was started by `ray start --head`."""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from tests.foreign_packages import OURS, foreign_folder, run_task

PROJECT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
ADDRESS = "DANLU_TEST_ADDRESS"
"""Environment variable: where drivers reach the cluster."""


def free_ports(count: int) -> list[int]:
    """Ports above the range that Ray gives to workers."""
    ports: list[int] = []
    for port in range(20_100, 32_000):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) and len(ports) < count:
                ports.append(port)
        if len(ports) == count:
            break
    return ports


@pytest.fixture(scope="module")
def head() -> Iterator[dict[str, str]]:
    """A fresh cluster of one node; yields the environment in which `ray job submit` reaches it, and its address."""
    folder = tempfile.mkdtemp(prefix="dj-", dir="/tmp")
    gcs, dashboard, client, agent = free_ports(4)
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token", "DANLU_TEST_HEAD": folder}
    start = [
        *("ray", "start", "--head", f"--port={gcs}", f"--dashboard-port={dashboard}", "--num-cpus=2"),
        *(f"--temp-dir={folder}", "--object-store-memory=200000000", "--disable-usage-stats"),
        *(f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
    ]
    subprocess.run(["ray", "get-auth-token", "--generate"], env=env, check=True, capture_output=True)
    subprocess.run(start, env=env, check=True, capture_output=True, timeout=120)
    yield {**env, "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}", ADDRESS: f"127.0.0.1:{gcs}"}
    stop(folder)
    shutil.rmtree(folder, ignore_errors=True)


def stop(folder: str) -> None:
    """End the processes of this cluster, and no others."""
    ours = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DANLU_TEST_HEAD") == folder:
                ours.append(process)
                process.terminate()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    _, alive = psutil.wait_procs(ours, timeout=10)
    for process in alive:
        process.kill()


def submit(head: dict[str, str], *entrypoint: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["ray", "job", "submit", "--working-dir", ".", "--", *entrypoint],
        cwd=PROJECT,
        env=head,
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_clean_runs_as_a_job_and_is_read_from_outside(head: dict[str, str], tmp_path: Path) -> None:
    workspace = tmp_path / "w"
    command = ("python", "-m", "rayjobs.clean", "tiny", "--workspace", str(workspace))
    result = submit(head, *command, "ingest.shard_bytes=20000")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    assert "succeeded" in result.stdout + result.stderr
    rows = [pq.read_table(path).num_rows for path in workspace.glob("clean/*/*/data/*.rows.parquet")]
    assert sum(rows) > 450
    began = time.monotonic()
    again = submit(head, *command, "ingest.shard_bytes=20000")
    assert again.returncode == 0
    assert re.search("clean: up to date", again.stdout + again.stderr), again.stdout
    assert time.monotonic() - began < 60


def test_a_relative_workspace_is_refused(head: dict[str, str]) -> None:
    result = submit(head, "python", "-m", "rayjobs.clean", "tiny", "--workspace", "runs/tiny")
    said = result.stdout + result.stderr
    assert "absolute folder that every node sees" in said
    assert "exit code 2" in said or "code 2" in said, said[-2000:]
    assert "Traceback" not in said.split("Running entrypoint")[-1].split("failed")[0]


def test_workers_of_a_cluster_search_no_driver_s_folder(head: dict[str, str], tmp_path: Path) -> None:
    assert run_task(foreign_folder(tmp_path), head[ADDRESS], **head) == f"{OURS} False"
