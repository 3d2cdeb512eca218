"""Who an engine answers: its gateway alone, on every path."""

import asyncio
import hashlib
import importlib
from pathlib import Path
from typing import Any

import pytest
import requests

from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Engine
from serve.engine.command import EnginePlan, environment, vllm_arguments
from serve.engine.replica import start_process, wait_until_healthy
from tests.serve.fake_engine import Serving

SECRET = "the-engine-s-key"
PATHS = {
    "/health": True,
    "/metrics": True,
    "/v1/completions": False,
    "/invocations": False,
    "/tokenize": False,
    "/healthy": False,
    "/health/": False,
    "//health": False,
    "/metrics/../invocations": False,
}


async def anything(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"answered"})


def plan(path: str = "/m") -> EnginePlan:
    engine = Engine(max_model_len=256, kv_cache_memory_bytes=64 << 20)
    return EnginePlan("app", ServedModel("base", path), engine, 0, "127.0.0.1", SECRET, "/logs")


def guarded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The middleware as vLLM makes it of the engine's arguments and environment."""
    arguments = vllm_arguments(plan())
    module, name = arguments[arguments.index("--middleware") + 1].rsplit(".", 1)
    monkeypatch.setenv("VLLM_API_KEY", environment(plan())["VLLM_API_KEY"])
    return getattr(importlib.import_module(module), name)(anything)


@pytest.mark.parametrize("path", PATHS)
def test_every_path_but_health_and_metrics_asks_for_the_key(
    serving: Serving, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    with serving(guarded(monkeypatch)) as url:

        def ask(method: str = "POST", **headers: str) -> int:
            request = requests.Request(method, url, headers=headers).prepare()
            request.url = url + path  # as it is: requests would shorten it
            return requests.Session().send(request, timeout=20).status_code

        unknown = 200 if PATHS[path] else 401
        assert [ask(), ask("OPTIONS"), ask(authorization="Bearer x"), ask(authorization=SECRET)] == [unknown] * 4
        assert ask(authorization=f"Bearer {hashlib.sha256(SECRET.encode()).hexdigest()}") == unknown
        assert ask(authorization=f"Bearer {SECRET}") == 200


def test_a_websocket_without_the_key_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    asyncio.run(guarded(monkeypatch)(scope, None, send))
    assert sent == [{"type": "websocket.close", "code": 1008}]


@pytest.mark.slow
def test_vllm_asks_for_the_key_where_its_own_check_does_not(tiny_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process, port = start_process(plan(str(tiny_model)), tmp_path / "log", str(scratch))
    url, key = f"http://127.0.0.1:{port}", {"authorization": f"Bearer {SECRET}"}
    try:
        wait_until_healthy(process, url)
        body = {"model": "base", "prompt": "x", "max_tokens": 2}
        for path in ("/invocations", "/v1/completions"):
            assert requests.post(url + path, json=body, timeout=60).status_code == 401
            answer = requests.post(url + path, json=body, headers=key, timeout=60)
            assert answer.json()["usage"]["completion_tokens"] == 2
        assert requests.get(f"{url}/openapi.json", timeout=60).status_code == 401
        assert "vllm:num_requests_running" in requests.get(f"{url}/metrics", timeout=60).text
    finally:
        process.terminate()
        process.wait(60)
