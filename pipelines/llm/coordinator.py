"""The coordinator: the one actor of a run that all workers talk to, a few times a second.

It leases what each endpoint and the budget allow, appends what came back to the ledger, and stops the run: when the
budget is spent, when no endpoint can answer, or when nothing but errors or refusals comes back. It runs as a Ray actor
with coroutines; nothing here blocks but the ledger's own thread.
"""

import asyncio
import json
import math
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal

import numpy as np

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import DanluError
from pipelines.llm.ledger import GroupCommit, LedgerRecord, LedgerWriter, RecordKind
from pipelines.llm.rate_limiter import Lease, RateLimiter, Usage
from pipelines.llm.requests import Positions
from pipelines.recipe.llm import ModelRequests, Price

RATE_SECONDS = 30.0
"""The rates in the progress line are those of so many seconds."""
MIN_ERRORS_IN_A_ROW = 20
"""Fewer errors than this do not stop a run."""
REFUSED_WAITS = 5
"""A run stops where for so many times `max_wait` nothing but refusals came."""
SILENT_SECONDS = 15.0
"""A worker that has said nothing for so long is taken for dead, and what it held is free."""
MAX_DEATHS = 10
"""Workers that may die, with a lost machine for example, before the run stops; Ray starts others for ever."""
NOTED_SECONDS = 5.0
"""How long after it an endpoint's last refusal is told in the progress line."""
MAX_FAILURES_AT_FIRST = 50
"""A run stops where so many requests failed for good and not one has an answer."""
NOT_AN_API = ("html", "not_json", "not_a_completion", "event_stream", "redirect")
"""Errors that, where nothing was ever answered, mean that the address is wrong."""
MIN_ANSWERS_FOR_MEAN = 8
"""After this many answers the projected cost uses the measured mean."""


@dataclass(frozen=True)
class WorkerReport:
    """What a worker did since its last report: its use of each endpoint, and how its tries ended.

    `wanted` counts the requests that it could begin with. `refusals` and `fatal` hold what endpoints said, by number.
    """

    usages: list[Usage]
    wanted: int
    errors: int = 0
    last_error: tuple[str, str] = ("", "")
    refusals: dict[int, str] = field(default_factory=dict)
    fatal: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """What a worker may do: how many requests it may begin with, a lease for each endpoint, and why to stop."""

    allowed: int
    leases: list[Lease]
    stop: str = ""


@dataclass(frozen=True)
class Filed:
    """A record for the ledger, the position it is about, its class of failure, and whether its tokens are estimated.

    A record of kind FORGOTTEN is about a try that was paid for and has no answer: the position is asked again.
    """

    pos: int
    record: LedgerRecord
    reason: str = ""
    is_estimated: bool = False
    cached_tokens: int = 0
    reasoning_tokens: int = 0


@dataclass(frozen=True)
class RunProgress:
    """How far a run is; rates are per minute, money in the price's currency."""

    done: int
    failed: int
    total: int
    in_flight: int
    requests: float
    tokens: float
    cost: Decimal
    projected: Decimal
    seconds_left: float | None
    stop: str
    notes: tuple[str, ...]
    """What people should know: who waits for whom and why, which endpoint is no longer asked, what is estimated."""


def cost_of(
    price: Price | None, input_tokens: float, output_tokens: float, cached: float = 0, reasoning: float = 0
) -> Decimal:
    """What tokens cost, of which some were cached and some reasoning; 0 without a price."""
    if price is None:
        return Decimal(0)
    cost = price.input * Decimal(input_tokens) + price.output * Decimal(output_tokens)
    if price.cached is not None:
        cost += (price.cached - price.input) * Decimal(cached)
    if price.reasoning is not None:
        cost += (price.reasoning - price.output) * Decimal(reasoning)
    return cost / 1_000_000


