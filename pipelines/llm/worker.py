"""A worker: sends the requests of blocks of positions, as many as it holds leases for, and files what became of them.

It runs as an actor of Ray Data, which calls it with several blocks at the same time: where one block waits for its last
answers, the requests of the next are under way. Prompts are made here, from the recipe and a position, so that little
travels; an answer is filed at once, and its position is done when the coordinator has it on disk.
"""

import asyncio
import gc
import heapq
import random
import time
import uuid
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import SecretStr

from pipelines.errors import DanluError
from pipelines.llm.client import Client
from pipelines.llm.coordinator import Assignment, Filed, WorkerReport
from pipelines.llm.ledger import LedgerRecord, RecordKind
from pipelines.llm.rate_limiter import LEASE_SECONDS, Lease, Usage
from pipelines.llm.requests import ChatRequest, Outcome, OutcomeKind, RequestSource, checked, record_of

RENEW_SECONDS = 0.2
"""How often a worker reports; at once, but not more often than `HURRY_SECONDS`, where it runs out of work."""
HURRY_SECONDS = 0.03
FIRST_BACKOFF, LONGEST_BACKOFF = 1.0, 60.0
GRACE_SECONDS = 3.0
"""How long answers are waited for that are under way when a run is stopped for its errors: who is told that an account
is empty waits five seconds at most."""
NOT_ASKED = "not asked"
"""What becomes of positions that a stopped run did not get to."""

ON_FILE = "on file"
"""The same of positions whose record was there when Ray Data handed their block over once more."""

NO_LEASE = Lease(0, 0)


@dataclass(eq=False)
class _Block:
    """Positions that Ray Data handed over together; `outcomes` has a word for each that is done."""

    size: int
    outcomes: dict[int, str] = field(default_factory=dict)
    is_done: asyncio.Event = field(default_factory=asyncio.Event)

    def settle(self, pos: int, outcome: str) -> None:
        self.outcomes[pos] = outcome
        if len(self.outcomes) == self.size:
            self.is_done.set()


