"""The gateway: one `/v1` in front of every engine.

An ASGI application that checks the caller and the model's name, waits for a place, picks the engine with the fewest
requests in flight, and copies bytes. Prompts, sampling and answers are vLLM's own. Errors have OpenAI's form.
"""

import asyncio
import itertools
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from pipelines.models.served import ServedModel, is_valid_name
from pipelines.recipe.serve import Limits
from serve.asgi import Headers, Receive, RequestError, Scope, Send, send_body, send_json
from serve.auth import ApiKeys
from serve.discovery import EngineRecord
from serve.gateway.access_log import note
from serve.gateway.departures import Departures
from serve.gateway.limits import Limiter, OwnLimits
from serve.gateway.metrics import Metrics, Timing, TokenUsage
from serve.gateway.openapi import DESCRIPTION
from serve.gateway.published import NamedModel, PublishedAdapters
from serve.gateway.request_body import (
    CHAT,
    COMPLETIONS,
    RESPONSES,
    UnfinishedBodies,
    hold_to_limits,
    is_streamed,
    parse,
    read_body,
    rewritten,
)
from serve.gateway.stream import EventFilter

FORWARDED = (CHAT, COMPLETIONS, RESPONSES, "/tokenize", "/detokenize")
"""What an engine answers."""

HEALTH = ("/health", "/-/healthz")
"""The second is where KubeRay asks whether a pod serves."""

READY, METRICS, OPENAPI, MODELS = "/ready", "/metrics", "/openapi.json", "/v1/models"
ONE_MODEL = f"{MODELS}/"
READ = (*HEALTH, READY, METRICS, OPENAPI, MODELS)
"""What the gateway itself answers, beside the card of `ONE_MODEL`."""

HOLD_SECONDS = 300.0
"""How long requests wait for the successor of an engine that was stopped on purpose."""

HEALTH_TIMEOUT = aiohttp.ClientTimeout(total=5)
LISTEN_TIMEOUT = aiohttp.ClientTimeout(total=1)
UNREACHABLE = (aiohttp.ClientConnectorError, aiohttp.ConnectionTimeoutError)
HOLD_POLL_SECONDS = 0.25
PATIENCE_SECONDS = 5.0
"""How long a request whose engine died waits for a look at the others."""

STALE_SECONDS = 15.0
"""After so long without a successful look at the engines or the registries, `/ready` says so."""

ENGINES, ADAPTERS = "engines", "adapters"
"""What is looked at."""

UNSEEN_TOKENS_PER_SECOND = 50
"""Tokens per second that a plain answer is charged whose client left before it came; how many there were is unknown."""

BYTES_PER_TOKEN = 4
"""Of a request's body: what the prompt of a broken-off answer is charged."""

CLIENT_CLOSED = 499
"""How answers that their client did not wait for are counted, after nginx's custom."""

DROPPED_HEADERS = (
    b"connection",
    b"keep-alive",
    b"transfer-encoding",
    b"content-length",
    b"server",
    b"date",
    b"x-request-id",
)
"""Headers of an engine's answer that belong to its own connection, and the one that the gateway sets."""

REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
"""Names of requests that are taken over from a client's `X-Request-Id`: an engine writes them to its log."""

OURS = secrets.token_hex(8).encode()
"""What all names begin with that this process gives to requests; a number follows."""
_numbers = itertools.count()

logger = logging.getLogger("ray.serve")


@dataclass(eq=False)
class Upstream:
    """One engine replica as the gateway sees it; `doubts`: how often its record has to be renewed before it is used."""

    replica: str
    url: str
    beat: int
    max_model_len: int | None = None
    in_flight: int = 0
    doubts: int = 0
    urls: dict[str, URL] = field(init=False)

    def __post_init__(self) -> None:
        self.urls = {path: URL(self.url + path) for path in (*FORWARDED, "/health")}

    def fail(self) -> None:
        """Do not use it until it has been renewed twice: the next look may read what it wrote before it died."""
        self.doubts = 2

    def renew(self, beat: int) -> None:
        """Take over the beat of its record."""
        if self.beat != beat:
            self.beat, self.doubts = beat, max(self.doubts - 1, 0)


