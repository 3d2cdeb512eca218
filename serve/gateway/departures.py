"""Clients that close their connection before the answer is there: the work for them is dropped."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from serve.asgi import Receive

WATCH_AFTER_SECONDS = 0.05

Result = TypeVar("Result")


class Departures:
    """Drops work whose client has gone, so that its engine stops generating.

    A client is watched by a task of its own once its request is `WATCH_AFTER_SECONDS` old: for short answers that task
    costs more than it saves. One timer finds the requests of that age; a timer for each took a tenth of the gateway.
    """

    def __init__(self) -> None:
        self._unwatched: dict[asyncio.Task[Any], tuple[float, Receive]] = {}
        self._watchers: dict[asyncio.Task[Any], asyncio.Task[None]] = {}
        self._gone: set[asyncio.Task[Any]] = set()
        self._next: asyncio.TimerHandle | None = None

    async def unless_gone(self, receive: Receive, work: Coroutine[Any, Any, Result]) -> Result | None:
        """Do the work; None where the client closed its connection meanwhile."""
        worker = asyncio.current_task()
        assert worker is not None
        loop = asyncio.get_running_loop()
        self._unwatched[worker] = (loop.time(), receive)
        if self._next is None:
            self._next = loop.call_later(WATCH_AFTER_SECONDS, self._look)
        try:
            return await work
        except asyncio.CancelledError:
            if worker not in self._gone:
                raise
            worker.uncancel()
            return None
        finally:
            self._unwatched.pop(worker, None)
            self._gone.discard(worker)
            if worker in self._watchers:
                self._watchers.pop(worker).cancel()

    def _look(self) -> None:
        """Watch the clients of all requests that are old enough; the oldest come first."""
        loop = asyncio.get_running_loop()
        until = loop.time() - WATCH_AFTER_SECONDS
        for worker, (began, receive) in list(self._unwatched.items()):
            if began > until:
                break
            del self._unwatched[worker]
            self._watchers[worker] = loop.create_task(self._watch(worker, receive))
        self._next = loop.call_later(WATCH_AFTER_SECONDS, self._look) if self._unwatched else None

    async def _watch(self, worker: asyncio.Task[Any], receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._gone.add(worker)
        worker.cancel()
