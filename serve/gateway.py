"""The gateway: one `/v1` in front of every engine.

An ASGI application that checks the caller and the model's name, waits for a place, picks the engine with the fewest
requests in flight, and copies bytes. Prompts, sampling and answers are vLLM's own. Errors have OpenAI's form.
"""

import asyncio
import json
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any

import aiohttp

from serve import adapters
from serve.answers import Headers, Receive, RequestError, Scope, Send, send_body, send_json, unavailable
from serve.directory import EngineRecord
from serve.guard import Admission, Keys, Limits, Rates
from serve.metrics import Metrics, Timing
from serve.models import ServedModel, is_valid_name

COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
DROPPED_HEADERS = (b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"server", b"date")
"""Headers of an engine's answer that belong to its own connection."""


@dataclass(eq=False)
class Upstream:
    """One engine replica as the gateway sees it; not used while its record stands at the beat `failed_at`."""

    url: str
    beat: int
    in_flight: int = 0
    failed_at: int = -1


@dataclass(frozen=True)
class Target:
    """What a requested name stands for: the base or merged model whose engine answers, and the name it knows."""

    engine: str
    name: str


@dataclass
class Ask:
    """One request for a completion, checked."""

    path: str
    body: bytes
    target: Target
    streamed: bool
    timing: Timing
    started: bool = False


class Gateway:
    """The models the gateway knows, the engines it sees, and its connections to them."""

    def __init__(
        self, models: list[ServedModel], engine_key: str, keys: tuple[bytes, ...] = (), limits: Limits | None = None
    ) -> None:
        self.models = models
        self.limits = limits or Limits()
        self.admission = Admission(self.limits)
        self.metrics = Metrics()
        self.session: aiohttp.ClientSession | None = None
        self._keys = Keys(keys)
        self._rates = Rates(self.limits)
        self._engine_headers = {"content-type": "application/json", "authorization": f"Bearer {engine_key}"}
        self._engines: dict[str, list[Upstream]] = {model.name: [] for model in models}
        self._created = int(time.time())
        self._fixed = {n: Target(model.name, n) for model in models for n in (model.name, *model.adapters)}
        self._published: dict[str, Target] = {}

    def update(self, live: list[EngineRecord]) -> None:
        """Take over the engines that are alive, keeping what is known of those seen before."""
        known = {upstream.url: upstream for group in self._engines.values() for upstream in group}
        engines: dict[str, list[Upstream]] = {model.name: [] for model in self.models}
        for record in live:
            upstream = known.get(record.url) or Upstream(record.url, record.beat)
            upstream.beat = record.beat
            engines.setdefault(record.model, []).append(upstream)
        self._engines = engines

    def update_published(self) -> None:
        """Read the registries of adapters again; blocking."""
        published: dict[str, Target] = {}
        for model in self.models:
            if model.registry is not None:
                published |= {version: Target(model.name, version) for version in adapters.versions(model.registry)}
                published |= {a: Target(model.name, version) for a, version in adapters.aliases(model.registry).items()}
        self._published = published

    def missing(self) -> list[str]:
        """Models that no engine serves now."""
        return [model.name for model in self.models if not self._usable(model.name)]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            raise RuntimeError(f"the gateway answers http only, not {scope['type']}")
        try:
            await self._route(scope, receive, send)
        except RequestError as error:
            await send_body(send, error.status, error.body, error.headers)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in COMPLETIONS:
            require_method(scope, "POST")
            await self._complete(scope, path, receive, send)
        elif path == "/v1/models":
            require_method(scope, "GET")
            self._keys.check(scope["headers"])
            await send_json(send, 200, {"object": "list", "data": self.model_cards()})
        elif path == "/health":
            await send_json(send, 200, {"status": "ok"})
        elif path == "/ready":
            missing = self.missing()
            await send_json(send, 503 if missing else 200, {"ready": not missing, "missing": missing})
        elif path == "/metrics":
            engines = {name: len(self._usable(name)) for name in self._engines}
            text = self.metrics.text(self.admission.in_flight, self.admission.queued, engines)
            await send_body(send, 200, text, [], b"text/plain; version=0.0.4; charset=utf-8")
        else:
            raise RequestError(404, f"There is nothing at {path}", "unknown_path")

    def model_cards(self) -> list[dict[str, Any]]:
        """`/v1/models`: every model, adapter and alias; an adapter's parent is its base."""
        targets = {**self._published, **self._fixed}
        return [
            {
                "id": name,
                "object": "model",
                "created": self._created,
                "owned_by": "danlu",
                "root": target.name,
                "parent": None if name == target.engine else target.engine,
            }
            for name, target in targets.items()
        ]

    async def _complete(self, scope: Scope, path: str, receive: Receive, send: Send) -> None:
        caller = self._keys.check(scope["headers"])
        model = ""
        try:
            ask = self._check(path, await read_body(scope, receive, self.limits.max_body_bytes))
            model = ask.target.name
            self._rates.admit(caller)
            await unless_disconnected(receive, self._answer(ask, caller, send))
        except RequestError as error:
            self.metrics.answered(model, error.status)
            raise

    def _check(self, path: str, body: bytes) -> Ask:
        request = parse(body)
        name = request.get("model")
        target = self._resolve(name) if isinstance(name, str) else None
        if target is None:
            message = f"The model {name!r} does not exist; GET /v1/models lists those that do"
            raise RequestError(404, message, "model_not_found", "model")
        streamed = request.get("stream") is True
        if streamed or name != target.name:
            body = rewritten(request, target.name, streamed)
        return Ask(path, body, target, streamed, Timing())

    def _resolve(self, name: str) -> Target | None:
        """What a name stands for; the resolver in the engines joins names to a folder, so unknown ones end here."""
        target = self._fixed.get(name) or self._published.get(name)
        if target is None and is_valid_name(name) and any(model.registry for model in self.models):
            self.update_published()  # published a moment ago, perhaps
            target = self._published.get(name)
        return target

    async def _answer(self, ask: Ask, caller: str, send: Send) -> None:
        async with self.admission.slot():
            while True:
                upstream = self._pick(ask.target)
                upstream.in_flight += 1
                try:
                    status = await self._copy(upstream, ask, send)
                    break
                except aiohttp.ClientError:
                    upstream.failed_at = upstream.beat
                    if ask.started:
                        await self._break_off(ask, send)
                        return
                finally:
                    upstream.in_flight -= 1
        self.metrics.answered(ask.target.name, status)
        usage = self.metrics.finished(ask.target.name, ask.streamed, ask.timing)
        self._rates.spend(caller, usage.prompt + usage.completion)

    def _usable(self, engine: str) -> list[Upstream]:
        return [upstream for upstream in self._engines.get(engine, ()) if upstream.failed_at != upstream.beat]

    def _pick(self, target: Target) -> Upstream:
        usable = self._usable(target.engine)
        if not usable:
            raise unavailable(target.name)
        return min(usable, key=lambda upstream: upstream.in_flight)

    async def _copy(self, upstream: Upstream, ask: Ask, send: Send) -> int:
        assert self.session is not None, "the gateway answers requests only while it has a client session"
        url = upstream.url + ask.path
        async with self.session.post(url, data=ask.body, headers=self._engine_headers) as answer:
            headers = [(k.lower(), v) for k, v in answer.raw_headers if k.lower() not in DROPPED_HEADERS]
            if not ask.streamed or answer.status != 200:
                body = await answer.read()
                if answer.status == 500 and not await self._is_healthy(upstream):
                    raise aiohttp.ServerDisconnectedError("the engine's core has died")
                ask.timing.see(body)
                headers.append((b"content-length", str(len(body)).encode()))
                await start(ask, send, answer.status, headers)
                await send({"type": "http.response.body", "body": body})
                return answer.status
            await start(ask, send, answer.status, headers)
            async for chunk in answer.content.iter_any():
                ask.timing.see(chunk)
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
            return answer.status

    async def _is_healthy(self, upstream: Upstream) -> bool:
        """Whether an engine that answered with an error goes on working, or has lost its core."""
        assert self.session is not None
        async with self.session.get(f"{upstream.url}/health") as answer:
            return answer.status == 200

    async def _break_off(self, ask: Ask, send: Send) -> None:
        """End a stream whose engine died in the middle: an error frame, and no `[DONE]`."""
        error = unavailable(ask.target.name)
        self.metrics.answered(ask.target.name, error.status)
        await send({"type": "http.response.body", "body": b"data: " + error.body + b"\n\n"})


