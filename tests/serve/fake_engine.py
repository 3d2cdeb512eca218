"""Small engines that answer and stream as vLLM's server does, and the gateway before one of them."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from typing import Any

import aiohttp
import pytest
import requests

from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Limits
from serve.asgi import send_json
from serve.discovery import EngineRecord
from serve.gateway.app import Gateway
from serve.gateway.protocol import LimitedProtocol

Serving = Callable[..., AbstractContextManager[str]]
USAGE = {"prompt_tokens": 3, "total_tokens": 5, "completion_tokens": 2}


def frame(content: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(content).encode() + b"\n\n"


async def body_of(receive: Any) -> bytes:
    """The whole body of a request."""
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


class Engine:
    """An engine whose prompts are orders: `wait N` waits N seconds, `drip` streams slowly, `die` breaks off a stream,
    `tear` breaks it off within an event, `flood N` streams N MB, `count N` streams the numbers below N, ten a second,
    `split` sends a stream byte by byte, `cut` breaks a plain answer off, `fail` is answered with 500. A message's
    content is such an order too."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.paths: list[str] = []
        self.headers: list[dict[bytes, bytes]] = []
        self.disconnects = 0
        self.healthy = True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/health":
            await send_json(send, 200 if self.healthy else 503, {})
            return
        self.paths.append(scope["path"])
        request = json.loads(await body_of(receive))
        self.bodies.append(request)
        self.headers.append(dict(scope["headers"]))
        messages = request.get("messages") or [{"content": request.get("prompt", "")}]
        order, _, argument = str(messages[-1]["content"]).partition(" ")
        if order == "wait":
            gone = asyncio.ensure_future(receive())
            done, _ = await asyncio.wait([gone], timeout=float(argument))
            gone.cancel()
            if done:
                self.disconnects += 1
                return
        if order == "cut":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"10")]})
            await send({"type": "http.response.body", "body": b"{", "more_body": True})
            raise ConnectionAbortedError
        if order == "fail":
            await send_json(send, 500, {"error": "failed"})
        elif request.get("stream"):
            await self._stream(request, order, argument, send)
        elif "messages" in request:
            message = {"role": "assistant", "content": "ok"}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            head = {"id": "1", "object": "chat.completion", "created": 1, "model": request["model"]}
            await send_json(send, 200, {**head, "choices": [choice], "usage": USAGE})
        else:
            answer = {"model": request["model"], "choices": [{"index": 0, "text": "ok"}], "usage": USAGE}
            await send_json(send, 200, answer)

    async def _stream(self, request: dict[str, Any], order: str, argument: str, send: Any) -> None:
        await begin_stream(send)
        is_chat, options = "messages" in request, request.get("stream_options") or {}
        kind = "chat.completion.chunk" if is_chat else "text_completion"
        base = {"id": "1", "object": kind, "created": 1, "model": request["model"]}
        counts = dict(USAGE)
        more = {"usage": counts} if options.get("include_usage") and options.get("continuous_usage_stats") else {}
        texts = ["x" * (1 << 16)] * (16 * int(argument)) if order == "flood" else ["o", "k"]
        if order == "count":
            texts = [f"{number} " for number in range(int(argument))]
            counts.update(completion_tokens=len(texts), total_tokens=USAGE["prompt_tokens"] + len(texts))
        for number, text in enumerate(texts):
            delta = {"content": text} if number else {"role": "assistant", "content": text}
            piece = {"delta": delta} if is_chat else {"text": text}
            ends = "stop" if number == len(texts) - 1 else None
            event = frame({**base, "choices": [{"index": 0, **piece, "finish_reason": ends}], **more})
            for part in [event[n : n + 1] for n in range(len(event))] if order == "split" else [event]:
                await send({"type": "http.response.body", "body": part, "more_body": True})
                if order == "split":
                    await asyncio.sleep(0)
            if order in ("drip", "count"):
                await asyncio.sleep(0.5 if order == "drip" else 0.1)
            if order == "tear":
                await send({"type": "http.response.body", "body": b'data: {"id": "1", "cho', "more_body": True})
            if order in ("die", "tear"):
                raise ConnectionAbortedError
        if options.get("include_usage"):
            usage = frame({**base, "choices": [], "usage": counts})
            await send({"type": "http.response.body", "body": usage, "more_body": True})
        await end_stream(send)


async def begin_stream(send: Any) -> None:
    """The head of a streamed answer."""
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/event-stream")]})