@dataclass
class Completion:
    """One request for a completion, checked, and how far its answer is.

    `drop_usage`: the client did not ask for the stream's token counts, so they are not sent on.
    """

    path: str
    body: bytes
    model: NamedModel
    streamed: bool
    drop_usage: bool
    request_id: bytes
    timing: Timing
    started: bool = False

    def unfinished_usage(self) -> TokenUsage:
        """What an answer is charged that broke off: a token for each event, the prompt by its size."""
        tokens = self.timing.frames
        if not self.streamed:
            tokens = int((time.monotonic() - self.timing.began) * UNSEEN_TOKENS_PER_SECOND)
        return TokenUsage(len(self.body) // BYTES_PER_TOKEN, tokens)


class Gateway:
    """The models the gateway knows, the engines it sees, and its connections to them."""

    def __init__(
        self,
        models: list[ServedModel],
        engine_key: str,
        keys: tuple[bytes, ...] = (),
        limits: Limits | None = None,
        look_again: Callable[[], Awaitable[None]] | None = None,
        open_metrics: bool = False,
        limiter: Limiter | None = None,
    ) -> None:
        self.models = models
        self.limits = limits or Limits()
        self.metrics = Metrics()
        self.session: aiohttp.ClientSession | None = None
        self._keys = ApiKeys(keys)
        self._look_again = look_again
        self._open_metrics = open_metrics
        self._unfinished = UnfinishedBodies(self.limits.max_body_bytes)
        self.looked: dict[str, float] = {}
        self.limiter = limiter or OwnLimits(self.limits)
        self._departures = Departures()
        self._engine_headers = CIMultiDict(
            {"content-type": "application/json", "authorization": f"Bearer {engine_key}"}
        )
        self._engines: dict[str, list[Upstream]] = {model.name: [] for model in models}
        self._created = int(time.time())
        self._fixed = {n: NamedModel(model.name, n) for model in models for n in (model.name, *model.adapters)}
        self.published = PublishedAdapters(models)
        self._retired: set[str] = set()
        self._held_until: dict[str, float] = {}
        self.stopping = False

    def update(self, live: list[EngineRecord], retired: dict[str, str] | None = None) -> None:
        """Take over the engines that are alive, keeping what is known of those seen before.

        `retired`: replicas that were stopped on purpose, with their models; requests wait for their successors.
        """
        retired = retired or {}
        known = {upstream.replica: upstream for group in self._engines.values() for upstream in group}
        engines: dict[str, list[Upstream]] = {model.name: [] for model in self.models}
        for record in live:
            if record.replica in retired:
                continue
            upstream = known.get(record.replica)
            if upstream is None or upstream.url != record.url:
                upstream = Upstream(record.replica, record.url, record.beat, record.max_model_len)
            else:
                upstream.renew(record.beat)
            engines.setdefault(record.model, []).append(upstream)
        self._engines = engines
        for replica in retired.keys() - self._retired:
            self._held_until[retired[replica]] = time.monotonic() + HOLD_SECONDS
        self._retired = set(retired)
        self._held_until = {name: until for name, until in self._held_until.items() if not self._usable(name)}

    async def update_asking(self, live: list[EngineRecord], retired: dict[str, str]) -> None:
        """`update`, but an engine that is new, or silent since the last look, is used only if it listens: one that died
        with its replica withdraws nothing, and may have come and gone while Ray's store was away."""
        known = {upstream.replica: upstream for group in self._engines.values() for upstream in group}
        doubtful = [r for r in live if r.replica not in known or known[r.replica].beat == r.beat]
        listen = await asyncio.gather(*(self._listens(record.url) for record in doubtful))
        deaf = {record.replica for record, listens in zip(doubtful, listen, strict=True) if not listens}
        self.update(live, retired)
        for group in self._engines.values():
            for upstream in group:
                if upstream.replica in deaf:
                    upstream.fail()

    def missing(self) -> list[str]:
        """Models that no engine serves now."""
        return [model.name for model in self.models if not self._usable(model.name)]

    def looked_at(self, what: str) -> None:
        """Note that the engines or the registries were read a moment ago."""
        self.looked[what] = time.monotonic()

    def stale(self) -> list[str]:
        """What was read once, and then not for `STALE_SECONDS`."""
        now = time.monotonic()
        return [what for what, at in self.looked.items() if now - at > STALE_SECONDS]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close"})  # before it is accepted: 403
            return
        if scope["type"] != "http":
            raise RuntimeError(f"the gateway answers http only, not {scope['type']}")
        try:
            await self._route(scope, receive, send)
        except RequestError as error:
            await send_body(send, error.status, error.body, error.headers)

    async def _route(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path in FORWARDED:
            require_method(scope, "POST")
            await self._complete(scope, path, receive, send)
        elif path in READ or path.startswith(ONE_MODEL):
            require_method(scope, "GET", "HEAD")
            await self._read(scope, path, send)
        else:
            raise RequestError(404, f"There is nothing at {path}", "unknown_path")

    async def _read(self, scope: Scope, path: str, send: Send) -> None:
        if path in HEALTH:
            await send_json(send, 200, {"status": "ok"})
        elif path == READY:
            missing, stale = self.missing(), self.stale()
            ready = not missing and ENGINES not in stale  # what was published before is served all the same
            await send_json(send, 200 if ready else 503, {"ready": ready, "missing": missing, "stale": stale})
        elif path == OPENAPI:
            await send_json(send, 200, DESCRIPTION)
        elif path == METRICS:
            if not self._open_metrics:
                self._keys.check(scope["headers"])
            engines = {name: len(self._usable(name)) for name in self._engines}
            await send_body(send, 200, self.metrics.text(engines), [], b"text/plain; version=0.0.4; charset=utf-8")
        else:
            self._keys.check(scope["headers"])
            if path == MODELS:
                await send_json(send, 200, {"object": "list", "data": self.model_cards()})
            else:
                name = path.removeprefix(ONE_MODEL)
                await send_json(send, 200, self._card(name, await self._resolve(name)))

    def model_cards(self) -> list[dict[str, Any]]:
        """`/v1/models`: every model, adapter and alias; an adapter's parent is its base."""
        return [self._card(name, model) for name, model in {**self.published.names, **self._fixed}.items()]

    def _card(self, name: str, model: NamedModel) -> dict[str, Any]:
        lengths = [u.max_model_len for u in self._engines.get(model.engine, ()) if u.max_model_len is not None]
        return {
            "id": name,
            "object": "model",
            "created": self._created,
            "owned_by": "danlu",
            "root": model.name,
            "parent": None if name == model.engine else model.engine,
            "max_model_len": min(lengths, default=None),
        }

    async def _complete(self, scope: Scope, path: str, receive: Receive, send: Send) -> None:
        model, request_id = "", request_id_of(scope)
        try:
            caller = self._keys.check(scope["headers"])
            body = await read_body(scope, receive, self.limits.max_body_bytes, self._unfinished)
            request = await self._check(path, body, request_id)
            model = request.model.name
            note(scope, caller=caller[:12], model=model, request_id=request_id.decode())
            usage = await self._departures.unless_gone(receive, self._answer(request, caller, send))
            if usage is not None:
                note(scope, prompt_tokens=usage.prompt, completion_tokens=usage.completion)
        except RequestError as error:
            self.metrics.answered(model, error.status)
            error.headers.append((b"x-request-id", request_id))
            raise

    async def _check(self, path: str, body: bytes, request_id: bytes) -> Completion:
        fields = parse(body)
        name = fields.get("model")
        model = await self._resolve(name)
        streamed = is_streamed(fields)
        counts_usage = streamed and path in (CHAT, COMPLETIONS)
        drop_usage = counts_usage and not (fields.get("stream_options") or {}).get("include_usage")
        changed = hold_to_limits(fields, self.limits, path)
        if changed or streamed or name != model.name:
            if self.limits.tokens_per_minute is not None:
                fields.pop("stream_interval", None)  # a broken-off stream is charged by its frames: one for each token
            body = rewritten(fields, model.name, counts_usage)
        return Completion(path, body, model, streamed, drop_usage, request_id, Timing())

    async def _resolve(self, name: Any) -> NamedModel:
        """What a name stands for; the resolver in the engines joins names to a folder, so unknown ones end here."""
        known = isinstance(name, str) and (self._fixed.get(name) or self.published.names.get(name))
        if known:
            return known
        if isinstance(name, str) and is_valid_name(name):
            await self.published.read_again()  # it may have been published a moment ago
            if name in self.published.names:
                return self.published.names[name]
        message = f"The model {name!r} does not exist; GET /v1/models lists those that do"
        raise RequestError(404, message, "model_not_found", "model")

    async def _answer(self, request: Completion, caller: str, send: Send) -> TokenUsage | None:
        model = request.model.name
        place = await self._enter(model, caller)
        status = usage = None
        try:
            status = await self._forward(request, send)
            if status is not None:
                self.metrics.answered(model, status)
                usage = self.metrics.finished(model, request.streamed, request.timing)
            return usage
        except asyncio.CancelledError:
            self.metrics.answered(model, CLIENT_CLOSED)
            raise
        finally:
            self.metrics.in_flight[model] -= 1
            if status is None and (request.started or request.timing.sent):  # broken off, after an engine began
                usage = request.unfinished_usage()
            self.limiter.leave(place, usage.prompt + usage.completion if usage else 0)

    async def _enter(self, model: str, caller: str) -> Any:
        """Wait for a place in flight."""
        self.metrics.queued[model] += 1
        try:
            place = await self.limiter.enter(caller)
        except asyncio.CancelledError:
            self.metrics.answered(model, CLIENT_CLOSED)
            raise
        finally:
            self.metrics.queued[model] -= 1
        self.metrics.in_flight[model] += 1
        return place

    async def _forward(self, request: Completion, send: Send) -> int | None:
        """Copy the answer of an engine, the next one where one breaks before it; None where one breaks in the middle.

        One that breaks an answer off and is well is used by other requests: each gives it one try.
        """
        broke: list[Upstream] = []
        while True:
            upstream = await self._pick(request.model, broke)
            upstream.in_flight += 1
            try:
                return await self._copy(upstream, request, send)
            except aiohttp.ClientError as error:
                request.timing.sent = False
                if request.started:
                    await self._break_off(request, send)
                if isinstance(error, UNREACHABLE) or not await self._is_healthy(upstream):
                    upstream.fail()
                if request.started:
                    return None
                broke.append(upstream)
                await self._look()  # it may have been stopped on purpose a moment ago
            finally:
                upstream.in_flight -= 1

    async def _look(self) -> None:
        """Look at the engines once more; where that fails, what was seen last holds on."""
        if self._look_again is None:
            return
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await self._look_again()
        except Exception:
            logger.exception("cannot read the list of engines")

    def _usable(self, engine: str) -> list[Upstream]:
        return [upstream for upstream in self._engines.get(engine, ()) if not upstream.doubts]

    async def _pick(self, model: NamedModel, broke: list[Upstream]) -> Upstream:
        """The engine with the fewest requests of those that did not break this one off; where the last one was stopped
        on purpose, its successor."""
        while not (usable := self._usable(model.engine)):
            if self.stopping or time.monotonic() >= self._held_until.get(model.engine, 0.0):
                raise unavailable(model.name)
            await asyncio.sleep(HOLD_POLL_SECONDS)
        untried = [upstream for upstream in usable if upstream not in broke]
        if not untried:
            raise unavailable(model.name)
        return min(untried, key=lambda upstream: upstream.in_flight)

    async def _copy(self, upstream: Upstream, request: Completion, send: Send) -> int:
        assert self.session is not None, "the gateway answers requests only while it has a client session"
        url = upstream.urls[request.path]
        request.timing.sent = True
        head = CIMultiDict(self._engine_headers)
        head["x-request-id"] = request.request_id.decode()
        async with self.session.post(url, data=request.body, headers=head) as answer:
            headers = [(k.lower(), v) for k, v in answer.raw_headers if k.lower() not in DROPPED_HEADERS]
            headers.append((b"x-request-id", request.request_id))
            if not request.streamed or answer.status != 200:
                body = await answer.read()
                if answer.status == 500 and not await self._is_healthy(upstream):
                    raise aiohttp.ServerDisconnectedError("the engine's core has died")
                request.timing.see(body)
                headers.append((b"content-length", str(len(body)).encode()))
                await start(request, send, answer.status, headers)
                await send({"type": "http.response.body", "body": body})
                return answer.status
            await start(request, send, answer.status, headers)
            events = EventFilter(request.drop_usage)
            async for received in answer.content.iter_any():
                request.timing.see(received)
                if chunk := events.feed(received):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": events.rest()})
            return answer.status

    async def _listens(self, engine_url: str) -> bool:
        assert self.session is not None
        try:
            async with self.session.get(f"{engine_url}/health", timeout=LISTEN_TIMEOUT):
                return True
        except aiohttp.ClientConnectorError:
            return False
        except (aiohttp.ClientError, TimeoutError):
            return True  # it may be busy

    async def _is_healthy(self, upstream: Upstream) -> bool:
        """Whether an engine that answered with an error goes on working, or has lost its core."""
        assert self.session is not None
        try:
            async with self.session.get(upstream.urls["/health"], timeout=HEALTH_TIMEOUT) as answer:
                return answer.status == 200
        except (aiohttp.ClientError, TimeoutError):
            return False

    async def _break_off(self, request: Completion, send: Send) -> None:
        """End a stream whose engine died in the middle: an error frame, and no `[DONE]`."""
        error = unavailable(request.model.name)
        self.metrics.answered(request.model.name, error.status)
        await send({"type": "http.response.body", "body": b"data: " + error.body + b"\n\n"})


def unavailable(name: str) -> RequestError:
    """The 503 for a model whose engine is gone."""
    return RequestError(503, f"No engine serves {name!r} at the moment, try again", "engine_unavailable", retry_after=2)


async def start(request: Completion, send: Send, status: int, headers: Headers) -> None:
    """Send the head of an answer; from here on the request cannot be given to another engine."""
    await send({"type": "http.response.start", "status": status, "headers": headers})
    request.started = True


def require_method(scope: Scope, *methods: str) -> None:
    """Raise RequestError 405 unless the request's method is one of those given."""
    if scope["method"] not in methods:
        error = RequestError(405, f"Use {methods[0]} for {scope['path']}", "method_not_allowed")
        error.headers.append((b"allow", ", ".join(methods).encode()))
        raise error


def request_id_of(scope: Scope) -> bytes:
    """The name a client gave its request, or one of our own, under which gateway and engine speak of it."""
    given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"")
    return given if REQUEST_ID.fullmatch(given) else b"%s%08x" % (OURS, next(_numbers))