async def start(ask: Ask, send: Send, status: int, headers: Headers) -> None:
    """Send the head of an answer; from here on the request cannot be given to another engine."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    ask.started = True


def require_method(scope: Scope, method: str) -> None:
    """Raise RequestError 405 unless the request's method is the one given."""
    if scope["method"] != method:
        raise RequestError(405, f"Use {method} for {scope['path']}", "method_not_allowed")


def parse(body: bytes) -> dict[str, Any]:
    """The request's JSON object; raises RequestError 400."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"The body is not JSON: {error}", "invalid_json") from None
    if not isinstance(request, dict):
        raise RequestError(400, "The body is not a JSON object", "invalid_json")
    return request


def rewritten(request: dict[str, Any], name: str, streamed: bool) -> bytes:
    """The request's body with the engine's name for the model; a stream also asks for token counts at its end."""
    request["model"] = name
    options = request.get("stream_options")
    if streamed and (options is None or isinstance(options, dict)):
        request["stream_options"] = {**(options or {}), "include_usage": True}
    return json.dumps(request).encode()


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """The whole body of a request; raises RequestError 413 as soon as it is known to be longer than `most` bytes."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    size = int(declared) if declared.isdigit() else 0
    parts: list[bytes] = []
    received, more = 0, True
    while more and size <= most:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError(400, "The connection closed before the body ended", "disconnected")
        parts.append(message.get("body", b""))
        received += len(parts[-1])
        size, more = max(size, received), message.get("more_body", False)
    if size > most:
        raise RequestError(413, f"The body is longer than {most} bytes", "body_too_large")
    return b"".join(parts)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work, and drop it when the client closes its connection: the engine then stops generating."""
    worker = asyncio.current_task()
    assert worker is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await receive())["type"] != "http.disconnect":
            pass
        gone = True
        worker.cancel()

    watcher = asyncio.create_task(watch())
    try:
        await work
    except asyncio.CancelledError:
        if not gone:
            raise
        worker.uncancel()
    finally:
        watcher.cancel()
