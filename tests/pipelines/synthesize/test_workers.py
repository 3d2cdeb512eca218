"""Several workers: one that dies is replaced, and together they keep to the rate."""

import json
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipelines.artifacts.workspace import Workspace
from pipelines.llm.ledger import RecordKind, read_index
from tests.pipelines.synthesize.serving import PROJECT, Server, most_in_a_minute, place, recipe, run


def worker_processes() -> list[psutil.Process]:
    """The workers of this test's own Ray that send requests."""
    import ray

    session = ray._private.worker._global_node.get_session_dir_path()
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[0].startswith("ray::MapWorker") and any(
                session in part for part in parent_of(process)
            ):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied, IndexError):
            continue
    return found


def parent_of(process: psutil.Process) -> list[str]:
    parent = process.parent()
    return parent.cmdline() if parent else []


@pytest.mark.usefixtures("ray_cluster")
def test_a_worker_that_dies_is_replaced(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    server = start_server(0.2)
    what = recipe(server.url, cells=200, workers=2)
    killed: list[int] = []

    def kill_one() -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and len(server.outcomes()) < 60:
            time.sleep(0.05)
        for process in worker_processes()[:1]:
            process.kill()
            killed.append(process.pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    report = run(what, place(tmp_path)).report
    killer.join()
    assert len(killed) == 1
    assert report.rows == 400
    assert report.failed == {}
    assert len(server.outcomes()) <= 400 + 2 * 32  # what it had asked and not filed is asked again


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_cell_once_within_the_rate_whatever_goes_wrong(
    tmp_path: Path, start_server: Callable[..., Server], workers: int
) -> None:
    rate, requests = 3600, 5000
    server = start_server(0.3, **{"429": 0.05, "500": 0.03, "drop": 0.01, "hang": 0.01})
    endpoint = {"requests_per_minute": rate, "max_in_flight": 256}
    what = recipe(server.url, cells=requests // 2, workers=workers, timeout=10.0, endpoint=endpoint)
    assert run(what, place(tmp_path)).report.rows == requests
    index = read_index(Workspace(str(tmp_path / "w")))
    assert set(index.kind) == {RecordKind.ANSWER}
    assert len(index) == requests
    log = server.log()["requests"]
    assert len({digest for _, digest, outcome in log if outcome == "ok"}) == requests
    # an answer that comes after the client's time limit is asked for again: it counts as an extra request
    extra = len(log) - requests - sum(outcome != "ok" for _, _, outcome in log)
    assert extra <= 0.03 * requests
    most = most_in_a_minute(sorted(at for at, _, _ in log))
    print(f"{workers} workers: {most} requests in a minute of {rate}, {extra} extra of {requests}")
    assert 0.9 * rate <= most <= 1.02 * rate


@pytest.mark.slow
def test_a_node_that_is_lost_loses_nothing(tmp_path: Path, start_server: Callable[..., Server]) -> None:
    server, cells = start_server(0.2), 600
    command = [sys.executable, "-m", "tests.pipelines.synthesize.lost_node", str(server.port), str(cells)]
    done = subprocess.run(
        [*command, str(tmp_path)], cwd=PROJECT, capture_output=True, text=True, timeout=500, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == {"rows": 2 * cells, "failed": {}, "nodes": 2, "lost": True}
    asked = Counter(digest for _, digest, _ in server.log()["requests"])
    assert len(asked) == 2 * cells
    assert sum(asked.values()) <= 2 * cells + 2 * 32  # what the lost workers had asked and not filed
