"""The coordinator: the one actor of a run that all workers talk to, a few times a second.

It assigns positions, leases what each endpoint allows, appends what came back to the ledger, and stops the run: when
the budget is spent, when no endpoint can answer, or when nothing but errors comes back. It runs as a Ray actor with
coroutines; nothing here blocks but the ledger's own thread.
"""

import asyncio
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import numpy as np

from pipelines.artifacts.workspace import Workspace
from pipelines.llm.ledger import GroupCommit, LedgerRecord, LedgerWriter, RecordKind
from pipelines.llm.rate_limiter import Lease, RateLimiter, Usage
from pipelines.recipe.llm import ModelRequests, Price

RATE_SECONDS = 30.0
"""The rates in the progress line are those of so many seconds."""
MIN_ERRORS_IN_A_ROW = 20
"""Fewer errors than this do not stop a run."""
MAX_FAILURES_AT_FIRST = 50
"""A run stops where so many requests failed for good and not one has an answer."""
NOT_AN_API = ("html", "not_json", "not_a_completion")
"""Errors that, where nothing was ever answered, mean that the address is wrong."""
MIN_ANSWERS_FOR_MEAN = 8
"""After this many answers the projected cost uses the measured mean."""


@dataclass(frozen=True)
class WorkerReport:
    """What a worker did since its last report: its use of each endpoint, and how its tries ended."""

    usages: list[Usage]
    wanted: int
    errors: int = 0
    last_error: tuple[str, str] = ("", "")
    fatal: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """What a worker is to do: positions, a lease for each endpoint, whether that was all, and why to stop."""

    positions: list[int]
    leases: list[Lease]
    finished: bool
    stop: str = ""


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
    reasons: dict[str, int]


def cost_of(price: Price | None, input_tokens: float, output_tokens: float) -> Decimal:
    """What tokens cost; 0 without a price."""
    if price is None:
        return Decimal(0)
    return (price.input * Decimal(input_tokens) + price.output * Decimal(output_tokens)) / 1_000_000


