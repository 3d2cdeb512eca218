"""The gateway: one `/v1` in front of every engine.

An ASGI application that checks the request, picks the engine with the fewest requests in flight, and copies bytes.
Prompts, sampling and answers are vLLM's own. Errors have OpenAI's form.
"""

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from serve.directory import EngineRecord
from serve.models import ServedModel

Scope = Mapping[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

COMPLETIONS = ("/v1/chat/completions", "/v1/completions")
RETRY_AFTER_SECONDS = 2
HOP_HEADERS = (b"connection", b"keep-alive", b"transfer-encoding", b"content-length", b"server", b"date")


class RequestError(Exception):
    """A request that gets an error in OpenAI's form instead of an answer."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None, retry: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.body = json.dumps(
            {"error": {"message": message, "type": error_type(status), "param": param, "code": code}},
            ensure_ascii=False,
        ).encode()
        self.headers = [(b"retry-after", str(RETRY_AFTER_SECONDS).encode())] if retry else []


def error_type(status: int) -> str:
    """OpenAI's name for the kind of error that an HTTP status stands for."""
    names = {401: "authentication_error", 429: "rate_limit_error", 503: "service_unavailable"}
    return names.get(status, "invalid_request_error" if status < 500 else "server_error")


@dataclass
class Upstream:
    """One engine replica as the gateway sees it."""

    url: str
    in_flight: int = 0


@dataclass
class Gateway:
    """The state of the gateway: the models it knows, the engines it sees, and its connections to them."""

    models: list[ServedModel]
    key: str
    engines: dict[str, list[Upstream]] = field(default_factory=dict)
    session: aiohttp.ClientSession | None = None

    def __post_init__(self) -> None:
        self.owner = {name: model.name for model in self.models for name in (model.name, *model.adapters)}
        self.created = int(time.time())

    def update(self, live: list[EngineRecord]) -> None:
        """Take over the engines that are alive, keeping the counts of those already known."""
        known = {upstream.url: upstream for group in self.engines.values() for upstream in group}
        engines: dict[str, list[Upstream]] = {model.name: [] for model in self.models}
        for record in live:
            engines.setdefault(record.model, []).append(known.get(record.url) or Upstream(record.url))
        self.engines = engines

    def missing(self) -> list[str]:
        """Models that no engine serves now."""
        return [model.name for model in self.models if not self.engines.get(model.name)]

    def pick(self, name: str) -> Upstream:
        """The least busy engine for a model name; raises RequestError 503 when there is none."""
        candidates = self.engines.get(self.owner[name])
        if not candidates:
            raise unavailable(name)
        return min(candidates, key=lambda upstream: upstream.in_flight)

    def drop(self, upstream: Upstream) -> None:
        """Stop using an engine that refused a connection, until it is announced again."""
        self.engines = {model: [u for u in group if u is not upstream] for model, group in self.engines.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
            return
        if scope["type"] != "http":
            raise RuntimeError(f"the gateway answers http only, not {scope['type']}")
        try:
            await self._route(scope, receive, send)
        except RequestError as error:
            await send_body(send, error.status, error.body, error.headers)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        method, path = scope["method"], scope["path"]
        if path in COMPLETIONS:
            require(method, "POST")
            await self._complete(path, await read_body(receive), receive, send)
        elif path == "/v1/models":
            require(method, "GET")
            await send_json(send, 200, {"object": "list", "data": self.model_cards()})
        elif path == "/health":
            await send_json(send, 200, {"status": "ok"})
        elif path == "/ready":
            missing = self.missing()
            await send_json(send, 503 if missing else 200, {"ready": not missing, "missing": missing})
        else:
            raise RequestError(404, f"no such path: {path}", "not_found")

    def model_cards(self) -> list[dict[str, Any]]:
        """`/v1/models`: every model and adapter; an adapter's parent is its base."""
        return [
            {
                "id": name,
                "object": "model",
                "created": self.created,
                "owned_by": "danlu",
                "root": model.path if name == model.name else model.adapters[name],
                "parent": None if name == model.name else model.name,
            }
            for model in self.models
            for name in (model.name, *model.adapters)
        ]

    async def _complete(self, path: str, body: bytes, receive: Receive, send: Send) -> None:
        request = parse(body)
        name = request.get("model")
        if not isinstance(name, str) or name not in self.owner:
            message = f"The model {name!r} does not exist; served: {', '.join(self.owner)}"
            raise RequestError(404, message, "model_not_found", "model")
        upstream = self.pick(name)
        if request.get("stream") is True:
            body = with_usage(request)
        upstream.in_flight += 1
        try:
            await self._forward(upstream, path, body, name, receive, send)
        finally:
            upstream.in_flight -= 1

    async def _forward(
        self, upstream: Upstream, path: str, body: bytes, name: str, receive: Receive, send: Send
    ) -> None:
        copy = asyncio.ensure_future(self._copy(upstream, path, body, name, send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait((copy, gone), return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            if not copy.done():
                copy.cancel()  # the client has gone: closing the connection makes vLLM stop generating
        if copy.done() and not copy.cancelled():
            copy.result()

    async def _copy(self, upstream: Upstream, path: str, body: bytes, name: str, send: Send) -> None:
        assert self.session is not None
        headers = {"content-type": "application/json", "authorization": f"Bearer {self.key}"}
        started = False
        try:
            async with self.session.post(upstream.url + path, data=body, headers=headers) as answer:
                kept = [(k.lower(), v) for k, v in answer.raw_headers if k.lower() not in HOP_HEADERS]
                await send({"type": "http.response.start", "status": answer.status, "headers": kept})
                started = True
                async for chunk in answer.content.iter_any():
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        except aiohttp.ClientError:
            self.drop(upstream)
            if not started:
                raise unavailable(name) from None
            error = unavailable(name)
            await send({"type": "http.response.body", "body": b"data: " + error.body + b"\n\n"})


def unavailable(name: str) -> RequestError:
    """The 503 for a model whose engine is gone."""
    return RequestError(503, f"No engine serves {name!r} at the moment, try again", "engine_unavailable", retry=True)


def require(method: str, allowed: str) -> None:
    """Raise RequestError 405 unless the method is the allowed one."""
    if method != allowed:
        raise RequestError(405, f"use {allowed}", "method_not_allowed")


def parse(body: bytes) -> dict[str, Any]:
    """The request's JSON object; raises RequestError 400."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"The body is not JSON: {error}", "invalid_json") from None
    if not isinstance(request, dict):
        raise RequestError(400, "The body is not a JSON object", "invalid_json")
    return request


def with_usage(request: dict[str, Any]) -> bytes:
    """The request's body, asking for token counts in the stream's last frame."""
    options = request.get("stream_options")
    request["stream_options"] = {**(options if isinstance(options, dict) else {}), "include_usage": True}
    return json.dumps(request).encode()


async def read_body(receive: Receive) -> bytes:
    """The whole body of a request."""
    parts = []
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError(400, "The connection closed before the body ended", "disconnected")
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)


async def disconnected(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def send_json(send: Send, status: int, content: dict[str, Any]) -> None:
    """Answer with a JSON object."""
    await send_body(send, status, json.dumps(content, ensure_ascii=False).encode(), [])


async def send_body(send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Answer with a complete JSON body."""
    fixed = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": fixed + headers})
    await send({"type": "http.response.body", "body": body})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
