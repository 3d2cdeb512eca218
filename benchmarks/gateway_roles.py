"""Servers that the gateway's benchmarks ask, each in a process of its own: an engine that answers at once, a minimal
proxy before it, the gateway, and the gateway whose engine can be taken away and given back.

    python -m benchmarks.gateway_roles ROLE [UPSTREAM]

Started by `role`; not a command for people. It prints its port.
"""

import hashlib
import json
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
import psutil
import uvicorn
import uvloop

from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Limits
from serve.discovery import EngineRecord
from serve.gateway.app import Gateway
from serve.gateway.gateway_replica import KEEP_ALIVE_SECONDS, engine_session
from serve.gateway.protocol import LimitedProtocol

KEY = "benchmark"
MODEL = "base"

ANSWER = json.dumps(
    {
        "id": "cmpl-1",
        "object": "text_completion",
        "created": 1,
        "model": MODEL,
        "choices": [{"index": 0, "text": " there" * 16, "logprobs": None, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 2, "completion_tokens": 16, "total_tokens": 18},
    }
).encode()


@contextmanager
def role(name: str, upstream: str = "") -> Iterator[int]:
    """A server in a process of its own; yields its port."""
    command = [sys.executable, "-m", "benchmarks.gateway_roles", name, upstream]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def main(name: str, upstream: str) -> None:
    """Be one of the servers until stopped; prints the port."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(listener.getsockname()[1], flush=True)
    uvloop.run(_serve(name, upstream, listener))


async def _serve(name: str, upstream: str, listener: socket.socket) -> None:
    async with _session(name) as session:
        app = {
            "engine": lambda: at_once,
            "proxy": lambda: proxy(session, upstream),
            "gateway": lambda: gateway(session, upstream),
            "held": lambda: held(gateway(session, upstream), upstream),
        }[name]()
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            lifespan="off",
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=KEEP_ALIVE_SECONDS,
            http=LimitedProtocol if name in ("gateway", "held") else "auto",
        )
        await uvicorn.Server(config).serve(sockets=[listener])


@asynccontextmanager
async def _session(name: str) -> AsyncIterator[Any]:
    plain = aiohttp.TCPConnector(limit=0)
    async with engine_session() if name in ("gateway", "held") else aiohttp.ClientSession(connector=plain) as session:
        yield session


async def at_once(scope: Any, receive: Any, send: Any) -> None:
    """An engine that answers at once."""
    while (await receive()).get("more_body"):
        pass
    await _answer(send, 200, ANSWER)


async def _answer(send: Any, status: int, body: bytes) -> None:
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def proxy(session: Any, upstream: str) -> Callable[..., Any]:
    """The least that can stand between: the body is read, sent on, and the answer given back."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        async with session.post(upstream + scope["path"], data=body) as answer:
            await _answer(send, answer.status, await answer.read())

    return app


def gateway(session: Any, upstream: str) -> Any:
    """Danlu's gateway, with a key to check and limits to keep."""
    limits = Limits(requests_per_minute=10**9, tokens_per_minute=10**12, max_prompt_characters=10**6, max_tokens=10**6)
    made = Gateway([ServedModel(MODEL, "/models/base")], "engine", (hashlib.sha256(KEY.encode()).digest(),), limits)
    made.session = session
    made.update([EngineRecord("r1", MODEL, upstream, 1)])
    return made


def held(made: Any, upstream: str) -> Callable[..., Any]:
    """The gateway with three more paths: `/hold` takes its engine away as a redeployment does, `/release` gives it a
    successor, and `/rss` says how many bytes of memory the process has."""
    process, retired = psutil.Process(), {"r1": MODEL}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/hold":
            made.update([], retired)
        elif scope["path"] == "/release":
            made.update([EngineRecord("r2", MODEL, upstream, 1)], retired)
        elif scope["path"] != "/rss":
            await made(scope, receive, send)
            return
        await _answer(send, 200, json.dumps({"bytes": process.memory_info().rss}).encode())

    return app


if __name__ == "__main__":
    main(*sys.argv[1:])
