"""The desk: the one place of a run that all workers come to, a few times a second.

It hands out the positions that are still to be asked, leases what each endpoint allows, files what came back in the
ledger, and stops the run: when the budget is spent, when no endpoint can answer, or when nothing but errors comes back.
It runs as a Ray actor with coroutines; nothing here blocks but the ledger's own thread.
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
from pipelines.llm.ledger import GroupCommit, Kind, Record, Writer
from pipelines.llm.rate_limiter import Lease, Limiter, Usage
from pipelines.recipe.llm import Asking, Price

RATE_SECONDS = 30.0
"""What rates in the progress line are taken over."""
ERRORS_IN_A_ROW = 20
"""Fewer errors than this do not stop a run."""
FAILURES_AT_FIRST = 50
"""Requests that failed for good, with no answer beside them, that stop a run."""
NOT_AN_API = ("html", "not_json", "not_a_completion")
"""Errors that, where nothing was ever answered, mean that the address is wrong."""
KNOWN = 8
"""Answers after which costs are projected from what answers really cost."""


@dataclass(frozen=True)
class Tidings:
    """What a worker says when it comes: its use of each endpoint, and how its tries ended."""

    usages: list[Usage]
    wanted: int
    errors: int = 0
    last_error: tuple[str, str] = ("", "")
    fatal: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Instructions:
    """What a worker is told: positions to ask, a lease for each endpoint, whether that was all, and why to stop."""

    positions: list[int]
    leases: list[Lease]
    finished: bool
    stop: str = ""


@dataclass(frozen=True)
class Progress:
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


class Desk:
    """The state of one run: made, then opened, then begun."""

    def __init__(self, section: Asking) -> None:
        self._section = section

    async def open(self, workspace: Workspace) -> None:
        """Take hold of the ledger, which no other run writes to from here on; StageError where one does."""
        self._ledger = GroupCommit(await asyncio.to_thread(Writer, workspace))

    async def begin(
        self, pending: np.ndarray[Any, np.dtype[np.int64]], spent: tuple[int, int], expected_input: float
    ) -> None:
        """Be ready for workers.

        `pending` are the positions to ask, `spent` the input and output tokens that the grid cost before, and
        `expected_input` the tokens of one prompt.
        """
        section = self._section
        self._pending = deque([pending]) if len(pending) else deque()
        self._out: dict[str, set[int]] = {}
        expected_output = float(section.generation.max_tokens)
        self._limiters = [Limiter(endpoint, expected_input, expected_output) for endpoint in section.endpoints]
        self._fatal: dict[int, str] = {}
        self._dearest = Decimal(0)
        self._worst = cost_of(section.price, expected_input, expected_output)
        self._total = len(pending)
        self._before = spent
        self._tokens = [0, 0]
        self._kinds: Counter[Kind] = Counter()
        self._reasons: Counter[str] = Counter()
        self._errors = 0
        self._began = self._last_record = time.monotonic()
        self._recent: deque[tuple[float, int, int]] = deque()
        self._stop = ""

    async def lease(self, worker: str, tidings: Tidings) -> Instructions:
        """Take in a worker's tidings and tell it what to do next."""
        now = time.monotonic()
        self._out.setdefault(worker, set())
        self._fatal.update(tidings.fatal)
        self._look_for_trouble(tidings, now)
        leases = [
            limiter.lease(worker, usage, now) if number not in self._fatal else Lease(0, 0)
            for number, (limiter, usage) in enumerate(zip(self._limiters, tidings.usages, strict=True))
        ]
        tries = sum(usage.finished + len(usage.refusals) for usage in tidings.usages) + tidings.errors
        self._recent.append((now, tries, 0))
        positions = [] if self._stop else self._hand_out(worker, tidings.wanted)
        return Instructions(positions, leases, not self._pending and not self._unsettled(worker), self._stop)

    async def record(self, worker: str, records: Sequence[tuple[int, Record, str]]) -> None:
        """File what became of positions; each record with its class of failure. Returns when all are on disk."""
        await self._ledger.append([record for _, record, _ in records])
        now = time.monotonic()
        for pos, record, reason in records:
            self._out.get(worker, set()).discard(pos)
            self._kinds[record.kind] += 1
            self._tokens[0] += record.input_tokens
            self._tokens[1] += record.output_tokens
            cost = cost_of(self._section.price, record.input_tokens, record.output_tokens)
            self._dearest = max(self._dearest, cost)
            if reason:
                self._reasons[reason] += 1
        if any(record.kind is Kind.ANSWER for _, record, _ in records):
            self._errors, self._last_record = 0, now
        self._recent.append((now, 0, sum(record.input_tokens + record.output_tokens for _, record, _ in records)))

    async def forget(self, worker: str) -> None:
        """Take back what a worker held that is no more."""
        for limiter in self._limiters:
            limiter.forget(worker)
        held = self._out.pop(worker, set())
        if held:
            self._pending.appendleft(np.array(sorted(held), np.int64))

    async def progress(self) -> Progress:
        """How far the run is."""
        now = time.monotonic()
        while self._recent and self._recent[0][0] < now - RATE_SECONDS:
            self._recent.popleft()
        minutes = max(min(now - self._began, RATE_SECONDS), 1.0) / 60
        done = self._kinds.total()
        rate = done / max(now - self._began, 1e-9)
        tokens = [before + new for before, new in zip(self._before, self._tokens, strict=True)]
        spent = cost_of(self._section.price, *tokens)
        return Progress(
            done=self._kinds[Kind.ANSWER],
            failed=self._kinds[Kind.FAILURE],
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

    def _unsettled(self, worker: str) -> bool:
        """Whether other workers hold positions that may come back."""
        return any(held for name, held in self._out.items() if name != worker)

    def _expected_cost(self) -> Decimal:
        done = self._kinds.total()
        return self._worst if done < KNOWN else cost_of(self._section.price, *self._tokens) / done

    def _hand_out(self, worker: str, wanted: int) -> list[int]:
        allowed = min(wanted, self._affordable())
        if wanted and not allowed and self._pending and not any(self._out.values()):
            self._stop = "budget"
        positions: list[int] = []
        while self._pending and len(positions) < allowed:
            part = self._pending.popleft()
            taken = allowed - len(positions)
            positions += part[:taken].tolist()
            if len(part) > taken:
                self._pending.appendleft(part[taken:])
        self._out[worker].update(positions)
        return positions

    def _affordable(self) -> int:
        """How many more positions the budget bears, if each, and each that is out, costs the most that it may."""
        budget = self._section.budget
        expected = max(self._worst, self._dearest)
        if budget is None or not expected:
            return 1 << 30
        tokens = [before + new for before, new in zip(self._before, self._tokens, strict=True)]
        left = budget - cost_of(self._section.price, *tokens)
        return max(0, int(left / expected) - sum(map(len, self._out.values())))

    def _look_for_trouble(self, tidings: Tidings, now: float) -> None:
        if self._stop:
            return
        if len(self._fatal) == len(self._limiters):
            self._stop = "; ".join(
                f"{self._section.endpoints[number].base_url} answers {said}" for number, said in self._fatal.items()
            )
        if not self._kinds[Kind.ANSWER] and self._kinds[Kind.FAILURE] >= FAILURES_AT_FIRST:
            counts = ", ".join(f"{reason} {count}" for reason, count in self._reasons.most_common())
            self._stop = f"not one of the first {self._kinds[Kind.FAILURE]} requests has an answer: {counts}"
        self._errors += tidings.errors
        if tidings.errors and self._errors >= ERRORS_IN_A_ROW:
            reason, said = tidings.last_error
            never = not self._kinds[Kind.ANSWER]
            patience = 0.0 if never and reason in NOT_AN_API else self._section.circuit_breaker
            if now - self._last_record >= patience:
                self._stop = f"{self._errors} errors in a row and no answer; the last is {reason}: {said}"
                if never and reason in NOT_AN_API:
                    self._stop += " (is base_url right? It usually ends in /v1)"
