"""A worker: sends requests, as many as it holds leases for, and reports what became of them.

It runs as a Ray actor with coroutines. Prompts are made here, from the recipe and a position, so that little
travels; an answer is reported at once, and its position is settled when the desk has it on disk.
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
from pipelines.llm.coordinator import Instructions, Tidings
from pipelines.llm.ledger import Record
from pipelines.llm.rate_limiter import LEASE_SECONDS, Lease, Usage
from pipelines.llm.requests import Outcome, Questions, Request, Verdict, checked, record_of

RENEW_SECONDS = 0.2
"""How often a worker comes to the desk; at once, but not more often than `HURRY_SECONDS`, where it runs out of work."""
HURRY_SECONDS = 0.03
FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 60.0
GRACE_SECONDS = 10.0
"""How long answers are waited for that are under way when a run is stopped for its errors."""

NOTHING = Lease(0, 0)


@dataclass(order=True)
class _Task:
    """A position to be asked, from the moment `due` on."""

    due: float
    pos: int
    attempt: int = field(compare=False, default=0)


@dataclass
class _Seat:
    """A worker's place at one endpoint: its lease, and what happened since it was granted."""

    client: Client
    weight: float
    lease: Lease = NOTHING
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
        """Whether a request may be started; a place that was refused stays empty until the desk knows of it."""
        if self.in_flight + len(self.refusals) >= self.lease.max_in_flight:
            return False
        return self.lease.starts is None or (self.starts_left > 0 and now - self.granted_at < LEASE_SECONDS)

    def settle(self, waiting: int, now: float) -> Usage:
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
    """One process that asks. `keys` holds each endpoint's key, which is never written down."""

    def __init__(self, name: str, desk: Any, questions: Questions, keys: list[SecretStr | None]) -> None:
        self._name, self._desk, self._questions = name, desk, questions
        self._section = questions.section
        self._seats = [
            _Seat(Client(endpoint, self._section, key, questions.response_format), endpoint.weight)
            for endpoint, key in zip(self._section.endpoints, keys, strict=True)
        ]
        self._queue: deque[_Task] = deque()
        self._later: list[_Task] = []
        self._outbox: list[tuple[int, Record, str]] = []
        self._unwritten = self._errors = 0
        self._last_error = ("", "")
        self._fatal: dict[int, str] = {}
        self._finished = False
        self._stop = ""
        self._bug: BaseException | None = None
        self._changed, self._filled, self._hurry = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._asking: set[asyncio.Task[None]] = set()

    async def run(self) -> None:
        """Ask until the desk has nothing more or stops the run; what is under way then is still waited for."""
        gc.freeze()  # the libraries are not looked through again: that stops all requests for a tenth of a second
        helpers = [asyncio.create_task(self._renew()), asyncio.create_task(self._report())]
        work = asyncio.create_task(self._work())
        try:
            await asyncio.wait([work, *helpers], return_when=asyncio.FIRST_COMPLETED)
            for task in helpers:
                if task.done():
                    task.result()  # helpers do not end by themselves: this raises what it died of
            await work
        finally:
            for task in [work, *helpers, *self._asking]:
                task.cancel()
            for seat in self._seats:
                await seat.client.close()

    async def _work(self) -> None:
        while not self._stop and not self._is_idle():
            self._changed.clear()
            if self._bug is not None:
                raise self._bug
            now = time.monotonic()
            while self._later and self._later[0].due <= now:
                self._queue.appendleft(heapq.heappop(self._later))
            self._start_what_may_be(now)
            await _wait(self._changed, self._later[0].due - now if self._later else RENEW_SECONDS)
        if self._asking:
            await asyncio.wait(self._asking, timeout=None if self._stop in ("", "budget") else GRACE_SECONDS)
        while self._unwritten:
            self._changed.clear()
            await self._changed.wait()

    def _is_idle(self) -> bool:
        return self._finished and not (self._queue or self._later or self._asking or self._unwritten)

    def _start_what_may_be(self, now: float) -> None:
        while (following := self._next(now)) is not None:
            asking = asyncio.create_task(self._ask_on(*following))
            self._asking.add(asking)
            asking.add_done_callback(self._asked)

    def _next(self, now: float) -> tuple[_Task, _Seat] | None:
        """Take the next position and a place to ask it at, where there are both."""
        if len(self._queue) < self._room() // 2 and not self._finished:
            self._hurry.set()
        if self._stop or not self._queue or (seat := self._free_seat(now)) is None:
            return None
        seat.in_flight += 1
        seat.started += 1
        seat.starts_left -= seat.lease.starts is not None
        return self._queue.popleft(), seat

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._asking.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self._bug = error
        self._changed.set()

    def _free_seat(self, now: float) -> _Seat | None:
        """The endpoint that is furthest behind its weight, of those that may be asked."""
        if self._unwritten > 2 * self._room():
            return None  # the disk does not keep up; answers must not pile up in memory
        free = [seat for seat in self._seats if seat.is_free(now)]
        return min(free, key=lambda seat: seat.started / seat.weight, default=None)

    def _room(self) -> int:
        return max(16, sum(seat.lease.max_in_flight for seat in self._seats))

    async def _ask_on(self, task: _Task, seat: _Seat) -> None:
        """Ask, and at once the next that may be asked: answers that came together need not wait for each other."""
        following: tuple[_Task, _Seat] | None = (task, seat)
        while following is not None:
            await self._ask(*following)
            following = self._next(time.monotonic())

    async def _ask(self, task: _Task, seat: _Seat) -> None:
        request = self._questions.request(task.pos)
        sent = time.monotonic()
        outcome = checked(self._questions, request, await seat.client.ask(request.messages))
        now = time.monotonic()
        seat.in_flight -= 1
        seat.tokens[0] += outcome.input_tokens
        seat.tokens[1] += outcome.output_tokens
        self._judge(task, seat, request, outcome, sent, now)

    def _judge(self, task: _Task, seat: _Seat, request: Request, outcome: Outcome, sent: float, now: float) -> None:
        """Decide what follows from an outcome."""
        verdict = outcome.verdict
        if verdict in (Verdict.ANSWER, Verdict.FAILURE):
            seat.answered += verdict is Verdict.ANSWER
            seat.finished += 1
            self._file(task, request, outcome, now - sent)
        elif verdict is Verdict.REFUSED:
            seat.refusals.append(sent)
            seat.pause = max(seat.pause, outcome.retry_after)
            self._put_off(task, max(outcome.retry_after, random.uniform(0.5, 1.0) * FIRST_BACKOFF))
            self._hurry.set()
        elif verdict is Verdict.FATAL:
            self._fatal[self._seats.index(seat)] = outcome.text
            seat.lease = NOTHING
            self._queue.appendleft(task)
            self._hurry.set()
        else:
            self._errors += 1
            self._last_error = (outcome.reason, outcome.text)
            task.attempt += 1
            if task.attempt >= self._section.max_attempts:
                self._file(task, request, outcome, now - sent)
            else:
                backoff = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (task.attempt - 1))
                self._put_off(task, backoff * random.uniform(0.5, 1.0))

    def _put_off(self, task: _Task, seconds: float) -> None:
        task.due = time.monotonic() + seconds
        heapq.heappush(self._later, task)

    def _file(self, task: _Task, request: Request, outcome: Outcome, seconds: float) -> None:
        record = record_of(request, outcome, task.attempt + 1, seconds)
        self._outbox.append((task.pos, record, outcome.reason))
        self._unwritten += 1
        self._filled.set()

    async def _report(self) -> None:
        """Bring what was filed to the desk; what comes meanwhile goes along the next time."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            records, self._outbox = self._outbox, []
            await self._desk.record.remote(self._name, records)
            self._unwritten -= len(records)
            self._changed.set()

    async def _renew(self) -> None:
        """Come to the desk for leases and work."""
        while True:
            self._hurry.clear()
            now = time.monotonic()
            waiting = len(self._queue) + len(self._later)
            wanted = 0 if self._finished else max(0, 2 * self._room() - waiting)
            usages = [seat.settle(waiting + wanted, now) for seat in self._seats]
            tidings = Tidings(usages, wanted, self._errors, self._last_error, self._fatal)
            self._errors = 0
            self._obey(await self._desk.lease.remote(self._name, tidings))
            await asyncio.sleep(HURRY_SECONDS)
            await _wait(self._hurry, RENEW_SECONDS - HURRY_SECONDS)

    def _obey(self, instructions: Instructions) -> None:
        now = time.monotonic()
        for seat, lease in zip(self._seats, instructions.leases, strict=True):
            seat.accept(lease, now)
        self._queue.extend(_Task(0.0, pos) for pos in instructions.positions)
        self._finished = instructions.finished
        self._stop = instructions.stop
        self._changed.set()


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, but not longer than that."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        return
