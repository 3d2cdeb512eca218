"""The gateway before a small engine that streams as vLLM's server does: names, errors, limits, deaths."""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import requests

from serve.adapters import publish, remove, set_alias
from serve.directory import EngineRecord
from serve.gateway import Gateway
from serve.listener import with_origins
from serve.metrics import Timing
from serve.models import ServedModel
from serve.section import Limits

Serving = Callable[..., AbstractContextManager[str]]
USAGE = {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2}


class Engine:
    """An engine whose prompts are orders: `wait N` waits N seconds, `drip` streams slowly, `die` breaks off."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.disconnects = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while (message := await receive())["type"] == "http.request":
            body += message["body"]
            if not message["more_body"]:
                break
        request = json.loads(body)
        self.bodies.append(request)
        self.headers.append(dict(scope["headers"]))
        order, _, argument = str(request.get("prompt", "")).partition(" ")
        if order == "wait":
            gone = asyncio.ensure_future(receive())
            done, _ = await asyncio.wait([gone], timeout=float(argument))
            gone.cancel()
            if done:
                self.disconnects += 1
                return
        kind = b"text/event-stream" if request.get("stream") else b"application/json"
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
        if not request.get("stream"):
            answer = {"model": request["model"], "choices": [{"index": 0, "text": "ok"}], "usage": USAGE}
            await send({"type": "http.response.body", "body": json.dumps(answer).encode()})
            return
        await self._stream(request, order, send)

    async def _stream(self, request: dict[str, Any], order: str, send: Any) -> None:
        base = {"id": "1", "object": "text_completion", "created": 1, "model": request["model"]}
        for text in ("o", "k"):
            content = {**base, "choices": [{"index": 0, "text": text, "finish_reason": None}]}
            await send({"type": "http.response.body", "body": frame(content), "more_body": True})
            if order == "drip":
                await asyncio.sleep(0.5)
            if order == "die":
                raise ConnectionAbortedError
        if request.get("stream_options", {}).get("include_usage"):
            usage = frame({**base, "choices": [], "usage": USAGE})
            await send({"type": "http.response.body", "body": usage, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


def frame(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


class Running:
    """A gateway with one engine, over HTTP."""

    def __init__(self, serving: Serving, engine: Engine, url: str, gateway: Gateway) -> None:
        self.serving, self.engine, self.url, self.gateway = serving, engine, url, gateway

    def complete(self, prompt: str = "hi", model: str = "base", **more: Any) -> requests.Response:
        headers = more.pop("headers", {})
        body = {"model": model, "prompt": prompt, **more}
        return requests.post(f"{self.url}/v1/completions", json=body, headers=headers, timeout=20)


@pytest.fixture
def start(serving: Serving, tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Start a gateway before one engine."""
    from contextlib import ExitStack

    with ExitStack() as stack:

        def run(keys: tuple[bytes, ...] = (), registry: str | None = None, **limits: Any) -> Running:
            model = ServedModel("base", "/models/base", {"wishes": "/adapters/wishes"}, registry)
            gateway = Gateway([model], "engine-secret", keys, Limits(**limits))

            @asynccontextmanager
            async def session() -> AsyncIterator[None]:
                async with aiohttp.ClientSession() as gateway.session:
                    yield

            engine = Engine()
            engine_url = stack.enter_context(serving(engine))
            gateway.update([EngineRecord("r1", "base", engine_url, 1)])
            return Running(serving, engine, stack.enter_context(serving(gateway, session)), gateway)

        yield run


def error_of(answer: requests.Response) -> dict[str, Any]:
    body = answer.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])


def test_an_answer_passes_unchanged_and_the_engine_sees_its_own_key(start: Callable[..., Running]) -> None:
    running = start()
    answer = running.complete(model="wishes", unknown_field=[1])
    assert answer.json() == {"model": "wishes", "choices": [{"index": 0, "text": "ok"}], "usage": USAGE}
    assert running.engine.bodies == [{"model": "wishes", "prompt": "hi", "unknown_field": [1]}]
    assert running.engine.headers[0][b"authorization"] == b"Bearer engine-secret"


def test_a_stream_carries_usage_in_its_last_frame_and_ends_with_done(start: Callable[..., Running]) -> None:
    running = start()
    lines = [line for line in running.complete(stream=True).content.split(b"\n\n") if line]
    assert lines[-1] == b"data: [DONE]"
    frames = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
    assert [f["choices"][0]["text"] for f in frames[:-1]] == ["o", "k"]
    assert frames[-1]["usage"] == USAGE
    assert running.engine.bodies[0]["stream_options"] == {"include_usage": True}


