"""A worker: sends requests, as many as it holds leases for, and reports what became of them.

It runs as a Ray actor with coroutines. Prompts are made here, from the recipe and a position, so that little
travels; an answer is reported at once, and its position is done when the coordinator has it on disk.
"""

import asyncio
import gc
import heapq
import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from pydantic import SecretStr

from pipelines.llm.client import Client
from pipelines.llm.coordinator import Assignment, WorkerReport
from pipelines.llm.ledger import LedgerRecord
from pipelines.llm.rate_limiter import LEASE_SECONDS, Lease, Usage
from pipelines.llm.requests import ChatRequest, Outcome, OutcomeKind, RequestSource, checked, record_of

RENEW_SECONDS = 0.2
"""How often a worker reports; at once, but not more often than `HURRY_SECONDS`, where it runs out of work."""
HURRY_SECONDS = 0.03
FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 60.0
GRACE_SECONDS = 10.0
"""How long answers are waited for that are under way when a run is stopped for its errors."""

NO_LEASE = Lease(0, 0)


@dataclass(order=True)
class _QueuedRequest:
    """A position whose request may be sent from the moment `due` on."""

    due: float
    pos: int
    attempt: int = field(compare=False, default=0)


@dataclass
class EndpointSlot:
    """A worker's share of one endpoint: its lease, and what happened since it was granted."""

    client: Client
    weight: float
    lease: Lease = NO_LEASE
    granted_at: float = 0.0
    starts_left: int = 0
    in_flight: int = 0
    started: int = 0
    answered: int = 0
    finished: int = 0
    refusals: list[float] = field(default_factory=list)
    pause: float = 0.0
    tokens: list[int] = field(default_factory=lambda: [0, 0])

    def is_free(self, now: float) -> bool:
        """Whether a request may be started; what was refused still counts until the coordinator knows of it."""
        if self.in_flight + len(self.refusals) >= self.lease.max_in_flight:
            return False
        return self.lease.starts is None or (self.starts_left > 0 and now - self.granted_at < LEASE_SECONDS)

    def take_usage(self, waiting: int, now: float) -> Usage:
        """What happened since the last lease; counts begin anew, and starts that were not used are given back."""
        usage = Usage(
            self.in_flight,
            waiting,
            self.starts_left,
            self.answered,
            self.finished,
            tuple(now - sent for sent in self.refusals),
            self.pause,
            *self.tokens,
        )
        self.starts_left = self.answered = self.finished = 0
        self.refusals, self.pause, self.tokens = [], 0.0, [0, 0]
        return usage

    def accept(self, lease: Lease, now: float) -> None:
        """Take a new lease."""
        self.lease, self.granted_at, self.starts_left = lease, now, lease.starts or 0


