"""Several gateways of one application: limits hold for all of them together, and one that dies takes only its own."""

import hashlib
import secrets
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import ray
import requests

from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Limits
from serve import discovery
from serve.app import claim_port, wait_until_ready
from serve.discovery import NAMESPACE, EngineRecord
from serve.gateway.gateway_replica import GatewayPlan, GatewayReplica
from serve.gateway.shared_limits import GONE_SECONDS, end_keepers
from tests.serve.fake_engine import Engine, Serving

KEYS = {name: {"authorization": f"Bearer {name}"} for name in ("a", "b")}


class Holder:
    """A process with a gateway. (Ray's wrapper of a class calls its `__del__`, as Ray Serve's does not.)"""

    def __init__(self, plan: GatewayPlan) -> None:
        self._replica = GatewayReplica(plan)


@dataclass
class Gateways:
    """Two gateways, each an actor in a process of its own, before one engine."""

    urls: list[str]
    actors: list[Any]

    def ask(self, number: int, key: str = "a", prompt: str = "hi", **more: Any) -> requests.Response:
        body = {"model": "base", "prompt": prompt, **more}
        return requests.post(f"{self.urls[number]}/v1/completions", json=body, headers=KEYS[key], timeout=30)

    def in_flight(self) -> int:
        (name,) = [n["name"] for n in ray.util.list_named_actors(all_namespaces=True) if "-limits-" in n["name"]]
        return int(ray.get(ray.get_actor(name, NAMESPACE).in_flight.remote()))


@contextmanager
def gateways(serving: Serving, **limits: Any) -> Iterator[Gateways]:
    app = f"danlu-{secrets.token_hex(4)}"
    models = [ServedModel("base", "/models/base")]
    keys = tuple(hashlib.sha256(name.encode()).digest() for name in KEYS)
    ends = threading.Event()
    with serving(Engine()) as engine:
        plan = GatewayPlan(app, models, "key", keys, Limits(**limits), "127.0.0.1", 0, is_one_of_many=True)

        def beat() -> None:
            number = 0
            while not ends.wait(discovery.BEAT_SECONDS):
                discovery.announce(app, EngineRecord("r1", "base", engine, number := number + 1))

        discovery.announce(app, EngineRecord("r1", "base", engine, 0))
        threading.Thread(target=beat, daemon=True).start()
        ports = [claim_port("127.0.0.1", None) for _ in range(2)]
        actor = ray.remote(Holder).options(num_cpus=0)
        actors = [actor.remote(replace(plan, port=port)) for port in ports]
        try:
            for port in ports:
                wait_until_ready("127.0.0.1", port)
            yield Gateways([f"http://127.0.0.1:{port}" for port in ports], actors)
        finally:
            ends.set()
            for one in actors:
                ray.kill(one)
            discovery.forget(app)
            end_keepers(app)


@pytest.mark.usefixtures("ray_cluster")
def test_requests_per_minute_are_counted_over_both_for_each_key(serving: Serving) -> None:
    with gateways(serving, requests_per_minute=10) as two:
        statuses = [two.ask(number % 2).status_code for number in range(14)]
        assert statuses == [200] * 10 + [429] * 4
        refused = two.ask(1)
        assert refused.json()["error"]["code"] == "rate_limit_exceeded" and int(refused.headers["retry-after"]) >= 1
        assert two.ask(1, key="b").status_code == 200


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_tokens_of_one_gateways_answers_are_missing_at_the_other(serving: Serving) -> None:
    with gateways(serving, tokens_per_minute=5) as two:
        assert two.ask(0).status_code == 200  # the engine counts five
        time.sleep(0.2)
        assert two.ask(1).status_code == 429


@pytest.mark.usefixtures("ray_cluster")
def test_places_are_shared_and_those_of_a_gateway_that_dies_fall_free(serving: Serving) -> None:
    with (
        gateways(serving, max_in_flight=4, max_in_flight_per_key=3, max_queued=2) as two,
        ThreadPoolExecutor(8) as pool,
    ):
        held = [pool.submit(two.ask, number % 2, "a", "wait 20") for number in range(3)]
        while two.in_flight() < 3:
            time.sleep(0.05)
        waits = pool.submit(two.ask, 1, "a")  # the fourth of its key
        assert two.ask(1, key="b").status_code == 200
        time.sleep(0.3)
        assert not waits.done()
        ray.kill(two.actors[0])  # which holds two of the three
        began = time.monotonic()
        assert waits.result().status_code == 200
        assert time.monotonic() - began < GONE_SECONDS + 5
        assert [isinstance(one.exception(), requests.ConnectionError) for one in (held[0], held[2])] == [True, True]
        assert not held[1].done()
        held[1].cancel()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_client_that_leaves_the_queue_gives_its_turn_away(serving: Serving) -> None:
    with gateways(serving, max_in_flight=1, max_queued=1) as two, ThreadPoolExecutor(2) as pool:
        first = pool.submit(two.ask, 0, "a", "wait 3")
        while two.in_flight() < 1:
            time.sleep(0.05)
        with pytest.raises(requests.ReadTimeout):
            requests.post(
                f"{two.urls[1]}/v1/completions",
                json={"model": "base", "prompt": "hi"},
                headers=KEYS["a"],
                timeout=0.5,
            )
        time.sleep(0.3)
        assert two.ask(1, key="b").status_code == 200  # there is room in the queue again
        assert first.result().status_code == 200


@pytest.mark.usefixtures("ray_cluster")
def test_no_keeper_stays_though_its_gateways_were_killed(serving: Serving) -> None:
    with gateways(serving) as two:
        assert two.ask(0).status_code == 200
        two.in_flight()  # of the one keeper there is
    until = time.monotonic() + 60
    while [n for n in ray.util.list_named_actors(all_namespaces=True) if "-limits-" in n["name"]]:
        assert time.monotonic() < until
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_keeper_that_dies_is_started_again_and_gateways_go_on(serving: Serving) -> None:
    with gateways(serving, requests_per_minute=5) as two:
        assert [two.ask(0).status_code for _ in range(6)] == [200] * 5 + [429]
        (name,) = [n["name"] for n in ray.util.list_named_actors(all_namespaces=True) if "-limits-" in n["name"]]
        ray.kill(ray.get_actor(name, NAMESPACE), no_restart=False)
        until = time.monotonic() + 60
        while (code := two.ask(0).status_code) == 429 and time.monotonic() < until:  # it is not dead yet
            time.sleep(0.1)
        assert (code, two.ask(1).status_code) == (200, 200)
