"""Who may ask, and how much at once: API keys, rates per key, requests in flight and waiting."""

import asyncio
import hashlib
import hmac
import os
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.errors import Problem, RecipeError
from pipelines.recipe.serve import Limits, Serve
from serve.gateway.responses import Headers, RequestError

KEYS = "DANLU_API_KEYS"
"""Environment variable: API keys, separated by commas."""

KEYS_FILE = "DANLU_API_KEYS_FILE"
"""Environment variable: a file with the SHA-256 of one key per line, in hexadecimal; `#` begins a comment."""

LOCAL = ("127.0.0.1", "::1", "localhost")
"""Addresses that this machine alone reaches."""


def key_hashes(environment: Mapping[str, str]) -> tuple[bytes, ...]:
    """The SHA-256 of every API key that the environment names; none means that anyone may ask.

    Raises RecipeError for a variable that is set and yields no key: a mistake there must not open the endpoint.
    """
    found = {}
    if KEYS in environment:
        plain = [key.strip() for key in environment[KEYS].split(",") if key.strip()]
        found[KEYS] = [hashlib.sha256(key.encode()).digest() for key in plain]
    if KEYS_FILE in environment:
        found[KEYS_FILE] = _read_hashes(Path(environment[KEYS_FILE]))
    if empty := [name for name, hashes in found.items() if not hashes]:
        problems = [Problem(name, "set, but it yields no key; give one, or unset it") for name in empty]
        raise RecipeError("environment", problems)
    return tuple(digest for hashes in found.values() for digest in hashes)


def _read_hashes(file: Path) -> list[bytes]:
    try:
        text = file.read_text(errors="replace")
    except OSError as error:
        raise RecipeError("environment", [Problem(KEYS_FILE, f"{file}: {error.strerror}")]) from None
    hashes, problems = [], []
    for number, line in enumerate(text.splitlines(), 1):
        written = line.split("#")[0].strip()
        if not written:
            continue
        try:
            digest = bytes.fromhex(written)
        except ValueError:
            digest = b""
        if len(digest) == 32:
            hashes.append(digest)
        else:
            problems.append(Problem(f"line {number}", "not a SHA-256 in hexadecimal (make one with sha256sum)"))
    if problems:
        raise RecipeError(str(file), problems)
    return hashes


@dataclass
class Keys:
    """The accepted keys; only their hashes are kept."""

    hashes: tuple[bytes, ...]

    def check(self, headers: Headers) -> str:
        """The caller's identity, for rates; raises RequestError 401 without a valid key.

        Every hash is compared, each in constant time, so that the time taken says nothing about the key.
        """
        if not self.hashes:
            return ""
        given = next((value for name, value in headers if name == b"authorization"), b"")
        scheme, _, key = given.partition(b" ")
        digest = hashlib.sha256(key.strip()).digest()
        matches = [hmac.compare_digest(digest, known) for known in self.hashes]
        if scheme.lower() != b"bearer" or not any(matches):
            raise RequestError(401, "A valid API key is needed: Authorization: Bearer KEY", "invalid_api_key")
        return digest.hex()


@dataclass
class Allowance:
    """A token bucket: refilled evenly over a minute, holding one minute's worth at most."""

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
        self._requests: dict[str, Allowance] = {}
        self._tokens: dict[str, Allowance] = {}

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


def _bucket(buckets: dict[str, Allowance], caller: str, per_minute: int) -> Allowance:
    found = buckets.get(caller)
    if found is None:
        found = buckets[caller] = Allowance(per_minute)
    return found


class Admission:
    """At most so many requests in flight; so many more wait their turn, in order; the rest are refused."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.in_flight = 0
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def queued(self) -> int:
        """Requests that wait."""
        return sum(not turn.done() for turn in self._waiting)

    async def enter(self) -> None:
        """Take a place in flight, to be given back by `leave`; raises RequestError 429 when the queue is full."""
        if self.in_flight < self._limits.max_in_flight:
            self.in_flight += 1
        else:
            await self._wait()

    def leave(self) -> None:
        """Give the place to who waits longest."""
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        self.in_flight -= 1

    async def _wait(self) -> None:
        if self.queued >= self._limits.max_queued:
            raise RequestError(429, "Too many requests are waiting, try again", "queue_full", retry_after=2)
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn  # the place passes over from the request that ended: in_flight stays as it is
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.leave()
            raise


def environment_keys(section: Serve) -> tuple[bytes, ...]:
    """The key hashes of this process's own environment.

    Raises RecipeError where there are none, others reach `serve.host`, and the recipe does not say that all may ask.
    """
    keys = key_hashes(os.environ)
    if not keys and not section.open and section.host not in LOCAL:
        message = f"others reach {section.host}, and no key is set here: give {KEYS} or {KEYS_FILE}"
        raise RecipeError("serve", [Problem("serve.host", f"{message}, or say serve.open: true to answer anyone")])
    return keys
