"""A closed-loop HTTP/1.1 client that costs little: so many connections, each asking again when it is answered."""

import asyncio
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Load:
    """What came back: seconds per request to the first byte of the body and to the end; bodies where they are kept."""

    seconds: float = 0.0
    to_first: list[float] = field(default_factory=list)
    to_end: list[float] = field(default_factory=list)
    statuses: dict[int, int] = field(default_factory=dict)
    bodies: list[bytes] = field(default_factory=list)

    @property
    def per_second(self) -> float:
        """Requests answered per second."""
        return len(self.to_end) / self.seconds

    @property
    def median_to_first_ms(self) -> float:
        """Median milliseconds to the first byte of the body."""
        return statistics.median(self.to_first) * 1000


def request(path: str, body: bytes, key: str | None = None) -> bytes:
    """The bytes of a POST."""
    authorization = f"Authorization: Bearer {key}\r\n" if key else ""
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{authorization}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


async def ask_all(port: int, requests: list[bytes], connections: int) -> Load:
    """Send every request once over so many connections."""
    load = Load()
    waiting = list(reversed(requests))
    began = time.perf_counter()
    await asyncio.gather(*(_ask_on_one(port, waiting, load) for _ in range(min(connections, len(requests)))))
    load.seconds = time.perf_counter() - began
    return load


async def ask_for(port: int, one: bytes, connections: int, seconds: float, load: Load) -> None:
    """Send the same request again and again for so many seconds more."""
    until = time.perf_counter() + seconds

    async def again() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < until:
            await _exchange(reader, writer, one, load)
        writer.close()

    began = time.perf_counter()
    await asyncio.gather(*(again() for _ in range(connections)))
    load.seconds += time.perf_counter() - began
    load.bodies = load.bodies[:1]


async def ask_until(stop: asyncio.Event, port: int, requests: Iterator[bytes], load: Load) -> None:
    """Ask one request after the other over one connection, until told to stop; bodies are not kept."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while not stop.is_set():
        await _exchange(reader, writer, next(requests), load)
        load.bodies.clear()
    writer.close()


async def _ask_on_one(port: int, waiting: list[bytes], load: Load) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    while waiting:
        await _exchange(reader, writer, waiting.pop(), load)
    writer.close()


async def _exchange(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, sent: bytes, load: Load) -> None:
    began = time.perf_counter()
    writer.write(sent)
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    status = int(head.split(b" ", 2)[1])
    at = head.find(b"\r\ncontent-length:")
    if at >= 0:
        body = await reader.readexactly(int(head[at + 17 :].split(b"\r\n", 1)[0]))
        first = time.perf_counter()
    else:
        body, first = await _chunks(reader)
    load.statuses[status] = load.statuses.get(status, 0) + 1
    load.to_first.append(first - began)
    load.to_end.append(time.perf_counter() - began)
    load.bodies.append(body)


async def _chunks(reader: asyncio.StreamReader) -> tuple[bytes, float]:
    """A chunked body, and when its first chunk was there."""
    parts: list[bytes] = []
    first = 0.0
    while size := int(await reader.readline(), 16):
        parts.append((await reader.readexactly(size + 2))[:-2])
        first = first or time.perf_counter()
    await reader.readline()
    return b"".join(parts), first
