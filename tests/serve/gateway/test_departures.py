"""Clients that leave before their answer, and what watching for them costs those that stay."""

import asyncio
from typing import Any

import pytest

from serve.gateway import departures
from serve.gateway.departures import Departures

AFTER = departures.WATCH_AFTER_SECONDS


class Client:
    """A connection that closes after a time, or never."""

    def __init__(self, closes_after: float = 3600.0) -> None:
        self.closes_after, self.asked = closes_after, 0

    async def receive(self) -> dict[str, Any]:
        self.asked += 1
        await asyncio.sleep(self.closes_after)
        return {"type": "http.disconnect"}


async def answered(seconds: float, ended: list[str]) -> str:
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        ended.append("cancelled")
        raise
    return "answer"


def test_a_short_answer_is_given_and_its_client_is_never_watched() -> None:
    client = Client()
    assert asyncio.run(Departures().unless_gone(client.receive, answered(0, []))) == "answer"
    assert client.asked == 0


def test_work_for_a_client_that_leaves_is_dropped_and_others_go_on() -> None:
    async def both() -> list[str | None]:
        watched = Departures()
        leaves, stays = Client(AFTER), Client()
        return await asyncio.gather(
            *(watched.unless_gone(c.receive, answered(6 * AFTER, ended)) for c in (leaves, stays))
        )

    ended: list[str] = []
    assert asyncio.run(both()) == [None, "answer"]
    assert ended == ["cancelled"]


def test_requests_of_all_ages_are_watched_though_one_timer_looks() -> None:
    async def run() -> list[str | None]:
        watched = Departures()

        async def later(delay: float) -> str | None:
            await asyncio.sleep(delay)
            return await watched.unless_gone(Client(AFTER).receive, answered(20 * AFTER, []))

        return await asyncio.gather(*(later(n * AFTER / 3) for n in range(8)))

    assert asyncio.run(run()) == [None] * 8


def test_a_request_that_the_server_cancels_is_cancelled() -> None:
    async def run() -> None:
        work = asyncio.create_task(Departures().unless_gone(Client().receive, answered(3600, [])))
        await asyncio.sleep(3 * AFTER)
        work.cancel()
        await work

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(run())
