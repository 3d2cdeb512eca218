"""Servers in threads."""

import asyncio
import socket
import subprocess
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import uvicorn

from pipelines.kill_with_parent import child_environment
from tests.serve.fake_engine import Serving, start

__all__ = ["start"]

App = Callable[[Any, Any, Any], Awaitable[None]]


def running_app() -> str:
    """The name of the one application that has engines."""
    from ray.experimental import internal_kv

    from serve.discovery import NAMESPACE

    names = [key.decode() for key in internal_kv._internal_kv_list("danlu-", namespace=NAMESPACE)]
    (app,) = {name.partition("/")[0] for name in names if "/engine/" in name}
    return app


@pytest.fixture(scope="session")
def serving() -> Serving:
    """A function that runs an ASGI application on a port of its own, in a thread, for the length of a block.

    `around` gives an asynchronous context that the server runs in, `http` another protocol than uvicorn's own.
    """
    return _serving


@contextmanager
def _serving(
    app: App, around: Callable[[], AbstractAsyncContextManager[None]] = nullcontext, http: Any = "auto"
) -> Iterator[str]:
    listener = socket.create_server(("127.0.0.1", 0), backlog=256)
    server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", http=http))

    entered = threading.Event()

    async def main() -> None:
        async with around():
            entered.set()
            await server.serve(sockets=[listener])

    thread = threading.Thread(target=asyncio.run, args=(main(),), daemon=True)
    thread.start()
    assert entered.wait(10)  # two servers of one gateway must not set its session in any order
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)
        listener.close()


@pytest.fixture(scope="session")
def streamlit() -> Serving:
    """A function that runs the chat page's server before an endpoint, for the length of a block."""
    return _streamlit


@contextmanager
def _streamlit(base_url: str) -> Iterator[str]:
    """The page's server; yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    from serve.ui.chat import page_command

    command = page_command(base_url, "127.0.0.1", port)
    with subprocess.Popen(
        command, env=child_environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as server:
        try:
            until = time.monotonic() + 60
            while True:
                try:
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/_stcore/health", timeout=2).close()
                    break
                except OSError:
                    assert time.monotonic() < until and server.poll() is None
                    time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
