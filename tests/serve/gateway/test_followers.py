"""What a gateway and an engine do while Ray's store or the registry cannot be read: they go on, and health says so."""

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Limits
from serve import adapter_registry, discovery
from serve.app import claim_port
from serve.discovery import EngineRecord
from serve.engine import replica
from serve.engine.replica import EngineReplica
from serve.gateway import app, gateway_replica, published
from serve.gateway.gateway_replica import GatewayPlan, GatewayReplica
from tests.serve.fake_engine import Engine, Serving


class Store:
    """Ray's store as the gateway reads it, with faults: what `fail` names raises."""

    def __init__(self) -> None:
        self.records: list[EngineRecord] = []
        self.fail: BaseException | None = None
        self.reads = 0
        self.renewed = True

    def find_engines(self, _: str) -> tuple[list[EngineRecord], dict[str, str]]:
        self.reads += 1
        if self.fail is not None:
            raise self.fail
        if self.renewed:
            self.records = [EngineRecord(r.replica, r.model, r.url, self.reads) for r in self.records]
        return self.records, {}


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setattr(discovery, "find_engines", made.find_engines)
    monkeypatch.setattr(discovery, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(app, "STALE_SECONDS", 0.5)
    monkeypatch.setattr(gateway_replica, "BLIND_SECONDS", 0.6)
    return made


@pytest.fixture
def gateway(store: Store, tmp_path: Path) -> Iterator[GatewayReplica]:
    models = [ServedModel("base", "/models/base", registry=str(tmp_path / "registry"))]
    plan = GatewayPlan("app", models, "secret", (), Limits(), "127.0.0.1", claim_port("127.0.0.1", None))
    made = GatewayReplica(plan)
    yield made
    made.__del__()


def answer(gateway: GatewayReplica, path: str, **body: Any) -> requests.Response:
    url = f"http://127.0.0.1:{gateway._plan.port}{path}"
    return requests.post(url, json=body, timeout=5) if body else requests.get(url, timeout=5)


def wait_for(condition: Any) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


def is_ready(gateway: GatewayReplica) -> bool:
    try:
        return answer(gateway, "/ready").status_code == 200
    except requests.ConnectionError:
        return False


@pytest.mark.parametrize("fault", [RuntimeError("the store is away"), ValueError("?"), TimeoutError(), KeyError("x")])
def test_a_store_that_fails_for_a_while_does_not_end_the_follower(
    gateway: GatewayReplica, store: Store, serving: Serving, fault: Exception
) -> None:
    with serving(Engine()) as first, serving(Engine()) as second:
        store.records = [EngineRecord("r1", "base", first)]
        wait_for(lambda: is_ready(gateway))
        asyncio.run(gateway.check_health())
        store.fail = fault
        wait_for(lambda: not is_ready(gateway))
        assert answer(gateway, "/ready").json()["stale"] == ["engines"]
        assert answer(gateway, "/v1/completions", model="base", prompt="hi").status_code == 200  # as it was seen last
        time.sleep(0.3)
        with pytest.raises(RuntimeError, match="has not seen the list of engines"):
            asyncio.run(gateway.check_health())
        store.fail, store.records = None, [EngineRecord("r2", "base", second)]  # deployed anew in the meantime
        wait_for(lambda: is_ready(gateway))
        asyncio.run(gateway.check_health())
        assert answer(gateway, "/v1/completions", model="base", prompt="hi").status_code == 200


def test_a_registry_that_fails_is_told_and_stops_neither_engines_nor_replica(
    gateway: GatewayReplica, store: Store, serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: str) -> Any:
        raise OSError(5, "Input/output error")

    with serving(Engine()) as url:
        store.records = [EngineRecord("r1", "base", url)]
        wait_for(lambda: is_ready(gateway))
        with monkeypatch.context() as hiccup:
            hiccup.setattr(adapter_registry, "versions", broken)
            wait_for(lambda: answer(gateway, "/ready").json()["stale"] == ["adapters"])
            asyncio.run(gateway.check_health())
            assert is_ready(gateway)  # a balancer must not take every gateway away because a disk is slow
            assert answer(gateway, "/v1/completions", model="base", prompt="hi").status_code == 200
        wait_for(lambda: answer(gateway, "/ready").json()["stale"] == [])


@pytest.mark.parametrize("fault", [RuntimeError("the store is away"), TimeoutError(), OSError(5, "?"), "hangs"])
def test_an_engine_that_dies_while_the_store_fails_is_unavailable(
    gateway: GatewayReplica, store: Store, serving: Serving, fault: BaseException | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "PATIENCE_SECONDS", 0.3)
    ended = threading.Event()

    def find(_: str) -> Any:
        if isinstance(fault, BaseException):
            raise fault
        ended.wait(30)
        raise RuntimeError("it hung")

    with serving(Engine()) as url:
        store.records = [EngineRecord("r1", "base", url)]
        wait_for(lambda: is_ready(gateway))
        monkeypatch.setattr(discovery, "find_engines", find)
        time.sleep(0.2)  # a look that had begun ends
    assert answer(gateway, "/v1/completions", model="base", prompt="hi").status_code == 503
    assert not is_ready(gateway)
    ended.set()


@pytest.mark.parametrize("fault", [ValueError("?"), TimeoutError(), OSError(5, "Input/output error"), "hangs"])
def test_a_name_that_cannot_be_looked_up_is_not_called_unknown(
    gateway: GatewayReplica, store: Store, fault: BaseException | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(published, "PATIENCE_SECONDS", 0.3)
    ended, readings = threading.Event(), []

    def versions(_: str) -> Any:
        readings.append(time.monotonic())
        if isinstance(fault, BaseException):
            raise fault
        ended.wait(30)
        return []

    store.records = [EngineRecord("r1", "base", "http://127.0.0.1:9")]
    wait_for(lambda: is_ready(gateway))
    monkeypatch.setattr(adapter_registry, "versions", versions)
    for _ in range(5):
        said = answer(gateway, "/v1/completions", model="persona", prompt="hi")
        assert (said.status_code, said.json()["error"]["code"]) == (503, "registry_unavailable")
    assert isinstance(fault, BaseException) or len(readings) <= 2  # the follower's and one for all requests
    ended.set()


def test_an_engine_that_died_with_its_replica_is_missing_at_once_and_one_that_is_only_silent_is_not(
    gateway: GatewayReplica, store: Store, serving: Serving
) -> None:
    with serving(Engine()) as url:
        store.records = [EngineRecord("r1", "base", url)]
        wait_for(lambda: is_ready(gateway))
        store.renewed, looks = False, store.reads
        wait_for(lambda: store.reads > looks + 5)
        assert is_ready(gateway)  # its host is slow
    began = time.monotonic()
    wait_for(lambda: not is_ready(gateway))
    assert time.monotonic() - began < discovery.STALE_SECONDS / 2
    assert answer(gateway, "/ready").json()["missing"] == ["base"]
    with serving(Engine()) as url:
        store.renewed, store.records = True, [EngineRecord("r2", "base", url)]
        wait_for(lambda: is_ready(gateway))


def test_an_engine_that_came_and_went_while_the_store_was_away_is_never_ready(
    gateway: GatewayReplica, store: Store, serving: Serving
) -> None:
    with serving(Engine()) as url:
        store.records = [EngineRecord("r1", "base", url)]
        wait_for(lambda: is_ready(gateway))
        store.records = []
        wait_for(lambda: not is_ready(gateway))
    with serving(Engine()) as gone:
        pass
    store.renewed, store.records, looks = False, [EngineRecord("r2", "base", gone)], store.reads
    while store.reads < looks + 5:
        assert not is_ready(gateway)


def test_a_record_that_cannot_be_read_hides_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    good = json.dumps({"replica": "r1", "model": "base", "url": "http://x", "beat": 3})
    stored = {
        b"app/engine/r1": good.encode(),
        b"app/engine/r2": b"{",
        b"app/engine/r3": b'{"replica": "r3", "from": "a later version"}',
        b"app/retired/r0": b"base",
    }
    kv = SimpleNamespace(
        _internal_kv_list=lambda prefix, namespace: list(stored),
        _internal_kv_get=lambda key, namespace: stored[key.encode()],
    )
    monkeypatch.setattr(discovery, "internal_kv", kv)
    assert discovery.find_engines("app") == ([EngineRecord("r1", "base", "http://x", 3)], {"r0": "base"})


@pytest.fixture
def announcer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """An engine replica whose process lives, and whose announcements can be made to fail."""
    monkeypatch.setattr(discovery, "BEAT_SECONDS", 0.02)
    monkeypatch.setattr(replica, "SILENT_SECONDS", 0.3)
    monkeypatch.setattr(replica, "max_model_len", lambda url, key: 2048)
    ended = threading.Event()
    monkeypatch.setattr(replica, "end_of", lambda process: ended)
    made = EngineReplica.__new__(EngineReplica)
    made._plan = SimpleNamespace(app="app", key="k", model=SimpleNamespace(name="base"))  # type: ignore[assignment]
    made._replica, made._announcing, made._stopping = "r1", threading.Lock(), False
    made._announced = time.monotonic()
    made._process = SimpleNamespace(poll=lambda: None)  # type: ignore[assignment]
    thread = threading.Thread(target=made._announce_while_alive, args=(made._process, "http://x"))
    yield made, thread
    ended.set()
    thread.join(5)
    assert not thread.is_alive()
    made._process = None


def test_an_engine_that_loaded_for_long_is_well_before_its_first_announcement(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(replica, "SILENT_SECONDS", 0.3)
    process = SimpleNamespace(poll=lambda: None)
    monkeypatch.setattr(replica, "start_process", lambda *_: (process, 1))
    monkeypatch.setattr(replica, "wait_until_healthy", lambda *_: time.sleep(0.5))
    monkeypatch.setattr(EngineReplica, "_announce_while_alive", lambda *_: None)
    made = EngineReplica.__new__(EngineReplica)
    made._plan = SimpleNamespace(host="x", copy=None, model=SimpleNamespace(name="base"))  # type: ignore[assignment]
    made._started, made._stopping, made._error, made._announced = threading.Event(), False, None, time.monotonic()
    made._run_the_child(tmp_path / "log", "", ExitStack())
    asyncio.run(made.check_health())
    made._process = None


def test_an_announcer_survives_a_store_that_fails(announcer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made, thread = announcer
    announced: list[EngineRecord] = []
    is_away = threading.Event()

    def announce(_: str, record: EngineRecord) -> None:
        if is_away.is_set():
            raise RuntimeError("the store is away")
        announced.append(record)

    monkeypatch.setattr(discovery, "announce", announce)
    monkeypatch.setattr(discovery, "withdraw", announce)  # raises too: the thread must end all the same
    thread.start()
    wait_for(lambda: len(announced) > 2)
    assert announced[0].max_model_len == 2048
    asyncio.run(made.check_health())
    is_away.set()
    time.sleep(0.4)
    with pytest.raises(RuntimeError, match="the engine of base was not announced for"):
        asyncio.run(made.check_health())
    is_away.clear()
    seen = len(announced)
    wait_for(lambda: len(announced) > seen)
    asyncio.run(made.check_health())
    is_away.set()
