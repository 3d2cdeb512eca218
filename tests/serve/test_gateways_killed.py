"""Gateways and engines of two nodes killed with -9 under 64 streams: who loses what, and what `/ready` says."""

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import psutil
import pytest

from tests.serve.two_nodes import STREAMS

pytestmark = pytest.mark.slow

TOKENS = 150
"""Of each stream, ten a second: it lasts longer than a gateway takes to come back."""
WHOLE = "".join(f"{number} " for number in range(TOKENS))
TRUTH_SECONDS = 2.0
BACK_SECONDS = 120.0
ACTORS = ("gateway", "engine-base", "Keeper", "--engine")
"""What stands in the command lines of an endpoint's processes."""


@dataclass
class Stream:
    """What came of a stream: its text, its count of tokens, and whether it ended as it should."""

    gateway: str
    text: str = ""
    tokens: int | None = None
    done: bool = False

    @property
    def whole(self) -> bool:
        return self.done and self.text == WHOLE and self.tokens == TOKENS


@dataclass
class Endpoint:
    """The gateways of two nodes, by their addresses, and all processes by a variable of their environment."""

    urls: list[str]
    mark: str
    driver: "subprocess.Popen[str]"

    def processes(self, *names: str) -> list[psutil.Process]:
        """Those that live, of the given names."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                line = " ".join(process.cmdline())
                ours = process.environ().get("RAY_TMPDIR") == self.mark and process.pid != os.getpid()
                if ours and process.status() != psutil.STATUS_ZOMBIE and any(name in line for name in names or ("",)):
                    found.append(process)
        return found

    def gateway(self, url: str) -> psutil.Process:
        """The process that listens at a gateway's address."""
        host = url.removeprefix("http://").partition(":")[0]
        (found,) = [p for p in self.processes(":gateway") if listens(p, host)]
        return found

    def tell(self) -> None:
        """The next line of the driver's input."""
        assert self.driver.stdin is not None
        self.driver.stdin.write("\n")
        self.driver.stdin.flush()


def listens(process: psutil.Process, host: str) -> bool:
    """Whether a process listens at an address."""
    connections = process.net_connections("tcp")
    return any(c.laddr.ip == host and c.status == psutil.CONN_LISTEN for c in connections)


@pytest.fixture
def started() -> Iterator[Endpoint]:
    folder = tempfile.mkdtemp(prefix="danlu-t-")  # short: Ray's sockets lie below it
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "RAY_TMPDIR": folder}
    with subprocess.Popen(
        [sys.executable, "-m", "tests.serve.two_nodes", folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    ) as driver:
        assert driver.stdout is not None
        line = next(line for line in driver.stdout if line.startswith("["))
        endpoint = Endpoint(json.loads(line), folder, driver)
        try:
            yield endpoint
        finally:
            assert driver.stdin is not None
            driver.stdin.close()
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Watched:
    """What `/ready` of each gateway said, and when: its status, or 0 where nobody listens."""

    said: dict[str, list[tuple[float, int]]] = field(default_factory=dict)

    def since(self, url: str, at: float) -> list[int]:
        return [status for when, status in self.said[url] if when >= at]

    async def until(self, url: str, status: int, after: float, seconds: float) -> float:
        """Seconds from a moment until `/ready` said so for the first time."""
        while time.monotonic() < after + seconds + 1:
            for when, said in self.said[url]:
                if when >= after and said == status:
                    return when - after
            await asyncio.sleep(0.02)
        raise AssertionError(f"{url}/ready did not say {status}: {self.since(url, after)[-20:]}")


@asynccontextmanager
async def watching(session: aiohttp.ClientSession, urls: list[str]) -> AsyncIterator[Watched]:
    """Ask each gateway twenty times a second whether it is ready."""
    watched = Watched({url: [] for url in urls})

    async def ask(url: str) -> None:
        while True:
            status = 0
            with suppress(aiohttp.ClientError):
                async with session.get(f"{url}/ready", headers={"connection": "close"}) as answer:
                    status = answer.status
            watched.said[url].append((time.monotonic(), status))
            await asyncio.sleep(0.05)

    tasks = [asyncio.create_task(ask(url)) for url in urls]
    try:
        yield watched
    finally:
        for task in tasks:
            task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, asyncio.CancelledError) for result in results), results


