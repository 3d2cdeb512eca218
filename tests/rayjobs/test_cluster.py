"""A Ray of our own, and one that is named: who reaches it, how it ends, and what is said where it does not answer."""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from pipelines.errors import InputError, StageError
from rayjobs import cluster
from rayjobs.cluster import require_answer


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of something that lets connect and says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.fixture
def web() -> Iterator[int]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def test_an_address_at_which_no_ray_answers_is_told_soon(
    silent: int, web: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "REACH_SECONDS", 1)
    with socket.create_server(("127.0.0.1", 0)) as server:
        closed = server.getsockname()[1]
    began = time.monotonic()
    for port, why in ((closed, "Connection refused"), (silent, "timed out"), (web, "is not Ray")):
        for scheme in ("", "ray://"):
            with pytest.raises(StageError, match=rf"Ray at {scheme}127\.0\.0\.1:{port}: .*{why}"):
                require_answer(f"{scheme}127.0.0.1:{port}")
    assert time.monotonic() - began < 15
    with pytest.raises(StageError, match="nothing answers there"):
        require_answer("no-such-host.invalid:6379")


@pytest.mark.parametrize(
    "address",
    ["nonsense", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "h:99999", "http://h:8265", "a b:1", "[::1]"],
)
def test_what_cannot_be_an_address_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=r"an address is HOST:PORT, ray://HOST:PORT, auto or local"):
        require_answer(address)


def test_a_stale_ray_address_is_one_line(tmp_path: Path) -> None:
    result = subprocess.run(
        [str(Path(sys.executable).parent / "danlu"), "ingest", "tiny", "--workspace", str(tmp_path / "w")],
        env={**os.environ, "RAY_ADDRESS": "127.0.0.1:1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert line.startswith("error: Ray at 127.0.0.1:1: nothing answers there")
    assert "Traceback" not in result.stderr


ALONE = """
import json, os, stat, sys
import psutil
from rayjobs.cluster import Cluster

with Cluster() as cluster:
    cluster.connect()
    import ray
    from ray.dashboard.utils import get_address_for_submission_client

    @ray.remote
    def asked():
        return get_address_for_submission_client(None)

    node = ray._private.worker._global_node
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    ports = [c.laddr.ip for p in ours for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    folder = node.get_temp_dir_path()
    found = {
        "listens": sorted(set(ports)),
        "folder": folder,
        "mode": oct(stat.S_IMODE(os.stat(os.path.dirname(folder)).st_mode)),
        "asks": ray.get(asked.remote()),
    }
print(json.dumps(found))
"""


def test_what_a_killed_command_left_goes_with_one_that_needs_no_ray(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "_place", lambda: str(tmp_path))
    left = tmp_path / "danlu-ray-12345678"
    for address, stays in (("127.0.0.1:6379", True), ("local", False)):
        (left / "r").mkdir(parents=True, exist_ok=True)
        (left / "lock").touch()
        with cluster.Cluster(address):
            pass
        assert left.exists() is stays


def test_a_ray_that_it_did_not_start_goes_on(ray_cluster: None) -> None:
    import ray

    with cluster.Cluster() as own:
        own.connect()
    assert ray.is_initialized()


HANGS = """
import os, signal, subprocess, sys
from rayjobs.cluster import Cluster

with Cluster() as cluster:
    cluster.connect()
    import ray

    @ray.remote
    class Worker:
        def begin(self):
            return os.getpid(), subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid

    worker = Worker.remote()
    pids = ray.get(worker.begin.remote())
    print(*pids, flush=True)
    os.kill(pids[0], signal.SIGSTOP)
"""


def test_a_worker_whose_own_end_hangs_is_ended_with_what_it_started() -> None:
    said = subprocess.run([sys.executable, "-c", HANGS], capture_output=True, text=True, timeout=400)
    assert said.returncode == 0, said.stderr
    pids = [int(pid) for pid in said.stdout.split()]
    assert len(pids) == 2
    living = {process.pid for process in psutil.process_iter() if process.status() != psutil.STATUS_ZOMBIE}
    assert living.isdisjoint(pids)


@pytest.mark.slow
def test_a_ray_of_our_own_is_reached_from_here_alone_and_leaves_nothing(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="dk-", dir="/tmp") as temporary:
        home = tmp_path / "home"
        home.mkdir()
        environment = {**os.environ, "TMPDIR": temporary, "HOME": str(home)}
        environment = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
        said = subprocess.run(
            [sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=400
        )
        assert said.returncode == 0, said.stderr
        found = json.loads(said.stdout.splitlines()[-1])
        assert {address.removeprefix("::ffff:") for address in found["listens"]} == {"127.0.0.1"}
        assert Path(found["folder"]).parents[1] == Path(temporary)
        assert found["mode"] == "0o700"
        assert found["asks"] == "http://127.0.0.1:0"  # not the dashboard of another Ray on this machine
        assert [*Path(temporary).iterdir()] == []
        assert not (home / ".ray").exists()  # no token lies in a file


@pytest.mark.slow
def test_a_ray_of_our_own_starts_where_neither_home_nor_the_temporary_folder_is_of_use(tmp_path: Path) -> None:
    far = tmp_path / ("x" * 120)  # no socket's path has room in it
    far.mkdir()
    for temporary in (str(far), "/dev/null"):
        environment = {**os.environ, "TMPDIR": temporary, "HOME": "/dev/null"}
        environment = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
        said = subprocess.run(
            [sys.executable, "-c", ALONE], env=environment, capture_output=True, text=True, timeout=400
        )
        assert said.returncode == 0, said.stderr
        assert not Path(json.loads(said.stdout.splitlines()[-1])["folder"]).is_relative_to(far)
    assert [*far.iterdir()] == []


def test_a_ray_that_does_not_start_is_tried_again_and_then_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray
    from ray._private import ray_constants

    tries = []

    def fail(**_: object) -> None:
        tries.append(time.monotonic())
        raise Exception("The raylet did not register\nand more")  # Ray raises bare ones

    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(ray_constants, "ENABLE_RAY_CLUSTER", ray_constants.ENABLE_RAY_CLUSTER)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    monkeypatch.setattr(ray, "shutdown", lambda: None)  # the Ray of other tests
    with (
        pytest.raises(
            StageError,
            match=r"did not start on this machine in 3 tries of at most 300 s; .* The raylet did not register\n$",
        ),
        cluster.Cluster() as own,
    ):
        own.connect()
    assert len(tries) == cluster.STARTS


class Starting:
    """A raylet that has started, and that Ray never hears of."""

    def name(self) -> str:
        return "raylet"


@pytest.mark.parametrize(("raylets", "seconds", "why"), [([Starting()], 2, "no node"), ([], 0, "its raylet ended")])
def test_the_wait_for_a_node_that_does_not_come_ends(
    monkeypatch: pytest.MonkeyPatch, raylets: list[Starting], seconds: float, why: str
) -> None:
    from ray._private import services

    def get_node() -> None:
        raise RuntimeError("no node")

    monkeypatch.setattr(cluster, "START_SECONDS", 2)
    monkeypatch.setattr(cluster, "_children", lambda named: raylets)
    monkeypatch.setattr(services, "get_node", get_node)
    began = time.monotonic()
    with pytest.raises((RuntimeError, ConnectionError), match=why), cluster.patience():
        services.get_node()
    assert seconds <= time.monotonic() - began < seconds + 60
    assert services.get_node is get_node
