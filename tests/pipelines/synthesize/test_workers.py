"""Several workers: one that dies is replaced, and together they keep to the rate."""

import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from pipelines.synthesize.stage import synthesize
from tests.pipelines.synthesize.serving import Server, place, recipe


def worker_processes() -> list[psutil.Process]:
    """The asking workers of this test's own Ray."""
    import ray

    session = ray._private.worker._global_node.get_session_dir_path()
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline()[:1] == ["ray::Worker.run"] and any(session in part for part in parent_of(process)):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
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
    report = synthesize(what, place(tmp_path))
    killer.join()
    assert len(killed) == 1
    assert report["rows"] == 400
    assert report["failed"] == {}
    assert len(server.outcomes()) <= 400 + 2 * 32  # what it had asked and not filed is asked again


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_every_cell_once_within_the_rate_whatever_goes_wrong(
    tmp_path: Path, start_server: Callable[..., Server], workers: int
) -> None:
    rate = 1800
    server = start_server(0.3, **{"429": 0.05, "500": 0.03, "drop": 0.01, "hang": 0.01})
    endpoint = {"requests_per_minute": rate, "max_in_flight": 128}
    what = recipe(server.url, cells=1300, workers=workers, timeout=3.0, endpoint=endpoint)
    report = synthesize(what, place(tmp_path))
    assert report["rows"] == 2600
    log = server.log()["requests"]
    answered = Counter(digest for _, digest, outcome in log if outcome == "ok")
    assert len(answered) == 2600 and set(answered.values()) == {1}
    assert len(log) <= 1.03 * 2600 + sum(outcome != "ok" for _, _, outcome in log)
    seen = sorted(at for at, _, _ in log)
    first = most = 0
    for last, at in enumerate(seen):
        while seen[first] < at - 60:
            first += 1
        most = max(most, last - first + 1)
    assert most <= 1.02 * rate