async def take(session: aiohttp.ClientSession, stream: Stream) -> Stream:
    """Read a stream to its end, whatever that is."""
    body = {"model": "base", "prompt": f"count {TOKENS}", "stream": True, "stream_options": {"include_usage": True}}
    with suppress(aiohttp.ClientError):
        async with session.post(f"{stream.gateway}/v1/completions", json=body) as answer:
            assert answer.status == 200, await answer.text()
            async for line in answer.content:
                if line.startswith(b"data: {"):
                    event = json.loads(line.removeprefix(b"data: "))
                    stream.text += "".join(choice["text"] for choice in event.get("choices", ()))
                    stream.tokens = (event.get("usage") or {}).get("completion_tokens", stream.tokens)
                stream.done = stream.done or line.startswith(b"data: [DONE]")
    return stream


@asynccontextmanager
async def streaming(session: aiohttp.ClientSession, urls: list[str]) -> AsyncIterator[list[Stream]]:
    """All streams, half of them at each gateway, from when each has begun until each has ended."""
    streams = [Stream(urls[number % len(urls)]) for number in range(STREAMS)]
    tasks = [asyncio.create_task(take(session, stream)) for stream in streams]
    while not all(stream.text for stream in streams):
        assert not any(task.done() for task in tasks), "a stream ended before the last one began"
        await asyncio.sleep(0.02)
    yield streams
    await asyncio.gather(*tasks)


@contextmanager
def no_process_stays(endpoint: Endpoint) -> Iterator[None]:
    """At the end of the block the endpoint is stopped, and then Ray."""
    yield
    endpoint.tell()
    assert endpoint.driver.stdout is not None
    assert "stopped\n" in endpoint.driver.stdout
    _, left = psutil.wait_procs(endpoint.processes(*ACTORS), timeout=10)
    assert [" ".join(process.cmdline())[:80] for process in left] == []
    endpoint.tell()
    assert endpoint.driver.wait(60) == 0
    _, left = psutil.wait_procs(endpoint.processes(), timeout=10)
    assert [" ".join(process.cmdline())[:80] for process in left] == []


def unlimited() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(total=120))


def test_each_gateway_killed_breaks_its_own_streams_alone_and_comes_back(started: Endpoint) -> None:
    async def kill(victim: str, other: str) -> None:
        async with unlimited() as session, watching(session, started.urls) as watched:
            async with streaming(session, started.urls) as streams:
                process = started.gateway(victim)
                killed = time.monotonic()
                process.kill()
                await watched.until(victim, 0, killed, TRUTH_SECONDS)
            assert [stream.gateway for stream in streams if stream.whole] == [other] * (STREAMS // 2)
            assert not any(stream.done for stream in streams if stream.gateway == victim)

            back = await watched.until(victim, 200, killed, BACK_SECONDS)
            said = [(when, status) for when, status in watched.said[victim] if killed + TRUTH_SECONDS < when]
            listens = min(when for when, status in said if status != 0) - killed
            assert back - listens < TRUTH_SECONDS
            print(f"{victim}: killed, listens again after {listens:.1f} s, ready {back - listens:.2f} s later")
            assert (await take(session, Stream(victim))).whole
            assert set(watched.since(victim, killed + back)) == {200}
            assert set(watched.since(other, 0)) == {200}

    with no_process_stays(started):
        for victim, other in (started.urls, started.urls[::-1]):
            asyncio.run(kill(victim, other))


@pytest.mark.parametrize("victim", ["--engine", ":engine-base"])
def test_gateways_say_within_two_seconds_that_no_engine_is_left(started: Endpoint, victim: str) -> None:
    async def kill() -> None:
        async with unlimited() as session, watching(session, started.urls) as watched:
            async with streaming(session, started.urls[:1]) as streams:  # the other gateway has none that would break
                (process,) = started.processes(victim)
                killed = time.monotonic()
                process.kill()
                late = [await watched.until(url, 503, killed, TRUTH_SECONDS) for url in started.urls]
                print(f"{victim}: not ready {late} s after it was killed")
                assert max(late) < TRUTH_SECONDS
            assert not any(stream.done for stream in streams)
            back = [await watched.until(url, 200, killed + max(late), BACK_SECONDS) for url in started.urls]
            print(f"{victim}: ready again {back} s later")
            for url in started.urls:
                assert (await take(session, Stream(url))).whole

    with no_process_stays(started):
        asyncio.run(kill())
