"""Killing the endpoint's processes with -9: what fails, how fast, and that nothing stays behind."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import pytest
import requests

pytest.importorskip("vllm")

from ray import serve as ray_serve

from serve import directory
from serve.app import ServedModel, applications, claim_port, deploy, endpoint, wait_until_ready
from serve.listener import GatewayPlan
from serve.section import Engine, Limits, Serve

pytestmark = pytest.mark.slow

SECTION = Serve(engine=Engine(max_model_len=512, kv_cache_memory_bytes=64 << 20))

DRIVER = """
import sys, time, ray
from serve.app import ServedModel, endpoint
from serve.section import Engine, Serve
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
                whole = answer.status_code == 200 and (not streamed or answer.content.endswith(b"data: [DONE]\n\n"))
                result = "ok" if whole else str(answer.status_code) if answer.status_code != 200 else "broken"
            except requests.RequestException:
                result = "no connection"
            self.answers.append((began, time.monotonic(), result))
            if result != "ok":
                time.sleep(0.1)

    def run(self, clients: int = 6) -> list[threading.Thread]:
        threads = [threading.Thread(target=self.ask, args=(n % 2 == 0,)) for n in range(clients)]
        for thread in threads:
            thread.start()
        return threads


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


@pytest.mark.parametrize("victim", ["VLLM::EngineCore", "serve.engine_server", ":engine-base", ":gateway"])
def test_what_is_killed_comes_back_and_only_requests_there_fail(started: tuple[str, float], victim: str) -> None:
    url, cold_start = started
    load = Load(url)
    threads = load.run()
    time.sleep(3)
    (process,) = below(psutil.Process(), victim)
    killed = time.monotonic()
    process.kill()
    recovered = killed + 2 * cold_start + 5
    while time.monotonic() < recovered and not any(b > killed + 1 and r == "ok" for b, _, r in load.answers):
        time.sleep(0.1)
    time.sleep(3)
    load.stop.set()
    for thread in threads:
        thread.join()

    failures = [answer for answer in load.answers if answer[2] != "ok"]
    in_flight = [answer for answer in failures if answer[0] < killed]
    later = [answer for answer in failures if answer[0] >= killed]
    assert len(in_flight) <= len(threads)
    assert not [answer for answer in load.answers if answer[1] < killed and answer[2] != "ok"]
    expected = {"no connection"} if victim == ":gateway" else {"503"}
    assert {result for _, _, result in later} <= expected
    assert max((ended - began for began, ended, _ in later), default=0) < 1
    assert max((ended for _, ended, _ in failures), default=killed) < recovered
    assert load.answers[-1][2] == "ok"


def test_an_engine_deployed_anew_under_load_loses_no_request(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    app, port = "danlu-anew", claim_port("127.0.0.1", None)
    models = [ServedModel("base", str(tiny_model))]
    plan = GatewayPlan(app, models, directory.shared_key(app), (), Limits(), "127.0.0.1", port)
    targets = applications(plan, SECTION, tmp_path)
    try:
        deploy(targets, app)
        wait_until_ready("127.0.0.1", port)
        load = Load(f"http://127.0.0.1:{port}/v1")
        threads = load.run(12)
        time.sleep(3)
        before = {process.pid for process in below(psutil.Process(), "serve.engine_server")}
        engine = SECTION.engine.model_copy(update={"max_num_seqs": 16})
        changed = applications(plan, SECTION.model_copy(update={"engine": engine}), tmp_path)
        deploy({f"{app}-base": changed[f"{app}-base"]}, app)
        wait_until_ready("127.0.0.1", port)
        time.sleep(3)
        load.stop.set()
        for thread in threads:
            thread.join()
        after = {process.pid for process in below(psutil.Process(), "serve.engine_server")}
    finally:
        for name in reversed(targets):
            ray_serve.delete(name)
        directory.forget(app)
    assert (len(before - after), len(after - before)) == (1, 1)
    assert {result for _, _, result in load.answers} == {"ok"}
    assert max(ended - began for began, ended, _ in load.answers) > 1  # some waited for the new engine


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
        assert any("serve.engine_server" in " ".join(process.cmdline()) for process in family)
        os.killpg(driver.pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=30)
    assert [" ".join(process.cmdline())[:80] for process in alive if process.status() != psutil.STATUS_ZOMBIE] == []
