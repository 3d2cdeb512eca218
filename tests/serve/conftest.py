"""Servers in threads."""

import asyncio
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import uvicorn

App = Callable[[Any, Any, Any], Awaitable[None]]
Serving = Callable[..., AbstractContextManager[str]]


@pytest.fixture(scope="session")
def serving() -> Serving:
    """A function that runs an ASGI application on a port of its own, in a thread, for the length of a block.

    `around` gives an asynchronous context that the server runs in.
    """
    return _serving


@contextmanager
def _serving(app: App, around: Callable[[], AbstractAsyncContextManager[None]] = nullcontext) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off"))

    async def main() -> None:
        async with around():
            await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()
