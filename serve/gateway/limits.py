"""How much callers may ask of one gateway: rates per key, requests in flight and waiting."""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipelines.recipe.serve import Limits
from serve.asgi import RequestError


class Limiter(Protocol):
    """Lets requests begin, and counts what they cost: in this process, or for several gateways together."""

    async def enter(self, caller: str) -> Any:
        """Count one request, and wait for a place in flight; returns the place. RequestError 429 where there is no
        allowance, or too many wait."""

    def leave(self, place: Any, tokens: int) -> None:
        """Give a place back, and count what its answer cost."""


class OwnLimits:
    """The limits of a gateway that stands alone; a place is its caller."""

    def __init__(self, limits: Limits) -> None:
        self.admission = Admission(limits)
        self._rates = Rates(limits)

    async def enter(self, caller: str) -> str:
        """See `Limiter`."""
        self._rates.admit(caller)
        await self.admission.enter(caller)
        return caller

    def leave(self, place: str, tokens: int) -> None:
        """See `Limiter`."""
        self.admission.leave(place)
        self._rates.spend(place, tokens)


@dataclass
class TokenBucket:
    """An allowance per minute: refilled evenly over a minute, holding one minute's worth at most."""

    per_minute: int
    left: float = field(init=False)
    at: float = field(init=False)

    def __post_init__(self) -> None:
        self.left, self.at = float(self.per_minute), time.monotonic()

    def wait(self, amount: float) -> float:
        """Seconds until `amount` is there, 0 when it is."""
        now = time.monotonic()
        self.left = min(self.per_minute, self.left + (now - self.at) * self.per_minute / 60)
        self.at = now
        return max(0.0, (amount - self.left) * 60 / self.per_minute)

    def take(self, amount: float) -> None:
        """Use up; may go below zero, for costs that are known afterwards."""
        self.left -= amount


class Rates:
    """Requests and tokens per minute of every caller."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._requests: dict[str, TokenBucket] = {}
        self._tokens: dict[str, TokenBucket] = {}

    def admit(self, caller: str) -> None:
        """Count one request; raises RequestError 429 when the caller has none left this minute."""
        if self._limits.tokens_per_minute is not None:
            bucket = _bucket(self._tokens, caller, self._limits.tokens_per_minute)
            self._refuse_after(bucket.wait(1), "tokens")
        if self._limits.requests_per_minute is not None:
            bucket = _bucket(self._requests, caller, self._limits.requests_per_minute)
            self._refuse_after(bucket.wait(1), "requests")
            bucket.take(1)

    def spend(self, caller: str, tokens: int) -> None:
        """Count the tokens of an answer; what goes beyond the limit is taken off the coming minutes."""
        if self._limits.tokens_per_minute is not None:
            self._tokens[caller].take(tokens)

    @staticmethod
    def _refuse_after(seconds: float, what: str) -> None:
        if seconds > 0:
            message = f"Rate limit reached: {what} per minute; try again in {seconds:.0f} s"
            raise RequestError(429, message, "rate_limit_exceeded", retry_after=seconds)


def _bucket(buckets: dict[str, TokenBucket], caller: str, per_minute: int) -> TokenBucket:
    found = buckets.get(caller)
    if found is None:
        found = buckets[caller] = TokenBucket(per_minute)
    return found


class Admission:
    """At most so many requests in flight, and so many of one caller; so many more wait; the rest are refused.

    A place that falls free goes to the waiting caller who has the fewest in flight, so that one caller's many requests
    do not keep out another's few.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._most_of_one = limits.max_in_flight_per_key or limits.max_in_flight
        self.in_flight = 0
        self.queued = 0
        self._of_caller: dict[str, int] = {}
        self._waiting: dict[str, deque[asyncio.Future[None]]] = {}

    async def enter(self, caller: str = "") -> None:
        """Take a place in flight, to be given back by `leave`; raises RequestError 429 when the queue is full."""
        has = self._of_caller.get(caller, 0)
        if self.in_flight < self._limits.max_in_flight and has < self._most_of_one:
            self._take(caller)
        else:
            await self._wait(caller)

    def leave(self, caller: str = "") -> None:
        """Give a place back, and on to who waits."""
        self.in_flight -= 1
        left = self._of_caller[caller] - 1
        if left:
            self._of_caller[caller] = left
        else:
            del self._of_caller[caller]
        if self._waiting:
            self._give_places()

    def _take(self, caller: str) -> None:
        self.in_flight += 1
        self._of_caller[caller] = self._of_caller.get(caller, 0) + 1

    def _give_places(self) -> None:
        while self._waiting and self.in_flight < self._limits.max_in_flight:
            caller = min(self._waiting, key=lambda one: self._of_caller.get(one, 0))
            if self._of_caller.get(caller, 0) >= self._most_of_one:
                return
            turn = self._next_of(caller)
            self._take(caller)
            turn.set_result(None)

    def _next_of(self, caller: str) -> asyncio.Future[None]:
        turns = self._waiting[caller]
        turn = turns.popleft()
        if not turns:
            del self._waiting[caller]
        return turn

    async def _wait(self, caller: str) -> None:
        if self.queued >= self._limits.max_queued:
            raise RequestError(429, "Too many requests are waiting, try again", "queue_full", retry_after=2)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(caller, deque()).append(turn)
        self.queued += 1
        try:
            await turn  # whoever ends the wait has counted the place as this caller's
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave(caller)
            else:
                self._forget(caller, turn)
            raise
        finally:
            self.queued -= 1

    def _forget(self, caller: str, turn: asyncio.Future[None]) -> None:
        turns = self._waiting[caller]
        turns.remove(turn)
        if not turns:
            del self._waiting[caller]