class Coordinator:
    """The state of one run: made, then opened, then begun."""

    def __init__(self, section: ModelRequests) -> None:
        self._section = section

    async def open(self, workspace: Workspace) -> None:
        """Take hold of the ledger, which no other run writes to from here on; StageError where one does."""
        self._ledger = GroupCommit(await asyncio.to_thread(LedgerWriter, workspace))

    async def begin(self, pending: Positions, spent: tuple[int, int], expected_input: float) -> None:
        """Be ready for workers.

        `pending` are the positions to ask, in order, `spent` the input and output tokens that all requests took in
        earlier runs, which count in full, and `expected_input` the tokens of one prompt.
        """
        section = self._section
        self._pending = pending
        self._is_settled = np.zeros(len(pending), np.bool_)
        self._begun: dict[str, int] = {}
        self._heard: dict[str, float] = {}
        expected_output = float(section.generation.max_tokens)
        self._limiters = [RateLimiter(endpoint, expected_input, expected_output) for endpoint in section.endpoints]
        self._fatal: dict[int, str] = {}
        self._refused: dict[int, tuple[float, str]] = {}
        self._max_cost = Decimal(0)
        self._estimated_cost = cost_of(section.price, expected_input, expected_output)
        self._before = spent
        self._tokens = [0, 0, 0, 0]
        self._estimated = 0
        self._kinds: Counter[RecordKind] = Counter()
        self._reasons: Counter[str] = Counter()
        self._rejected: tuple[str, int] = ("", 0)
        self._errors = self._deaths = 0
        self._refused_since: float | None = None
        self._began = self._last_record = time.monotonic()
        self._recent: deque[tuple[float, int, int]] = deque()
        self._stop = ""
        self._failure: DanluError | None = None

    async def unsettled(self, positions: Positions) -> Positions:
        """Those of the positions that have no record: all of them, unless a worker died that had begun with them."""
        return positions[~self._is_settled[np.searchsorted(self._pending, positions)]]

    async def assign(self, worker: str, report: WorkerReport) -> Assignment:
        """Take in a worker's report and tell it what to do next."""
        now = time.monotonic()
        self._release_silent(now)
        self._heard[worker] = now
        self._begun.setdefault(worker, 0)
        self._fatal.update(report.fatal)
        self._refused |= {number: (now, said) for number, said in report.refusals.items()}
        self._stop_on_errors(report, now)
        leases = [
            limiter.lease(worker, usage, now) if number not in self._fatal else Lease(0, 0)
            for number, (limiter, usage) in enumerate(zip(self._limiters, report.usages, strict=True))
        ]
        tries = sum(usage.finished + len(usage.refusals) for usage in report.usages) + report.errors
        self._recent.append((now, tries, 0))
        allowed = 0 if self._stop else min(report.wanted, self._affordable())
        if report.wanted and not allowed and not self._stop and not any(self._begun.values()):
            self._stop = "budget"
        self._begun[worker] += allowed
        return Assignment(allowed, leases, self._stop)

    async def record(self, worker: str, filed: Sequence[Filed]) -> None:
        """Append what became of tries; returns when all is on disk. What the ledger raises ends the run."""
        try:
            await self._ledger.append([one.record for one in filed])
        except DanluError as error:
            self._failure, self._stop = error, str(error)
            raise
        now = time.monotonic()
        for one in filed:
            record = one.record
            taken = record.input_tokens, record.output_tokens, one.cached_tokens, one.reasoning_tokens
            self._tokens = [before + new for before, new in zip(self._tokens, taken, strict=True)]
            self._max_cost = max(self._max_cost, cost_of(self._section.price, *taken))
            self._estimated += one.is_estimated
            if record.kind is not RecordKind.FORGOTTEN:
                self._settle(worker, one)
        if any(one.record.kind is RecordKind.ANSWER for one in filed):
            self._errors, self._rejected, self._last_record, self._refused_since = 0, ("", 0), now, None
        self._recent.append((now, 0, sum(one.record.input_tokens + one.record.output_tokens for one in filed)))

    def _settle(self, worker: str, one: Filed) -> None:
        """Note that a position is done, and whether one request after another is refused with the same words."""
        self._is_settled[np.searchsorted(self._pending, one.pos)] = True
        self._begun[worker] = max(0, self._begun.get(worker, 0) - 1)
        self._kinds[one.record.kind] += 1
        if one.reason:
            self._reasons[one.reason] += 1
        if one.reason == "rejected":
            said = json.loads(one.record.payload)["text"]
            self._rejected = (said, self._rejected[1] + 1 if said == self._rejected[0] else 1)

    def _release_silent(self, now: float) -> None:
        """Free what workers held that have died."""
        for worker in [worker for worker, at in self._heard.items() if at < now - SILENT_SECONDS]:
            del self._heard[worker]
            self._deaths += self._begun.pop(worker, 0) > 0
            for limiter in self._limiters:
                limiter.release(worker)
        if self._deaths > MAX_DEATHS and not self._stop:
            self._stop = f"{self._deaths} workers died"

    async def failure(self) -> DanluError | None:
        """What the ledger could not do, if anything."""
        return self._failure

    async def progress(self) -> RunProgress:
        """How far the run is."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - RATE_SECONDS:
            self._recent.popleft()
        minutes = max(min(now - self._began, RATE_SECONDS), 1.0) / 60
        done = self._kinds.total()
        rate = done / max(now - self._began, 1e-9)
        spent = self._spent()
        return RunProgress(
            done=self._kinds[RecordKind.ANSWER],
            failed=self._kinds[RecordKind.FAILURE],
            total=len(self._pending),
            in_flight=sum(limiter.in_flight for limiter in self._limiters),
            requests=sum(tries for _, tries, _ in self._recent) / minutes,
            tokens=sum(count for _, _, count in self._recent) / minutes,
            cost=spent,
            projected=spent + self._expected_cost() * (len(self._pending) - done),
            seconds_left=(len(self._pending) - done) / rate if done else None,
            stop=self._stop,
            notes=tuple(self._notes(now)),
        )

    async def close(self) -> None:
        """Write what is left and let go of the ledger."""
        await self._ledger.close()

    def _notes(self, now: float) -> Iterator[str]:
        for number, (limiter, endpoint) in enumerate(zip(self._limiters, self._section.endpoints, strict=True)):
            if number in self._fatal:
                yield f"{endpoint.base_url} is no longer asked, it answers {self._fatal[number]}"
                continue
            at, said = self._refused.get(number, (-math.inf, ""))
            if now < limiter.paused_until:
                yield f"waiting {limiter.paused_until - now:.0f} s for {endpoint.base_url}, which answers {said}"
            elif now - at < NOTED_SECONDS:
                yield f"refused requests wait for {endpoint.base_url}, which answers {said}"
        if self._estimated:
            yield f"tokens of {self._estimated} replies are estimated from their characters, no usage is reported"

    def _expected_cost(self) -> Decimal:
        done = self._kinds.total()
        if done < MIN_ANSWERS_FOR_MEAN:
            return self._estimated_cost
        return cost_of(self._section.price, *self._tokens) / done

    def _affordable(self) -> int:
        """How many more positions the budget bears, if each, and each that was begun, costs the most that it may."""
        budget = self._section.budget
        expected = max(self._estimated_cost, self._max_cost)
        if budget is None or not expected:
            return 1 << 30
        return max(0, int((budget - self._spent()) / expected) - sum(self._begun.values()))

    def _spent(self) -> Decimal:
        return cost_of(self._section.price, *self._before) + cost_of(self._section.price, *self._tokens)

    def _stop_on_errors(self, report: WorkerReport, now: float) -> None:
        if self._stop:
            return
        if len(self._fatal) == len(self._limiters):
            self._stop = "; ".join(
                f"{self._section.endpoints[number].base_url} answers {said}" for number, said in self._fatal.items()
            )
        if not self._kinds[RecordKind.ANSWER] and self._kinds[RecordKind.FAILURE] >= MAX_FAILURES_AT_FIRST:
            counts = ", ".join(f"{reason} {count}" for reason, count in self._reasons.most_common())
            self._stop = f"not one of the first {self._kinds[RecordKind.FAILURE]} requests has an answer: {counts}"
        said, count = self._rejected
        if count >= MIN_ERRORS_IN_A_ROW:
            self._stop = f"{count} requests in a row are rejected with the same words, {said}"
        if report.refusals:
            self._refused_since = self._refused_since or now
            refused = now - self._refused_since
            if refused >= REFUSED_WAITS * self._section.max_wait:
                self._stop = f"nothing but refusals for {refused:.0f} s: {'; '.join(report.refusals.values())}"
        self._errors += report.errors
        if report.errors and self._errors >= MIN_ERRORS_IN_A_ROW:
            reason, said = report.last_error
            never = not self._kinds[RecordKind.ANSWER]
            patience = 0.0 if never and reason in NOT_AN_API else self._section.circuit_breaker
            if now - self._last_record >= patience:
                self._stop = f"{self._errors} errors in a row and no answer; the last is {reason}: {said}"
                if never and reason in NOT_AN_API:
                    self._stop += " (is base_url right? It usually ends in /v1)"