@dataclass(order=True)
class _QueuedRequest:
    """A position whose request may be sent from the moment `due` on."""

    due: float
    pos: int
    block: _Block = field(compare=False)
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

    def __init__(self, coordinator: Any, source: RequestSource, keys: list[SecretStr | None]) -> None:
        self._name = uuid.uuid4().hex[:8]  # an actor that is started again is another worker
        self._coordinator, self._source, self._keys = coordinator, source, keys
        self._section = source.section
        self._slots: list[EndpointSlot] = []
        self._backlog: deque[_QueuedRequest] = deque()
        """Positions that the budget has not been asked for."""
        self._queue: deque[_QueuedRequest] = deque()
        self._later: list[_QueuedRequest] = []
        self._outbox: list[tuple[Filed, _Block]] = []
        self._unwritten = self._errors = 0
        self._last_error = ("", "")
        self._refusals: dict[int, str] = {}
        self._fatal: dict[int, str] = {}
        self._stop = ""
        self._bug: BaseException | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._helpers: list[asyncio.Task[None]] = []
        self._open: set[_Block] = set()

    async def __call__(self, batch: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        """What became of a block of positions, when each has its record or the run is stopped."""
        if not self._helpers:
            self._start()
        left = await self._coordinator.unsettled.remote(batch["pos"])
        block = _Block(len(left))
        if len(left) and not self._stop:
            self._open.add(block)
            self._backlog.extend(_QueuedRequest(0.0, pos, block) for pos in left.tolist())
            self._hurry.set()
            await block.is_done.wait()
            self._open.discard(block)
        if self._bug is not None:
            raise self._bug
        outcomes = dict.fromkeys(left.tolist(), NOT_ASKED) | block.outcomes
        found = [outcomes.get(pos, ON_FILE) for pos in batch["pos"].tolist()]
        yield {"pos": batch["pos"], "outcome": np.array(found)}

    def _start(self) -> None:
        """Make what belongs to the event loop that Ray Data calls from; it ends with the actor."""
        self._changed, self._filled, self._hurry = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._slots = [
            EndpointSlot(Client(endpoint, self._section, key, self._source.response_format), endpoint.weight)
            for endpoint, key in zip(self._section.endpoints, self._keys, strict=True)
        ]
        gc.freeze()  # the libraries are not looked through again: that stops all requests for a tenth of a second
        self._helpers = [asyncio.create_task(part()) for part in (self._renew, self._send_records, self._work)]
        for helper in self._helpers:
            helper.add_done_callback(self._helper_ended)

    def _helper_ended(self, task: asyncio.Task[None]) -> None:
        """Nothing goes on without a helper: give back all blocks, with the error unless the coordinator keeps it."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, DanluError):
            cause = getattr(cause, "cause", None)
        if cause is None:
            self._bug = error
        self._stop = self._stop or str(error)
        self._give_back()

    async def _work(self) -> None:
        while not self._stop:
            self._changed.clear()
            if self._bug is not None:
                raise self._bug
            now = time.monotonic()
            while self._later and self._later[0].due <= now:
                self._queue.appendleft(heapq.heappop(self._later))
            self._start_allowed(now)
            await _wait(self._changed, self._later[0].due - now if self._later else RENEW_SECONDS)
        if self._sending:
            await asyncio.wait(self._sending, timeout=None if self._stop == "budget" else GRACE_SECONDS)
        while self._unwritten:
            self._changed.clear()
            await self._changed.wait()
        self._give_back()

    def _give_back(self) -> None:
        """End all blocks as they are: what has no record by now was not asked."""
        for task in self._sending:
            task.cancel()
        for block in self._open:
            block.is_done.set()

    def _start_allowed(self, now: float) -> None:
        while (following := self._next(now)) is not None:
            sending = asyncio.create_task(self._send_on(*following))
            self._sending.add(sending)
            sending.add_done_callback(self._sent)

    def _next(self, now: float) -> tuple[_QueuedRequest, EndpointSlot] | None:
        """Take the next position and an endpoint for it, where there are both."""
        if len(self._queue) < self._room() // 2 and self._backlog:
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
        number = self._slots.index(slot)
        slot.in_flight -= 1
        slot.tokens[0] += outcome.input_tokens
        slot.tokens[1] += outcome.output_tokens
        if outcome.kind in (OutcomeKind.ANSWERED, OutcomeKind.FAILED):
            slot.answered += outcome.kind is OutcomeKind.ANSWERED
            slot.finished += 1
            self._finish(queued, request, outcome, seconds)
        elif outcome.kind is OutcomeKind.RATE_LIMITED:
            slot.refusals.append(sent)
            wait = min(outcome.retry_after, self._section.max_wait)
            slot.pause = max(slot.pause, wait)
            asked = f" and asks to be left alone for {outcome.retry_after:.0f} s" if outcome.retry_after else ""
            self._refusals[number] = outcome.text + asked
            self._retry_later(queued, max(wait, random.uniform(0.5, 1.0) * FIRST_BACKOFF))
            self._hurry.set()
        elif outcome.kind is OutcomeKind.FATAL:
            self._fatal[number] = outcome.text
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
                if outcome.input_tokens or outcome.output_tokens:
                    self._file_paid_try(queued, request, outcome)
                backoff = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2 ** (queued.attempt - 1))
                self._retry_later(queued, backoff * random.uniform(0.5, 1.0))

    def _retry_later(self, queued: _QueuedRequest, seconds: float) -> None:
        queued.due = time.monotonic() + seconds
        heapq.heappush(self._later, queued)

    def _finish(self, queued: _QueuedRequest, request: ChatRequest, outcome: Outcome, seconds: float) -> None:
        record = record_of(request, outcome, queued.attempt + 1, seconds)
        self._file(_filed(queued.pos, record, outcome, outcome.reason), queued.block)

    def _file_paid_try(self, queued: _QueuedRequest, request: ChatRequest, outcome: Outcome) -> None:
        record = LedgerRecord(request.key, RecordKind.FORGOTTEN, b"", outcome.input_tokens, outcome.output_tokens)
        self._file(_filed(queued.pos, record, outcome), queued.block)

    def _file(self, filed: Filed, block: _Block) -> None:
        self._outbox.append((filed, block))
        self._unwritten += 1
        self._filled.set()

    async def _send_records(self) -> None:
        """Send records to the coordinator; what comes meanwhile goes along the next time."""
        while True:
            await self._filled.wait()
            self._filled.clear()
            sent, self._outbox = self._outbox, []
            await self._coordinator.record.remote(self._name, [filed for filed, _ in sent])
            self._unwritten -= len(sent)
            for filed, block in sent:
                if filed.record.kind is not RecordKind.FORGOTTEN:
                    block.settle(filed.pos, filed.reason or "answered")
            self._changed.set()

    async def _renew(self) -> None:
        """Report to the coordinator, and take leases from it, and leave to begin with more positions."""
        while True:
            self._hurry.clear()
            now = time.monotonic()
            waiting = len(self._queue) + len(self._later)
            wanted = min(len(self._backlog), max(0, 2 * self._room() - waiting))
            usages = [slot.take_usage(waiting + wanted, now) for slot in self._slots]
            report = WorkerReport(usages, wanted, self._errors, self._last_error, self._refusals, self._fatal)
            self._errors, self._refusals = 0, {}
            self._accept(await self._coordinator.assign.remote(self._name, report))
            await asyncio.sleep(HURRY_SECONDS)
            await _wait(self._hurry, RENEW_SECONDS - HURRY_SECONDS)

    def _accept(self, assignment: Assignment) -> None:
        now = time.monotonic()
        for slot, lease in zip(self._slots, assignment.leases, strict=True):
            slot.accept(lease, now)
        for _ in range(min(assignment.allowed, len(self._backlog))):
            self._queue.append(self._backlog.popleft())
        self._stop = self._stop or assignment.stop
        self._changed.set()


def _filed(pos: int, record: LedgerRecord, outcome: Outcome, reason: str = "") -> Filed:
    return Filed(pos, record, reason, outcome.is_estimated, outcome.cached_tokens, outcome.reasoning_tokens)


async def _wait(event: asyncio.Event, seconds: float) -> None:
    """Wait for an event, but not longer than that."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await event.wait()
    except TimeoutError:
        return
