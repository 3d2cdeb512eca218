"""The rate limiter: how many requests an endpoint is sent, over the whole cluster.

Workers ask for a lease a few times a second: so many requests may be started until it ends, and so many may be in
flight. Rates are paced evenly and never exceeded over any sliding minute. The number in flight follows what the
endpoint bears: it doubles until it is refused, shrinks with the share of refusals, as in DCTCP (RFC 8257), climbs
half-way back to where it was refused in each round of answers, as in BIC (Xu et al. 2004), then grows by one a round.

A real limit shows as a large share: an answered request keeps its place for as long as its answer takes, a refused
one frees it at once for the next, so that the few places above the limit soon cause most of the tries. A share below
`STRAY_SHARE` is none: only the requests that were refused wait.
"""

import math
from collections import deque
from dataclasses import dataclass, field

from pipelines.recipe.llm import Endpoint

LEASE_SECONDS = 0.5
"""How long a lease lasts; a worker renews it earlier."""
WINDOW = 60.0 + LEASE_SECONDS
"""Starts are counted over a minute and the time by which they may be later than their lease."""
MEMORY = 20
"""Tries over which the share of refusals is taken, or a round of them where that is more."""
STRAY_SHARE = 0.15
"""Share of refusals that an endpoint may have whatever it is sent."""
PAUSE_SHARE = 0.5
"""Share of refusals from which the whole endpoint waits for Retry-After, not only the requests that were refused."""
SMOOTHING = 0.05
"""Weight of one new answer in the running mean of tokens."""


@dataclass(frozen=True)
class Usage:
    """What a worker did at one endpoint since its last lease, and what it wants next.

    `unused` counts the starts of the last lease that it gave up. `refusals` holds, for each 429, how many seconds ago
    its request was sent. `pause` is the longest Retry-After in seconds. Tokens are those of the finished requests.
    """

    in_flight: int = 0
    waiting: int = 0
    unused: int = 0
    answered: int = 0
    finished: int = 0
    refusals: tuple[float, ...] = ()
    pause: float = 0.0
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class Lease:
    """What a worker may do until the lease ends: `starts` is None where no rate is limited."""

    starts: int | None
    max_in_flight: int


@dataclass
class Bucket:
    """A token bucket: refills at `per_minute`, holds half a second's worth, or `largest` where that is more."""

    per_minute: float
    level: float = 0.0
    at: float | None = None

    def available(self, now: float, largest: float) -> float:
        """What may be taken at `now`."""
        rate = self.per_minute / 60
        capacity = max(rate * LEASE_SECONDS, largest)
        self.level = capacity if self.at is None else min(capacity, self.level + rate * (now - self.at))
        self.at = now
        return self.level


@dataclass
class _Grant:
    at: float = -math.inf
    starts: int = 0


@dataclass
class _Worker:
    allotted: int = 0
    in_flight: int = 0
    waiting: int = 0
    grant: _Grant = field(default_factory=_Grant)

    @property
    def held(self) -> int:
        return max(self.allotted, self.in_flight)

    @property
    def demand(self) -> int:
        return self.in_flight + self.waiting


@dataclass
class _Tokens:
    """One kind of token: its bucket, and the running mean that a request is charged before its answer is known."""

    bucket: Bucket
    mean: float

    def charge(self, requests: int) -> None:
        self.bucket.level -= requests * self.mean

    def correct(self, requests: int, tokens: int) -> None:
        """Replace what `requests` were charged by what they took."""
        self.bucket.level += requests * self.mean - tokens
        for _ in range(min(requests, 100)):
            self.mean += SMOOTHING * (tokens / requests - self.mean)


