"""A Ray cluster that jobs are submitted to."""

import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

BIN = Path(sys.executable).parent
ADDRESS = "DANLU_TEST_ADDRESS"
"""Environment variable: where drivers reach the cluster."""


def free_ports(count: int) -> list[int]:
    """Ports above the range that Ray gives to workers."""
    ports: list[int] = []
    for port in random.sample(range(20_100, 32_000), 1000):  # other test runs look for some at the same time
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("", port))
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