def test_models_are_listed_with_their_parent(start: Callable[..., Running]) -> None:
    client = openai.OpenAI(base_url=f"{start().url}/v1", api_key="x", max_retries=0)
    cards = [card.model_dump() for card in client.models.list()]
    assert [(card["id"], card["parent"]) for card in cards] == [("base", None), ("wishes", "base")]


@pytest.mark.parametrize("name", ["nope", "../base", "a/b", "", None, 7, ["base"]])
def test_an_unknown_model_is_404_and_never_reaches_an_engine(start: Callable[..., Running], name: Any) -> None:
    running = start()
    answer = running.complete(model=name)
    assert answer.status_code == 404
    assert error_of(answer) | {"message": ""} == {
        "message": "",
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert running.engine.bodies == []


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"base"', b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_not_a_json_object_is_400(start: Callable[..., Running], body: bytes) -> None:
    answer = requests.post(f"{start().url}/v1/chat/completions", data=body, timeout=20)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")


def test_wrong_paths_and_methods(start: Callable[..., Running]) -> None:
    url = start().url
    assert error_of(requests.get(f"{url}/v1/completions", timeout=20))["code"] == "method_not_allowed"
    assert requests.get(f"{url}/v1/load_lora_adapter", timeout=20).status_code == 404
    preflight = requests.options(f"{url}/v1/models", headers={"origin": "http://evil"}, timeout=20)
    assert preflight.status_code == 405
    assert "access-control-allow-origin" not in preflight.headers


def test_a_body_over_the_limit_is_413(start: Callable[..., Running]) -> None:
    running = start(max_body_bytes=1000)
    assert error_of(running.complete("x" * 1000))["code"] == "body_too_large"
    parts = (b"x" * 400 for _ in range(10))  # a generator is sent in chunks, without a declared length
    assert requests.post(f"{running.url}/v1/completions", data=parts, timeout=20).status_code == 413
    assert running.complete("x" * 500).status_code == 200


def test_without_a_valid_key_nothing_but_health_is_answered(start: Callable[..., Running]) -> None:
    running = start(keys=(hashlib.sha256(b"k1").digest(), hashlib.sha256(b"k2").digest()))
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic k1"}, {"authorization": "k1"}):
        answer = running.complete(headers=headers)
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert requests.get(f"{running.url}/v1/models", timeout=20).status_code == 401
    assert running.complete(headers={"authorization": "Bearer k2"}).status_code == 200
    assert requests.get(f"{running.url}/health", timeout=20).status_code == 200


def test_a_full_queue_is_429_and_those_before_it_are_answered(start: Callable[..., Running]) -> None:
    running = start(max_in_flight=1, max_queued=1)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(running.complete, "wait 1.0") for _ in range(2)]
        time.sleep(0.5)
        refused = running.complete()
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        counted = requests.get(f"{running.url}/metrics", timeout=20).text.splitlines()
        assert {'danlu_requests_in_flight{model="base"} 1.0', 'danlu_requests_queued{model="base"} 1.0'} <= set(counted)
        assert [future.result().status_code for future in waiting] == [200, 200]
    assert running.complete().status_code == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"prompt": "x" * 11}, "prompt_too_long"),
        ({"prompt": ["x" * 6, "y" * 6]}, "prompt_too_long"),
        ({"prompt": [1] * 11}, "prompt_too_long"),
        ({"messages": [{"content": [{"text": "x" * 11}]}]}, "prompt_too_long"),
        ({"max_tokens": 101}, "max_tokens_too_large"),
        ({"max_completion_tokens": 101, "max_tokens": 1}, "max_tokens_too_large"),
        ({"max_tokens": "101"}, "max_tokens_too_large"),  # the engine would read it as a number
        ({"max_tokens": 101.0}, "max_tokens_too_large"),
        ({"max_tokens": True}, "max_tokens_too_large"),
        ({"max_tokens": 51, "n": 2}, "max_tokens_too_large"),
        ({"max_tokens": 51, "prompt": ["a", "b"]}, "max_tokens_too_large"),
        ({"max_tokens": 26, "n": 2, "prompt": [[1], [2]]}, "max_tokens_too_large"),
        ({"n": 101}, "invalid_n"),
        ({"n": "4"}, "invalid_n"),
        ({"n": 0}, "invalid_n"),
        ({"n": 50, "prompt": ["a", "b", "c"]}, "too_many_prompts"),
    ],
)
def test_prompts_and_answers_over_the_limits_are_400(
    start: Callable[..., Running], body: dict[str, Any], code: str
) -> None:
    running = start(max_prompt_characters=10, max_tokens=100)
    answer = running.complete(**{"prompt": "hi", **body})
    assert (answer.status_code, error_of(answer)["code"]) == (400, code)
    assert error_of(answer)["param"] in body
    assert running.engine.bodies == []


