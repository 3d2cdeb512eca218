"""A gateway asked anything for half an hour while its engines die and its followers fail: no 500, no leak, no lie.

    make chaos                                     30 minutes
    CHAOS_MINUTES=5 CHAOS_SEED=2 make chaos

Requests drawn from the description and Schemathesis ask it all the time. Its world changes every few seconds, by
seed; what `/ready`, `/health` and Ray Serve's health check say is compared with what the world was long enough.
"""

import http.client
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings

from serve.adapter_registry import set_alias
from serve.app import claim_port
from serve.discovery import EngineRecord
from serve.gateway.openapi import DESCRIPTION
from tests.chaos.faulty_gateway import BEAT, BLIND, FAULTS, LIVE, STALE
from tests.own_environment import programs
from tests.serve.gateway.drawn_requests import ENGINES_CHECKS, SCHEMATHESIS, of_served_models, requests

MINUTES = float(os.environ.get("CHAOS_MINUTES", "30"))
SEED = int(os.environ.get("CHAOS_SEED", "1"))
PROJECT = Path(__file__).parents[2]
ROOM = 50 << 20
"""Bytes that the gateway may grow by after its first tenth of the time, in which it fills its caches."""

LATE = 2.0
"""Seconds that the truth may take beyond the bounds that the gateway itself names."""


class World:
    """The engine, the store and the registry, which change together; `since` says when each took its state."""

    def __init__(self, folder: Path, drawn: random.Random) -> None:
        self._folder, self._drawn = folder, drawn
        self._process: subprocess.Popen[bytes] | None = None
        self._record: EngineRecord | None = None
        self._lock = threading.Lock()
        self.states = {"engine": "none", "store": "", "registry": ""}
        self.since = dict.fromkeys(self.states, time.monotonic())
        self.told: Counter[str] = Counter()
        self.engines = 0

    def held(self, what: str, state: bool, seconds: float, began: float) -> bool:
        """Whether something has had a state (an engine that serves, or a fault) for so long before a moment."""
        with self._lock:
            value = self.states[what]
            is_so = value == "serves" if what == "engine" else bool(value)
            return is_so == state and began - self.since[what] > seconds

    def change(self) -> None:
        """Draw another state for one of the three."""
        what = self._drawn.choice(["engine", "engine", "store", "registry"])
        if what == "engine":
            kinds = ["killed", "withdrawn"] if self.states["engine"] == "serves" else ["serves"]
        else:
            kinds = [""] if self.states[what] else [*FAULTS, "hang"]
            kinds = [kind for kind in kinds if what == "registry" or kind != "DataError"]
        self._take(what, self._drawn.choice(kinds))

    def _take(self, what: str, state: str) -> None:
        self._note(what, "changes")
        if what == "engine":
            getattr(self, f"_{state}")()
        else:
            faults = {"store": self.states["store"], "registry": self.states["registry"], what: state}
            self._write(self._folder / "faults.json", json.dumps(faults))
        self._note(what, state)
        self.told[f"{what}: {state or 'sound'}"] += 1

    def _note(self, what: str, state: str) -> None:
        with self._lock:
            self.states[what] = state
            self.since[what] = time.monotonic()

    def _serves(self) -> None:
        self._drop_record()
        port = claim_port("127.0.0.1", None)
        command = [sys.executable, "-m", "uvicorn", "tests.chaos.cutting_engine:app", "--port", str(port)]
        self._process = subprocess.Popen(
            [*command, "--log-level", "critical", "--timeout-graceful-shutdown", "1"], cwd=PROJECT
        )
        until = time.monotonic() + 60
        while socket.socket().connect_ex(("127.0.0.1", port)):
            assert time.monotonic() < until and self._process.poll() is None
            time.sleep(0.05)
        self.engines += 1
        self._record = EngineRecord(f"r{self.engines}", "base", f"http://127.0.0.1:{port}")

    def _killed(self) -> None:
        assert self._process is not None
        self._process.kill()  # with its replica: the record stays and is not renewed
        self._process.wait()

    def _withdrawn(self) -> None:
        assert self._process is not None
        self._drop_record()
        self._process.terminate()
        self._process.wait()

    def _drop_record(self) -> None:
        if self._record is not None:
            self._path_of(self._record).unlink(missing_ok=True)
        self._record = None

    def renew(self) -> None:
        """Announce the engine once more, as its replica does while it lives."""
        record = self._record
        if record is not None and self.states["engine"] == "serves":
            beat = int(time.monotonic() / BEAT)
            content = {"replica": record.replica, "model": "base", "url": record.url, "beat": beat}
            self._write(self._path_of(record), json.dumps(content))

    def _path_of(self, record: EngineRecord) -> Path:
        return self._folder / "store" / quote(f"app/engine/{record.replica}", safe="")

    def _write(self, path: Path, text: str) -> None:
        new = self._folder / f"new-{threading.get_ident()}"
        new.write_text(text)
        new.rename(path)

    def run(self, ended: threading.Event) -> None:
        """Live until the end, with changes every few seconds; begin and end sound."""
        self._take("engine", "serves")
        following = time.monotonic() + 10
        while not ended.wait(BEAT):
            self.renew()
            if time.monotonic() > following:
                self.change()
                following = time.monotonic() + self._drawn.uniform(0.5, 8.0)

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