class RateLimiter:
    """The limits of one endpoint. `now`, in seconds, is any clock that does not go backwards."""

    def __init__(self, endpoint: Endpoint, expected_input: float, expected_output: float) -> None:
        self._max_in_flight = endpoint.max_in_flight
        self.window = float(min(endpoint.initial_in_flight or self._max_in_flight, self._max_in_flight))
        self._known_good = math.inf
        self.paused_until = -math.inf
        self._decreased_at = -math.inf
        self._refusals = self._tries = 0.0
        self._workers: dict[str, _Worker] = {}
        limits = endpoint.requests_per_minute
        self._requests = Bucket(limits) if limits else None
        self._tokens = [
            _Tokens(Bucket(per_minute), expected)
            for per_minute, expected in (
                (endpoint.input_tokens_per_minute, expected_input),
                (endpoint.output_tokens_per_minute, expected_output),
            )
            if per_minute
        ]
        self._tokens_of = [bool(endpoint.input_tokens_per_minute), bool(endpoint.output_tokens_per_minute)]
        self._granted: deque[_Grant] = deque()
        self._in_window = 0

    @property
    def in_flight(self) -> int:
        """Requests in flight, as the workers last said."""
        return sum(worker.in_flight for worker in self._workers.values())

    def lease(self, name: str, usage: Usage, now: float) -> Lease:
        """Take in what a worker did and grant it its next lease."""
        worker = self._workers.setdefault(name, _Worker())
        worker.in_flight, worker.waiting = usage.in_flight, usage.waiting
        self._give_back(worker, usage.unused)
        self._correct_tokens(usage)
        self._adapt(usage, now)
        worker.allotted = 0
        if now < self.paused_until:
            return Lease(0, 0)
        worker.allotted = self._allot(worker)
        return Lease(self._grant(worker, now), worker.allotted)

    def release(self, name: str) -> None:
        """Free what a worker held that died."""
        self._workers.pop(name, None)

    def _correct_tokens(self, usage: Usage) -> None:
        counts = (usage.input_tokens, usage.output_tokens)
        used = [count for count, limited in zip(counts, self._tokens_of, strict=True) if limited]
        for tokens, count in zip(self._tokens, used, strict=True):
            if usage.finished:
                tokens.correct(usage.finished, count)

    def _adapt(self, usage: Usage, now: float) -> None:
        """Shrink with the share of refusals, once for all that was sent before the last time, or grow with answers."""
        tries = len(usage.refusals) + usage.finished
        fade = (1 - 1 / max(MEMORY, self.window)) ** tries
        self._refusals = self._refusals * fade + len(usage.refusals)
        self._tries = self._tries * fade + tries
        share = self._refusals / self._tries if usage.refusals else 0.0
        if share >= PAUSE_SHARE:
            self.paused_until = max(self.paused_until, now + usage.pause)
        if share > STRAY_SHARE:
            if any(now - age > self._decreased_at for age in usage.refusals):
                self._known_good = self.window
                self.window = max(1.0, self.window * (1 - share / 2))
                self._decreased_at = now
        else:
            rounds = usage.answered / self.window
            step = self.window if self._known_good == math.inf else max(1.0, (self._known_good - self.window) / 2)
            self.window = min(float(self._max_in_flight), self.window + rounds * step)

    def _allot(self, worker: _Worker) -> int:
        """Its fair share of the window, as far as the others hold less than theirs."""
        others = [other for other in self._workers.values() if other is not worker]
        room = int(self.window) - sum(other.held for other in others)
        demands = sorted([worker.demand, *(other.demand for other in others)])
        left, share = int(self.window), 0
        for number, demand in enumerate(demands):
            share = max(1, math.ceil(left / (len(demands) - number)))
            left -= min(demand, share)
        return max(0, min(worker.demand, share, room))

    def _grant(self, worker: _Worker, now: float) -> int | None:
        if self._requests is None and not self._tokens:
            return None
        while self._granted and self._granted[0].at <= now - WINDOW:
            self._in_window -= self._granted.popleft().starts
        allowed = [float(worker.waiting)]
        if self._requests is not None:
            allowed += [self._requests.available(now, 1.0), self._requests.per_minute - self._in_window]
        allowed += [tokens.bucket.available(now, tokens.mean) / max(tokens.mean, 1.0) for tokens in self._tokens]
        starts = max(0, math.floor(min(allowed) + 1e-9))
        worker.grant = _Grant(now, starts)
        self._take(worker.grant)
        return starts

    def _take(self, grant: _Grant) -> None:
        if self._requests is not None:
            self._requests.level -= grant.starts
        for tokens in self._tokens:
            tokens.charge(grant.starts)
        self._granted.append(grant)
        self._in_window += grant.starts

    def _give_back(self, worker: _Worker, unused: int) -> None:
        if self._requests is not None:
            self._requests.level += unused
        for tokens in self._tokens:
            tokens.charge(-unused)
        worker.grant.starts -= unused
        self._in_window -= unused