class Worker:
    """One process that sends requests. `keys` holds each endpoint's key, which is never written down."""

    def __init__(self, name: str, coordinator: Any, source: RequestSource, keys: list[SecretStr | None]) -> None:
        self._name, self._coordinator, self._source = name, coordinator, source
        self._section = source.section
        self._slots = [
            EndpointSlot(Client(endpoint, self._section, key, source.response_format), endpoint.weight)
            for endpoint, key in zip(self._section.endpoints, keys, strict=True)
        ]
        self._queue: deque[_QueuedRequest] = deque()
        self._later: list[_QueuedRequest] = []
        self._outbox: list[tuple[int, LedgerRecord, str]] = []
        self._unwritten = self._errors = 0
        self._last_error = ("", "")
        self._fatal: dict[int, str] = {}
        self._finished = False
        self._stop = ""
        self._bug: BaseException | None = None
        self._changed, self._filled, self._hurry = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._sending: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Send until the coordinator has nothing more or stops the run; what is under way then is still waited for."""
        gc.freeze()  # the libraries are not looked through again: that stops all requests for a tenth of a second
        helpers = [asyncio.create_task(self._renew()), asyncio.create_task(self._send_records())]
        work = asyncio.create_task(self._work())
        try:
            await asyncio.wait([work, *helpers], return_when=asyncio.FIRST_COMPLETED)
            for task in helpers:
                if task.done():
                    task.result()  # helpers do not end by themselves: this raises what it died of
            await work
        finally:
            for task in [work, *helpers, *self._sending]:
                task.cancel()
            for slot in self._slots:
                await slot.client.close()

    async def _work(self) -> None:
        while not self._stop and not self._is_idle():
            self._changed.clear()
            if self._bug is not None:
                raise self._bug
            now = time.monotonic()
            while self._later and self._later[0].due <= now:
                self._queue.appendleft(heapq.heappop(self._later))
            self._start_allowed(now)
            await _wait(self._changed, self._later[0].due - now if self._later else RENEW_SECONDS)
        if self._sending:
            await asyncio.wait(self._sending, timeout=None if self._stop in ("", "budget") else GRACE_SECONDS)
        while self._unwritten:
            self._changed.clear()
            await self._changed.wait()

    def _is_idle(self) -> bool:
        return self._finished and not (self._queue or self._later or self._sending or self._unwritten)

    def _start_allowed(self, now: float) -> None:
        while (following := self._next(now)) is not None:
            sending = asyncio.create_task(self._send_on(*following))
            self._sending.add(sending)
            sending.add_done_callback(self._sent)

    def _next(self, now: float) -> tuple[_QueuedRequest, EndpointSlot] | None:
        """Take the next position and an endpoint for it, where there are both."""
        if len(self._queue) < self._room() // 2 and not self._finished:
            self._hurry.set()
        if self._stop or not self._queue or (slot := self._free_slot(now)) is None:
            return None
        slot.in_flight += 1
        slot.started += 1
        slot.starts_left -= slot.lease.starts is not None
        return self._queue.popleft(), slot

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._bug = error
        self._changed.set()

    def _free_slot(self, now: float) -> EndpointSlot | None:
        """The endpoint that is furthest behind its weight, of those that may be sent a request."""
        if self._unwritten > 2 * self._room():
            return None  # the disk does not keep up; answers must not pile up in memory
        free = [slot for slot in self._slots if slot.is_free(now)]
        return min(free, key=lambda slot: slot.started / slot.weight, default=None)

    def _room(self) -> int:
        return max(16, sum(slot.lease.max_in_flight for slot in self._slots))

    async def _send_on(self, queued: _QueuedRequest, slot: EndpointSlot) -> None:
        """Send, and at once the next that may be sent: answers that came together need not wait for each other."""
        following: tuple[_QueuedRequest, EndpointSlot] | None = (queued, slot)
        while following is not None:
            await self._send(*following)
            following = self._next(time.monotonic())

    async def _send(self, queued: _QueuedRequest, slot: EndpointSlot) -> None:
        request = self._source.request(queued.pos)
        sent = time.monotonic()
        outcome = checked(self._source, request, await slot.client.send(request.messages))
        seconds = time.monotonic() - sent
        slot.in_flight -= 1
        slot.tokens[0] += outcome.input_tokens
        slot.tokens[1] += outcome.output_tokens
        if outcome.kind in (OutcomeKind.ANSWERED, OutcomeKind.FAILED):
            slot.answered += outcome.kind is OutcomeKind.ANSWERED
            slot.finished += 1
            self._finish(queued, request, outcome, seconds)
        elif outcome.kind is OutcomeKind.RATE_LIMITED:
            slot.refusals.append(sent)
            slot.pause = max(slot.pause, outcome.retry_after)
            self._retry_later(queued, max(outcome.retry_after, random.uniform(0.5, 1.0) * FIRST_BACKOFF))
            self._hurry.set()
        elif outcome.kind is OutcomeKind.FATAL:
            self._fatal[self._slots.index(slot)] = outcome.text
            slot.lease = NO_LEASE
            self._queue.appendleft(queued)
            self._hurry.set()
        else:
            self._errors += 1
            self._last_error = (outcome.reason, outcome.text)
            queued.attempt += 1
            if queued.attempt >= self._section.max_attempts:
                self._finish(queued, request, outcome, seconds)
            else:
                backoff = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (queued.attempt - 1))
                self._retry_later(queued, backoff * random.uniform(0.5, 1.0))

    def _retry_later(self, queued: _QueuedRequest, seconds: float) -> None:
        queued.due = time.monotonic() + seconds
        heapq.heappush(self._later, queued)

    def _finish(self, queued: _QueuedRequest, request: ChatRequest, outcome: Outcome, seconds: float) -> None:
        record = record_of(request, outcome, queued.attempt + 1, seconds)
        self._outbox.append((queued.pos, record, outcome.reason))
        self._unwritten += 1
        self._filled.set()

    async def _send_records(self) -> None:
        """Send records to the coordinator; what comes meanwhile goes along the next time."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            records, self._outbox = self._outbox, []
            await self._coordinator.record.remote(self._name, records)
            self._unwritten -= len(records)
            self._changed.set()

    async def _renew(self) -> None:
        """Report to the coordinator, and take leases and positions from it."""
        while True:
            self._hurry.clear()
            now = time.monotonic()
            waiting = len(self._queue) + len(self._later)
            wanted = 0 if self._finished else max(0, 2 * self._room() - waiting)
            usages = [slot.take_usage(waiting + wanted, now) for slot in self._slots]
            report = WorkerReport(usages, wanted, self._errors, self._last_error, self._fatal)
            self._errors = 0
            self._accept(await self._coordinator.assign.remote(self._name, report))
            await asyncio.sleep(HURRY_SECONDS)
            await _wait(self._hurry, RENEW_SECONDS - HURRY_SECONDS)

    def _accept(self, assignment: Assignment) -> None:
        now = time.monotonic()
        for slot, lease in zip(self._slots, assignment.leases, strict=True):
            slot.accept(lease, now)
        self._queue.extend(_QueuedRequest(0.0, pos) for pos in assignment.positions)
        self._finished = assignment.finished
        self._stop = assignment.stop
        self._changed.set()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, but not longer than that."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        return
