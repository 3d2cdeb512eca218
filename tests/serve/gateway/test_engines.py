"""The gateway and its engines: which is asked, and what happens where one dies, leaves or is replaced."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import pytest
import requests

from serve.adapter_registry import publish, remove, set_alias
from tests.serve.fake_engine import Start, error_of
from tests.small_adapter import write_adapter, write_model

DEAD = "http://127.0.0.1:9"
"""Where nothing listens."""


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", write_model(tmp_path / "base"))


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    folder = tmp_path / "registry"
    folder.mkdir()
    return folder


def test_a_client_that_leaves_stops_the_engine(start: Start) -> None:
    running = start()
    with pytest.raises(requests.Timeout):
        requests.post(f"{running.url}/v1/completions", json={"model": "base", "prompt": "wait 20"}, timeout=0.5)
    until = time.monotonic() + 60
    while (running.engine.disconnects == 0 or running.gateway.limiter.admission.in_flight) and time.monotonic() < until:
        time.sleep(0.02)
    assert running.engine.disconnects == 1
    assert running.gateway.limiter.admission.in_flight == 0


def test_an_answer_that_its_client_leaves_is_counted(start: Start) -> None:
    running = start(tokens_per_minute=1)
    body = {"model": "base", "prompt": "drip", "stream": True}
    with requests.post(f"{running.url}/v1/completions", json=body, stream=True, timeout=20) as answer:
        next(answer.iter_content(1))
    running.wait_for_count('danlu_requests_total{model="base",status="499"} 1.0')
    assert running.complete().status_code == 429


def test_a_client_that_leaves_the_queue_is_counted_and_its_place_is_free(start: Start) -> None:
    running = start(max_in_flight=1, max_queued=1)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(running.complete, "wait 1.5")
        running.wait_for_count('danlu_requests_in_flight{model="base"} 1.0')
        with pytest.raises(requests.Timeout):
            requests.post(f"{running.url}/v1/completions", json={"model": "base", "prompt": "hi"}, timeout=0.3)
        running.wait_for_count('danlu_requests_total{model="base",status="499"} 1.0')
        assert running.complete().status_code == first.result().status_code == 200
    assert [body["prompt"] for body in running.engine.bodies] == ["wait 1.5", "hi"]


def test_a_dead_engine_is_503_at_once_and_used_again_when_it_is_back(start: Start) -> None:
    running = start()
    running.live({"r2": DEAD})
    began = time.monotonic()
    for _ in range(2):
        answer = running.complete(stream=True)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
    assert time.monotonic() - began < 1
    assert running.get("/ready").json() == {"ready": False, "missing": ["base"], "stale": []}
    running.live({"r2": DEAD, "r3": running.engine_url})
    assert running.complete().status_code == 200
    assert running.get("/ready").status_code == 200


def test_an_error_of_an_engine_that_lives_is_the_answer_and_of_one_whose_core_died_is_not(start: Start) -> None:
    running = start(engines=2)
    running.live({"r1": running.engine_url})
    assert (running.complete("fail").status_code, running.get("/ready").status_code) == (500, 200)
    running.engine.healthy = False
    running.live({"r1": running.engine_url}, beat=2)
    assert running.complete("fail").status_code == 503
    for beat in (3, 4):
        running.live(dict(zip(("r1", "r2"), running.engine_urls, strict=True)), beat=beat)
    assert running.complete("fail").status_code == 500  # the other one's
    assert [len(engine.bodies) for engine in running.engines] == [3, 1]


def test_requests_wait_for_the_successor_of_an_engine_stopped_on_purpose(start: Start) -> None:
    running = start(max_in_flight=2, max_queued=2)
    running.live({"r1": running.engine_url}, retired="r1", beat=2)
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(running.complete) for _ in range(4)]
        time.sleep(0.5)
        assert not any(future.done() for future in waiting)
        refused = running.complete()
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        running.live({"r2": running.engine_url}, retired="r1")
        assert [future.result().status_code for future in waiting] == [200] * 4
    running.live({}, retired="r1")  # the successor died: that is no replacement
    assert running.complete().status_code == 503


def test_requests_that_wait_are_refused_when_the_gateway_stops(start: Start) -> None:
    running = start()
    running.live({}, retired="r1")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(running.complete)
        time.sleep(0.3)
        running.gateway.stopping = True
        assert waiting.result().status_code == 503


def test_a_renewal_from_before_an_engine_s_death_does_not_make_it_usable(start: Start) -> None:
    running = start()
    for beat in (1, 2):
        running.live({"r2": DEAD}, beat=beat)
        assert running.complete().status_code == 503
        assert running.get("/ready").json()["missing"] == ["base"]
    running.live({"r2": DEAD}, beat=3)
    assert running.get("/ready").json()["missing"] == []  # it lives, and says so


def test_another_replica_answers_where_one_has_died(start: Start) -> None:
    running = start()
    for beat in range(1, 6):
        running.live({"r2": DEAD, "r3": running.engine_url}, beat=beat)
        assert running.complete().status_code == 200


def test_an_engine_that_breaks_one_answer_off_goes_on_answering_others(start: Start) -> None:
    running = start(engines=2)
    assert running.complete("cut").status_code == 503
    assert [len(engine.bodies) for engine in running.engines] == [1, 1]  # each tried it once
    assert b"[DONE]" not in running.complete("die", stream=True).content
    assert running.get("/ready").status_code == 200
    assert running.complete().status_code == 200
    running.engine.healthy = running.engines[1].healthy = False  # their cores have died
    assert running.complete("cut").status_code == 503
    assert running.get("/ready").json()["missing"] == ["base"]
    assert running.complete().status_code == 503


def test_a_stream_broken_in_the_middle_ends_with_an_error_and_without_done(start: Start) -> None:
    running = start()
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0)
    texts = []
    with pytest.raises(openai.APIError, match="No engine serves 'base' at the moment"):
        for part in client.completions.create(model="base", prompt="die", stream=True):
            texts.append(part.choices[0].text)
    assert texts == ["o"]
    assert b"[DONE]" not in running.complete("die", stream=True).content


def test_published_adapters_are_served_at_once_by_version_and_by_alias(
    start: Start, adapter: Path, registry: Path
) -> None:
    running = start(registry=str(registry))
    assert running.complete(model="persona").status_code == 404
    assert publish(adapter, registry, "persona") == "persona@1"
    assert [running.complete(model=name).json()["model"] for name in ("persona", "persona@1")] == ["persona@1"] * 2
    publish(adapter, registry, "persona")
    running.gateway.published.read()
    assert running.complete(model="persona").json()["model"] == "persona@2"
    set_alias(registry, "persona", "persona@1")
    remove(registry, "persona@2")
    running.gateway.published.read()
    assert running.complete(model="persona").json()["model"] == "persona@1"
    assert running.complete(model="persona@2").status_code == 404


def test_a_version_replaced_and_removed_under_load_fails_no_request_at_any_replica(
    start: Start, adapter: Path, registry: Path
) -> None:
    running, stop = start(registry=str(registry), engines=2), threading.Event()
    statuses: list[int] = []

    def ask() -> None:
        while not stop.is_set():
            statuses.append(running.complete("wait 0.02", model="persona").status_code)

    publish(adapter, registry, "persona")
    with ThreadPoolExecutor(8) as pool:
        clients = [pool.submit(ask) for _ in range(8)]
        time.sleep(0.5)
        publish(adapter, registry, "persona")
        running.gateway.published.read()
        remove(registry, "persona@1")
        time.sleep(0.5)
        stop.set()
    assert [client.exception() for client in clients] == [None] * 8
    assert set(statuses) == {200}
    for engine in running.engines:
        assert {body["model"] for body in engine.bodies} == {"persona@1", "persona@2"}
        assert engine.bodies[-1]["model"] == "persona@2"
