"""Killing the endpoint's processes with -9: what fails, how fast, and that nothing stays behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import requests

pytest.importorskip("vllm")

from ray import serve as ray_serve

from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Engine, Limits, Serve
from serve import discovery
from serve.app import applications, claim_port, deploy, endpoint, wait_until_ready
from serve.gateway.gateway_replica import GatewayPlan

pytestmark = pytest.mark.slow

CLIENTS = 6
SECTION = Serve(engine=Engine(max_model_len=512, kv_cache_memory_bytes=64 << 20))

DRIVER = """
import sys, time, ray
from pipelines.models.served import ServedModel
from serve.app import endpoint
from pipelines.recipe.serve import Engine, Serve
ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=300 << 20, log_to_driver=False)
with endpoint([ServedModel("base", sys.argv[1])], Serve(engine=Engine(kv_cache_memory_bytes=64 << 20))) as url:
    print("at", url, flush=True)
    time.sleep(600)
"""


@dataclass
class Load:
    """Clients that ask again and again; what each request came to, and when it began and ended."""

    url: str
    answers: list[tuple[float, float, str]] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    def ask(self, streamed: bool) -> None:
        body = {"model": "base", "prompt": "hi", "max_tokens": 60, "ignore_eos": True, "stream": streamed}
        while not self.stop.is_set():
            began = time.monotonic()
            try:
                answer = requests.post(f"{self.url}/completions", json=body, timeout=120)
                result = outcome(answer, streamed)
            except requests.RequestException:
                result = "no connection"
            self.answers.append((began, time.monotonic(), result))
            if result != "ok":
                time.sleep(0.1)

    @contextmanager
    def from_clients(self, count: int) -> Iterator[None]:
        """So many clients ask for the length of a block; half of them take streams."""
        threads = [threading.Thread(target=self.ask, args=(n % 2 == 0,)) for n in range(count)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self.stop.set()
            for thread in threads:
                thread.join()


def outcome(answer: requests.Response, streamed: bool) -> str:
    """What a client got: an answer, one that broke off, or an error with its code."""
    if answer.status_code != 200:
        error = answer.json()["error"]
        return f"{answer.status_code} {error['code']}, again after {answer.headers.get('retry-after')} s"
    return "ok" if not streamed or answer.content.endswith(b"data: [DONE]\n\n") else "broken"


@pytest.fixture(scope="module")
def started(
    ray_cluster: None, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, float]]:
    """The endpoint's address and its cold start in seconds."""
    began = time.monotonic()
    with endpoint([ServedModel("base", str(tiny_model))], SECTION, log_dir=tmp_path_factory.mktemp("logs")) as url:
        yield url, time.monotonic() - began


def below(process: psutil.Process, text: str) -> list[psutil.Process]:
    """Processes below another whose command line holds a text."""
    found = []
    for child in process.children(recursive=True):
        try:
            if child.status() != psutil.STATUS_ZOMBIE and text in " ".join(child.cmdline()):
                found.append(child)
        except psutil.NoSuchProcess:
            continue
    return found


def find(role: str) -> psutil.Process:
    """The process of a role. An engine's core is a fork of its server, under the server's name or one of its own."""
    if role in ("engine-base", "gateway"):
        (found,) = below(psutil.Process(), f":{role}")
        return found
    parent = find("engine-base") if role == "server" else find("server")
    names = ("serve.engine.server", "VLLM::EngineCore")
    (found,) = [child for child in parent.children() if any(name in " ".join(child.cmdline()) for name in names)]
    return found


@pytest.mark.parametrize("victim", ["core", "server", "engine-base", "gateway"])
def test_what_is_killed_comes_back_and_only_requests_there_fail(started: tuple[str, float], victim: str) -> None:
    url, cold_start = started
    load = Load(url)
    with load.from_clients(CLIENTS):
        time.sleep(3)
        process, scratch = find(victim), Path(find("server").environ()["TMPDIR"])
        killed = time.monotonic()
        process.kill()
        recovered = killed + 2 * cold_start
        while time.monotonic() < recovered and not any(b > killed + 1 and r == "ok" for b, _, r in load.answers):
            time.sleep(0.1)
        time.sleep(3)

    failures = [answer for answer in load.answers if answer[2] != "ok"]
    answered = min(ended for began, ended, result in load.answers if began >= killed and result == "ok")
    print(f"{victim}: cold start {cold_start:.1f} s, answers again {answered - killed:.1f} s after it was killed")
    in_flight = [answer for answer in failures if answer[0] < killed]
    later = [answer for answer in failures if answer[0] >= killed]
    assert len(in_flight) <= CLIENTS
    assert not [answer for answer in load.answers if answer[1] < killed and answer[2] != "ok"]
    expected = {"no connection"} if victim == "gateway" else {"503 engine_unavailable, again after 2 s"}
    assert {result for _, _, result in later} <= expected
    assert max((ended - began for began, ended, _ in later), default=0) < 1
    assert max((ended for _, ended, _ in failures), default=killed) < recovered
    assert load.answers[-1][2] == "ok"
    assert scratch.exists() == (victim == "gateway")  # that of an engine goes with it, or when the next one starts


def test_an_engine_deployed_anew_under_load_loses_no_request(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    app, port = "danlu-anew", claim_port("127.0.0.1", None)
    models = [ServedModel("base", str(tiny_model))]
    plan = GatewayPlan(app, models, discovery.shared_key(app), (), Limits(), "127.0.0.1", port)
    targets = applications(plan, SECTION, tmp_path)
    try:
        deploy(targets, app)
        wait_until_ready("127.0.0.1", port)
        load = Load(f"http://127.0.0.1:{port}/v1")
        with load.from_clients(2 * CLIENTS):
            time.sleep(3)
            before = {process.pid for process in below(psutil.Process(), "serve.engine.server")}
            engine = SECTION.engine.model_copy(update={"max_num_seqs": 16})
            changed = applications(plan, SECTION.model_copy(update={"engine": engine}), tmp_path)
            deploy({f"{app}-base": changed[f"{app}-base"]}, app)
            wait_until_ready("127.0.0.1", port)
            time.sleep(3)
        after = {process.pid for process in below(psutil.Process(), "serve.engine.server")}
    finally:
        for name in reversed(targets):
            ray_serve.delete(name)
        discovery.forget(app)
    assert before - after and after - before  # beside them the endpoint of the other tests may run
    assert {result for _, _, result in load.answers} == {"ok"}
    waited = max(ended - began for began, ended, _ in load.answers)
    print(f"deployed anew: {len(load.answers)} requests, all answered, the slowest after {waited:.1f} s")
    assert waited > 1  # some waited for the new engine


def test_after_the_driver_s_group_is_killed_nothing_stays(tiny_model: Path) -> None:
    project = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(project)}
    with subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tiny_model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment,
        start_new_session=True,
    ) as driver:
        assert driver.stdout is not None
        url = next(line.split()[1] for line in driver.stdout if line.startswith("at "))
        assert requests.get(f"{url}/models", timeout=10).status_code == 200
        family = psutil.Process(driver.pid).children(recursive=True)
        assert any("serve.engine.server" in " ".join(process.cmdline()) for process in family)
        os.killpg(driver.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [" ".join(process.cmdline())[:80] for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