class Judge:
    """Compares what the gateway says with what the world was; counts what it could compare."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.compared: Counter[str] = Counter()
        self.lies: list[str] = []

    def _hold(self, name: str, premises: list[bool], truth: bool, said: Any) -> None:
        if all(premises):
            self.compared[name] += 1
            if not truth:
                self.lies.append(f"{name}: {said}, {self._world.states}, {self._world.since}, {time.monotonic()}")

    def ready(self, began: float, status: int, said: dict[str, Any]) -> None:
        """`/ready`, asked at `began` and answered now."""
        held = self._world.held
        sees = held("store", False, LIVE + LATE, began)
        serves, is_away = held("engine", True, LIVE + LATE, began), held("engine", False, LATE, began)
        self._hold("ready", [sees, serves], status == 200 and not said["missing"], said)
        self._hold("an engine is gone", [is_away], status == 503, said)
        self._hold("no store", [held("store", True, STALE + LATE, began)], "engines" in said["stale"], said)
        self._hold("a store", [sees], "engines" not in said["stale"], said)
        self._hold("no registry", [held("registry", True, STALE + LATE, began)], "adapters" in said["stale"], said)
        self._hold("a registry", [held("registry", False, LATE, began)], "adapters" not in said["stale"], said)

    def ill(self, began: float, said: str) -> None:
        """What Ray Serve is told at `began`."""
        self._hold("ill", [self._world.held("store", True, BLIND + LATE, began)], bool(said), said)
        self._hold("well", [self._world.held("store", False, LATE, began)], not said, said)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "store").mkdir()
    (tmp_path / "faults.json").write_text('{"store": "", "registry": ""}')
    adapter = tmp_path / "registry" / "persona@1"
    adapter.mkdir(parents=True)
    (adapter / "adapter_config.json").write_text("{}")
    set_alias(tmp_path / "registry", "persona", "persona@1")
    (tmp_path / "openapi.json").write_text(json.dumps(of_served_models(DESCRIPTION)))
    return tmp_path


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.mark.parametrize(
    "minutes", [pytest.param(1, marks=pytest.mark.slow), pytest.param(MINUTES, marks=pytest.mark.chaos)]
)
@pytest.mark.timeout(60 * MINUTES + 1200)
def test_it_answers_and_tells_the_truth(minutes: float, folder: Path, stack: ExitStack) -> None:
    schemathesis = programs(folder, SCHEMATHESIS) / "st"
    world = World(folder, random.Random(SEED))
    stack.callback(world.close)
    port = claim_port("127.0.0.1", None)
    gateway = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.faulty_gateway", str(folder), str(port)],
            cwd=PROJECT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(folder / "gateway.log").open("wb"),
            text=True,
        )
    )
    stack.callback(gateway.kill)
    ended, judge = threading.Event(), Judge(world)
    lines: list[dict[str, Any]] = []

    def listen() -> None:
        assert gateway.stdout is not None
        for line in gateway.stdout:
            lines.append(json.loads(line))
            judge.ill(lines[-1]["began"], lines[-1]["ill"])

    def observe() -> None:
        while not ended.wait(0.2):
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
            began = time.monotonic()
            connection.request("GET", "/ready")
            answer = connection.getresponse()
            judge.ready(began, answer.status, json.loads(answer.read()))
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            connection.close()

    until = time.monotonic() + 60
    while socket.socket().connect_ex(("127.0.0.1", port)):
        assert time.monotonic() < until and gateway.poll() is None, (folder / "gateway.log").read_text()
        time.sleep(0.1)
    end = time.monotonic() + 60 * minutes
    with ThreadPoolExecutor(4) as pool:
        beside = [pool.submit(world.run, ended), pool.submit(listen), pool.submit(observe)]
        beside.append(pool.submit(schemathesis_until, end, schemathesis, port))
        try:
            asked = ask_until(end, port)
            tested = beside[-1].result()
        finally:
            ended.set()
            assert gateway.stdin is not None
            gateway.stdin.close()
        assert gateway.wait(30) == 0
        for future in beside:
            future.result()
    said = (folder / "gateway.log").read_text()
    warm = lines[len(lines) // 10]
    grown = max(line["bytes"] for line in lines[len(lines) // 10 :]) - warm["bytes"]
    statuses = {int(status): count for status, count in lines[-1]["statuses"].items()}
    print(f"\nasked {dict(asked)}; Schemathesis {tested} cases; all answers {statuses}; {world.engines} engines")
    print(f"world {dict(world.told)}; compared {dict(judge.compared)}; grown by {grown / 2**20:.1f} MiB")
    assert judge.lies == []
    assert lines[-1]["raised"] == [] and "Exception in ASGI application" not in said
    assert not {status for status in statuses if status >= 500 and status != 503}
    assert grown < ROOM
    assert {"ready", "an engine is gone", "a store", "well"} <= set(judge.compared)
    assert minutes < 5 or (min(judge.compared.values()) > 10 and len(judge.compared) == 8)
    assert {200, 400, 401, 404, 503} <= set(asked)


def ask_until(end: float, port: int) -> Counter[int]:
    """Requests drawn from the description, one after another; how many had which status."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    seen: Counter[int] = Counter()
    number = SEED * 1_000_000
    while time.monotonic() < end:
        number += 1

        @seed(number)
        @settings(
            max_examples=300,
            deadline=None,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(requests())
        def ask(request: tuple[str, str, bytes, dict[str, str]]) -> None:
            method, path, content, headers = request
            connection.request(method, path, content, headers)
            answer = connection.getresponse()
            body = answer.read()
            seen[answer.status] += 1
            assert answer.status in {200, 400, 401, 404, 405, 413, 503}, body
            if answer.status != 200 and path.partition("?")[0] != "/ready":
                assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}

        ask()
    return seen


def schemathesis_until(end: float, program: Path, port: int) -> int:
    """Schemathesis again and again, each time with another seed; how many cases it made."""
    environment = {**os.environ, "no_proxy": "127.0.0.1", "DO_NOT_TRACK": "1"}
    environment.pop("PYTHONPATH", None)
    command = [program, "run", "openapi.json", "--url", f"http://127.0.0.1:{port}", "--no-color"]
    command += ["--header", "Authorization: Bearer k", "--max-examples", "100", "--continue-on-failure"]
    command += ["--checks", "all", "--exclude-checks", f"{ENGINES_CHECKS},not_a_server_error"]
    number, cases = SEED * 1_000_000, 0
    while (left := end - time.monotonic()) > 20:
        number += 1
        ended = subprocess.run(
            [*command, "--seed", str(number), "--max-time", str(int(min(left, 120)))],
            cwd=program.parents[2],
            env=environment,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
        cases += sum(int(count) for count in re.findall(r"(\d+) generated", ended.stdout))
    return cases
