"""What is written within one turn of the event loop goes out together, and nothing is lost by waiting for its end."""

import asyncio
from typing import Any

from serve.gateway.protocol import JOINED_BYTES, JoinedWrites


class Transport:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def write(self, data: bytes) -> None:
        self.told.append(data)

    def close(self) -> None:
        self.told.append("close")

    def is_closing(self) -> bool:
        return "close" in self.told


def told_of(*writes: bytes, close: bool = False) -> list[Any]:
    """What a transport is told of these writes."""
    transport = Transport()

    async def write() -> None:
        joined = JoinedWrites(transport, asyncio.get_running_loop())  # type: ignore[arg-type]
        for data in writes:
            joined.write(data)
        if close:
            joined.close()
            assert joined.is_closing()
        await asyncio.sleep(0)

    asyncio.run(write())
    return transport.told


def test_head_and_body_are_one_packet() -> None:
    assert told_of(b"head", b"body") == [b"headbody"]


def test_closing_sends_what_waits_first() -> None:
    assert told_of(b"head", b"body", close=True) == [b"headbody", "close"]
    assert told_of(close=True) == ["close"]


def test_much_does_not_wait_so_that_a_slow_reader_is_felt_at_once() -> None:
    piece = b"x" * JOINED_BYTES
    assert told_of(piece, b"y", b"z") == [piece + b"y", b"z"]


def test_turns_are_apart() -> None:
    transport = Transport()

    async def write() -> None:
        joined = JoinedWrites(transport, asyncio.get_running_loop())  # type: ignore[arg-type]
        for data in (b"one", b"two"):
            joined.write(data)
            await asyncio.sleep(0)

    asyncio.run(write())
    assert transport.told == [b"one", b"two"]


def test_what_waits_for_a_client_that_has_left_is_dropped() -> None:
    transport = Transport()

    async def write() -> None:
        joined = JoinedWrites(transport, asyncio.get_running_loop())  # type: ignore[arg-type]
        joined.write(b"late")
        transport.close()
        await asyncio.sleep(0)

    asyncio.run(write())
    assert transport.told == ["close"]