class Coordinator:
    """The state of one run: made, then opened, then begun."""

    def __init__(self, section: ModelRequests) -> None:
        self._section = section

    async def open(self, workspace: Workspace) -> None:
        """Take hold of the ledger, which no other run writes to from here on; StageError where one does."""
        self._ledger = GroupCommit(await asyncio.to_thread(LedgerWriter, workspace))

    async def begin(
        self, pending: np.ndarray[Any, np.dtype[np.int64]], spent: tuple[int, int], expected_input: float
    ) -> None:
        """Be ready for workers.

        `pending` are the positions to assign, `spent` the input and output tokens that all requests took in earlier
        runs, and `expected_input` the tokens of one prompt.
        """
        section = self._section
        self._pending = deque([pending]) if len(pending) else deque()
        self._assigned: dict[str, set[int]] = {}
        expected_output = float(section.generation.max_tokens)
        self._limiters = [RateLimiter(endpoint, expected_input, expected_output) for endpoint in section.endpoints]
        self._fatal: dict[int, str] = {}
        self._max_cost = Decimal(0)
        self._estimated_cost = cost_of(section.price, expected_input, expected_output)
        self._total = len(pending)
        self._before = spent
        self._tokens = [0, 0]
        self._kinds: Counter[RecordKind] = Counter()
        self._reasons: Counter[str] = Counter()
        self._errors = 0
        self._began = self._last_record = time.monotonic()
        self._recent: deque[tuple[float, int, int]] = deque()
        self._stop = ""

    async def assign(self, worker: str, report: WorkerReport) -> Assignment:
        """Take in a worker's report and tell it what to do next."""
        now = time.monotonic()
        self._assigned.setdefault(worker, set())
        self._fatal.update(report.fatal)
        self._stop_on_errors(report, now)
        leases = [
            limiter.lease(worker, usage, now) if number not in self._fatal else Lease(0, 0)
            for number, (limiter, usage) in enumerate(zip(self._limiters, report.usages, strict=True))
        ]
        tries = sum(usage.finished + len(usage.refusals) for usage in report.usages) + report.errors
        self._recent.append((now, tries, 0))
        positions = [] if self._stop else self._take_pending(worker, report.wanted)
        is_last = not self._pending and not self._others_hold_positions(worker)
        return Assignment(positions, leases, is_last, self._stop)

    async def record(self, worker: str, records: Sequence[tuple[int, LedgerRecord, str]]) -> None:
        """Append what became of positions; each record with its class of failure. Returns when all are on disk."""
        await self._ledger.append([record for _, record, _ in records])
        now = time.monotonic()
        for pos, record, reason in records:
            self._assigned.get(worker, set()).discard(pos)
            self._kinds[record.kind] += 1
            self._tokens[0] += record.input_tokens
            self._tokens[1] += record.output_tokens
            cost = cost_of(self._section.price, record.input_tokens, record.output_tokens)
            self._max_cost = max(self._max_cost, cost)
            if reason:
                self._reasons[reason] += 1
        if any(record.kind is RecordKind.ANSWER for _, record, _ in records):
            self._errors, self._last_record = 0, now
        self._recent.append((now, 0, sum(record.input_tokens + record.output_tokens for _, record, _ in records)))

    async def release(self, worker: str) -> None:
        """Take back what a worker held that died."""
        for limiter in self._limiters:
            limiter.release(worker)
        held = self._assigned.pop(worker, set())
        if held:
            self._pending.appendleft(np.array(sorted(held), np.int64))

    async def progress(self) -> RunProgress:
        """How far the run is."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - RATE_SECONDS:
            self._recent.popleft()
        minutes = max(min(now - self._began, RATE_SECONDS), 1.0) / 60
        done = self._kinds.total()
        rate = done / max(now - self._began, 1e-9)
        tokens = [before + new for before, new in zip(self._before, self._tokens, strict=True)]
        spent = cost_of(self._section.price, *tokens)
        return RunProgress(
            done=self._kinds[RecordKind.ANSWER],
            failed=self._kinds[RecordKind.FAILURE],
            total=self._total,
            in_flight=sum(limiter.in_flight for limiter in self._limiters),
            requests=sum(tries for _, tries, _ in self._recent) / minutes,
            tokens=sum(count for _, _, count in self._recent) / minutes,
            cost=spent,
            projected=spent + self._expected_cost() * (self._total - done),
            seconds_left=(self._total - done) / rate if done else None,
            stop=self._stop,
            reasons=dict(self._reasons),
        )

    async def close(self) -> None:
        """Write what is left and let go of the ledger."""
        await self._ledger.close()

    def _others_hold_positions(self, worker: str) -> bool:
        """Whether other workers hold positions, which come back if those workers die."""
        return any(held for name, held in self._assigned.items() if name != worker)

    def _expected_cost(self) -> Decimal:
        done = self._kinds.total()
        if done < MIN_ANSWERS_FOR_MEAN:
            return self._estimated_cost
        return cost_of(self._section.price, *self._tokens) / done

    def _take_pending(self, worker: str, wanted: int) -> list[int]:
        allowed = min(wanted, self._affordable())
        if wanted and not allowed and self._pending and not any(self._assigned.values()):
            self._stop = "budget"
        positions: list[int] = []
        while self._pending and len(positions) < allowed:
            part = self._pending.popleft()
            taken = allowed - len(positions)
            positions += part[:taken].tolist()
            if len(part) > taken:
                self._pending.appendleft(part[taken:])
        self._assigned[worker].update(positions)
        return positions

    def _affordable(self) -> int:
        """How many more positions the budget bears, if each, and each that is assigned, costs the most that it may."""
        budget = self._section.budget
        expected = max(self._estimated_cost, self._max_cost)
        if budget is None or not expected:
            return 1 << 30
        tokens = [before + new for before, new in zip(self._before, self._tokens, strict=True)]
        left = budget - cost_of(self._section.price, *tokens)
        return max(0, int(left / expected) - sum(map(len, self._assigned.values())))

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
        self._errors += report.errors
        if report.errors and self._errors >= MIN_ERRORS_IN_A_ROW:
            reason, said = report.last_error
            never = not self._kinds[RecordKind.ANSWER]
            patience = 0.0 if never and reason in NOT_AN_API else self._section.circuit_breaker
            if now - self._last_record >= patience:
                self._stop = f"{self._errors} errors in a row and no answer; the last is {reason}: {said}"
                if never and reason in NOT_AN_API:
                    self._stop += " (is base_url right? It usually ends in /v1)"