def test_a_chat_that_names_no_length_gets_the_longest_allowed(start: Callable[..., Running]) -> None:
    running = start(max_tokens=100)
    messages = [{"role": "user", "content": "hi"}]
    for path, body in (("chat/completions", {"messages": messages}), ("completions", {"prompt": "hi"})):
        requests.post(f"{running.url}/v1/{path}", json={"model": "base", **body}, timeout=20)
    assert [body.get("max_tokens") for body in running.engine.bodies] == [100, None]


def test_the_limit_of_tokens_is_shared_by_the_choices(start: Callable[..., Running]) -> None:
    running = start(max_tokens=100)
    assert running.complete(n=2, max_tokens=50).status_code == 200
    assert running.complete([1, 2, 3], n=2, max_tokens=50).status_code == 200  # one prompt, in tokens
    running.complete(n=10)  # 16 tokens each is what the engine would give
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "n": 4}
    requests.post(f"{running.url}/v1/chat/completions", json=body, timeout=20)
    assert [body["max_tokens"] for body in running.engine.bodies] == [50, 50, 10, 25]


@pytest.mark.parametrize(
    ("field", "value"),
    [("stream", 1), ("stream", "true"), ("stream", 1.0), ("stream", "false"), ("stream_options", [])],
)
def test_what_only_the_engine_would_take_for_a_stream_is_400(
    start: Callable[..., Running], field: str, value: Any
) -> None:
    running = start(tokens_per_minute=100)
    answer = running.complete(**{field: value})
    assert (answer.status_code, error_of(answer)["code"], error_of(answer)["param"]) == (400, "invalid_type", field)
    assert running.engine.bodies == []
    assert running.complete(stream=None, stream_options=None).status_code == 200


def test_where_tokens_are_counted_a_stream_has_a_frame_for_each(start: Callable[..., Running]) -> None:
    for limits, interval in (({}, 64), ({"tokens_per_minute": 100}, None)):
        running = start(**limits)
        assert running.complete(stream=True, stream_interval=64).status_code == 200
        assert running.engine.bodies[0].get("stream_interval") == interval


def test_frames_that_come_together_count_each() -> None:
    timing = Timing()
    timing.see(b'data: {"choices":[]}\n\ndata: {"choices":[]}\n\n')
    timing.see(b'data: {"choices":[]}\n\n')
    assert timing.frames == 3


def test_pages_of_named_origins_alone_may_ask(start: Callable[..., Running], serving: Serving) -> None:
    gateway = start().gateway
    with serving(with_origins(gateway, ("https://chat.example.org",))) as url:
        ours, other = (
            requests.get(f"{url}/health", headers={"origin": origin}, timeout=20)
            for origin in ("https://chat.example.org", "https://evil.example.org")
        )
    assert ours.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "access-control-allow-origin" not in other.headers


def test_rates_are_kept_for_each_key(start: Callable[..., Running]) -> None:
    keys = (hashlib.sha256(b"a").digest(), hashlib.sha256(b"b").digest())
    running = start(keys=keys, requests_per_minute=2, tokens_per_minute=1000)
    statuses = [running.complete(headers={"authorization": "Bearer a"}).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert running.complete(headers={"authorization": "Bearer b"}).status_code == 200


def test_tokens_of_an_answer_count_against_the_rate(start: Callable[..., Running]) -> None:
    running = start(tokens_per_minute=5)
    assert running.complete(stream=True).status_code == 200
    refused = running.complete()
    assert (refused.status_code, error_of(refused)["code"]) == (429, "rate_limit_exceeded")


def test_a_client_that_leaves_stops_the_engine(start: Callable[..., Running]) -> None:
    running = start()
    with pytest.raises(requests.Timeout):
        requests.post(f"{running.url}/v1/completions", json={"model": "base", "prompt": "wait 20"}, timeout=0.5)
    until = time.monotonic() + 5
    while running.engine.disconnects == 0 and time.monotonic() < until:
        time.sleep(0.02)
    assert running.engine.disconnects == 1
    assert running.gateway.admission.in_flight == 0


def test_an_answer_that_its_client_leaves_is_counted(start: Callable[..., Running]) -> None:
    running = start(tokens_per_minute=1)
    body = {"model": "base", "prompt": "drip", "stream": True}
    with requests.post(f"{running.url}/v1/completions", json=body, stream=True, timeout=20) as answer:
        next(answer.iter_content(1))
    line, until = 'danlu_requests_total{model="base",status="499"} 1.0', time.monotonic() + 5
    while line not in requests.get(f"{running.url}/metrics", timeout=20).text.splitlines():
        assert time.monotonic() < until
        time.sleep(0.02)
    assert running.complete().status_code == 429


def test_a_dead_engine_is_503_at_once_and_used_again_when_it_is_back(start: Callable[..., Running]) -> None:
    running = start()
    (good,) = [upstream.url for upstream in running.gateway._engines["base"]]
    running.gateway.update([EngineRecord("r2", "base", "http://127.0.0.1:9", 1)])
    began = time.monotonic()
    for _ in range(2):
        answer = running.complete(stream=True)
        assert (answer.status_code, error_of(answer)["code"]) == (503, "engine_unavailable")
        assert int(answer.headers["retry-after"]) >= 1
    assert time.monotonic() - began < 1
    assert requests.get(f"{running.url}/ready", timeout=20).json() == {"ready": False, "missing": ["base"]}
    running.gateway.update([EngineRecord("r2", "base", "http://127.0.0.1:9", 1), EngineRecord("r3", "base", good, 1)])
    assert running.complete().status_code == 200
    assert requests.get(f"{running.url}/ready", timeout=20).status_code == 200


def test_requests_wait_for_the_successor_of_an_engine_stopped_on_purpose(start: Callable[..., Running]) -> None:
    running = start(max_in_flight=2, max_queued=2)
    (good,) = [upstream.url for upstream in running.gateway._engines["base"]]
    running.gateway.update([EngineRecord("r1", "base", good, 2)], {"r1": "base"})
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(running.complete) for _ in range(4)]
        time.sleep(0.5)
        assert not any(future.done() for future in waiting)
        refused = running.complete()
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        running.gateway.update([EngineRecord("r2", "base", good, 1)], {"r1": "base"})
        assert [future.result().status_code for future in waiting] == [200] * 4
    running.gateway.update([], {"r1": "base"})  # the successor died: that is no replacement
    assert running.complete().status_code == 503