async def send_piece(send: Any, model: str, content: str) -> None:
    """A piece of a chat's streamed answer."""
    await send_delta(send, model, {"content": content})


async def send_delta(send: Any, model: str, delta: dict[str, str]) -> None:
    """A piece of a chat's streamed answer, or of what was thought before it."""
    await _send_chunk(send, model, choices=[{"index": 0, "delta": delta, "finish_reason": None}])


async def send_usage(send: Any, model: str, prompt: int, completion: int) -> None:
    """The token counts at the end of a chat's streamed answer."""
    counts = {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
    await _send_chunk(send, model, choices=[], usage=counts)


async def _send_chunk(send: Any, model: str, **content: Any) -> None:
    chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": model, **content}
    await send({"type": "http.response.body", "body": frame(chunk), "more_body": True})


async def end_stream(send: Any) -> None:
    """The end of a streamed answer."""
    await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})


async def list_models(send: Any, *names: str) -> None:
    """The answer to `/v1/models`."""
    await send_json(send, 200, {"object": "list", "data": [{"id": name, "object": "model"} for name in names]})


class Running:
    """A gateway with its engines, over HTTP; `engine` is the first."""

    def __init__(self, gateway: Gateway, url: str, engines: list[Engine], engine_urls: list[str]) -> None:
        self.gateway, self.url, self.engines, self.engine_urls = gateway, url, engines, engine_urls
        self.engine, self.engine_url = engines[0], engine_urls[0]

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        """The gateway's connections, for another server of it."""
        async with aiohttp.ClientSession() as self.gateway.session:
            yield

    def post(self, path: str, **body: Any) -> requests.Response:
        """Ask on any path below `/v1/`."""
        headers = body.pop("headers", {})
        return requests.post(f"{self.url}/v1/{path}", json=body, headers=headers, timeout=20)

    def complete(self, prompt: Any = "hi", model: Any = "base", **more: Any) -> requests.Response:
        """Ask for a completion."""
        return self.post("completions", model=model, prompt=prompt, **more)

    def get(self, path: str, **headers: str) -> requests.Response:
        """Read a path."""
        return requests.get(f"{self.url}{path}", headers=headers, timeout=20)

    def live(self, urls: dict[str, str], retired: str = "", beat: int = 1) -> None:
        """Tell the gateway at which addresses the replicas of `base` are, and which was stopped on purpose."""
        records = [EngineRecord(replica, "base", url, beat) for replica, url in urls.items()]
        self.gateway.update(records, {retired: "base"} if retired else {})

    def wait_for_count(self, line: str, **headers: str) -> None:
        """Return when a line stands in the metrics."""
        until = time.monotonic() + 5
        while line not in self.get("/metrics", **headers).text.splitlines():
            assert time.monotonic() < until
            time.sleep(0.02)


Start = Callable[..., Running]


@pytest.fixture(scope="module")
def start(serving: Serving) -> Iterator[Start]:
    """Start a gateway before engines of the model `base` with the adapter `wishes`; limits by their names.

    All are stopped together when the module's tests are done, since each takes a fifth of a second.
    """
    stacks: list[ExitStack] = []

    def up(app: Any, *around: Any) -> str:
        stacks.append(ExitStack())
        return stacks[-1].enter_context(serving(app, *around))

    def run(
        keys: tuple[bytes, ...] = (),
        registry: str | None = None,
        engines: int = 1,
        open_metrics: bool = False,
        **limits: Any,
    ) -> Running:
        model = ServedModel("base", "/models/base", {"wishes": "/adapters/wishes"}, registry)
        gateway = Gateway([model], "engine-secret", keys, Limits(**limits), None, open_metrics)

        @asynccontextmanager
        async def session() -> AsyncIterator[None]:
            async with aiohttp.ClientSession() as gateway.session:
                yield

        made = [Engine() for _ in range(engines)]
        engine_urls = [up(engine) for engine in made]
        running = Running(gateway, up(gateway, session, LimitedProtocol), made, engine_urls)
        running.live({f"r{n}": url for n, url in enumerate(engine_urls, 1)})
        return running

    yield run
    with ThreadPoolExecutor(1 + len(stacks)) as pool:
        list(pool.map(ExitStack.close, stacks))


def error_of(answer: requests.Response) -> dict[str, Any]:
    """The error in an answer, which has OpenAI's form."""
    body = answer.json()
    assert list(body) == ["error"]
    assert set(body["error"]) == {"message", "type", "param", "code"}
    return dict(body["error"])