def test_requests_that_wait_are_refused_when_the_gateway_stops(start: Callable[..., Running]) -> None:
    running = start()
    running.gateway.update([], {"r1": "base"})
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(running.complete)
        time.sleep(0.3)
        running.gateway.stopping = True
        assert waiting.result().status_code == 503


def test_another_replica_answers_where_one_has_died(start: Callable[..., Running]) -> None:
    running = start()
    (good,) = [upstream.url for upstream in running.gateway._engines["base"]]
    for beat in range(1, 6):
        dead = EngineRecord("r2", "base", "http://127.0.0.1:9", beat)
        running.gateway.update([dead, EngineRecord("r3", "base", good, beat)])
        assert running.complete().status_code == 200


def test_a_stream_broken_in_the_middle_ends_with_an_error_and_without_done(start: Callable[..., Running]) -> None:
    running = start()
    client = openai.OpenAI(base_url=f"{running.url}/v1", api_key="x", max_retries=0)
    texts = []
    with pytest.raises(openai.APIError, match="No engine serves 'base' at the moment"):
        for part in client.completions.create(model="base", prompt="die", stream=True):
            texts.append(part.choices[0].text)
    assert texts == ["o"]
    assert b"[DONE]" not in running.complete("die", stream=True).content


def test_metrics_count_requests_and_tokens(start: Callable[..., Running]) -> None:
    running = start()
    running.complete()
    running.complete(stream=True)
    running.complete(model="nope")
    text = requests.get(f"{running.url}/metrics", timeout=20).text
    for line in (
        'danlu_requests_total{model="base",status="200"} 2.0',
        'danlu_requests_total{model="",status="404"} 1.0',
        'danlu_tokens_total{kind="prompt",model="base"} 6.0',
        'danlu_tokens_total{kind="completion",model="base"} 4.0',
        'danlu_time_to_first_token_seconds_count{model="base"} 1.0',
        'danlu_engines{model="base"} 1.0',
        'danlu_requests_in_flight{model="base"} 0.0',
        'danlu_requests_queued{model="base"} 0.0',
    ):
        assert line in text.splitlines()


def test_published_adapters_are_served_at_once_by_version_and_by_alias(
    start: Callable[..., Running], tmp_path: Path
) -> None:
    registry = tmp_path / "registry"
    registry.mkdir()
    running = start(registry=str(registry))
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "/models/base", "r": 8}')
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    assert running.complete(model="persona").status_code == 404
    assert publish(adapter, registry, "persona") == "persona@1"
    assert [running.complete(model=name).json()["model"] for name in ("persona", "persona@1")] == ["persona@1"] * 2
    publish(adapter, registry, "persona")
    running.gateway.update_published()
    assert running.complete(model="persona").json()["model"] == "persona@2"
    set_alias(registry, "persona", "persona@1")
    remove(registry, "persona@2")
    running.gateway.update_published()
    assert running.complete(model="persona").json()["model"] == "persona@1"
    assert running.complete(model="persona@2").status_code == 404
