"""Limits that hold for several gateways together: an actor keeps them, and every gateway asks it.

A request costs one call more, a millisecond or two. Where the keeper dies Ray starts it again with all allowances full
and nobody in flight; a gateway that dies gives its places back after `GONE_SECONDS`.
"""

import asyncio
import hashlib
import itertools
import logging
import secrets
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError

from pipelines.recipe.serve import Limits
from serve.asgi import RequestError
from serve.discovery import NAMESPACE
from serve.gateway.limits import OwnLimits

GONE_SECONDS = 5.0
"""After so long without a word from a gateway its requests count as ended."""
RETRY_SECONDS = 0.5
TRIES = 20
"""How often a keeper that does not answer is asked: Ray takes some seconds to start it again."""

logger = logging.getLogger("ray.serve")

Place = tuple[str, int]
"""A gateway's name, and the number of its request."""


class Keeper:
    """The actor: what each request of each gateway holds, and when each was last heard of."""

    def __init__(self, limits: Limits) -> None:
        self._limits = OwnLimits(limits)
        self._waiting: dict[Place, asyncio.Task[str]] = {}
        self._held: dict[Place, str] = {}
        self._heard: dict[str, float] = {}

    async def enter(self, place: Place, caller: str) -> RequestError | None:
        """Wait for a place; returns why there is none."""
        self._heard[place[0]] = time.monotonic()
        waiting = asyncio.ensure_future(self._limits.enter(caller))
        self._waiting[place] = waiting
        try:
            await waiting
        except RequestError as refused:
            return refused
        except asyncio.CancelledError:  # by `leave`: its client has gone
            return None
        finally:
            del self._waiting[place]
        self._held[place] = caller
        return None

    async def leave(self, place: Place, tokens: int) -> None:
        """Give a place back, or stop waiting for it; one from before this actor was started again is not known."""
        if place in self._waiting:
            self._waiting[place].cancel()
        elif place in self._held:
            self._limits.leave(self._held.pop(place), tokens)

    async def beat(self, gateway: str) -> None:
        """Hear of a gateway, and take back what those hold of which nothing was heard."""
        now = self._heard[gateway] = time.monotonic()
        for gone in [name for name, at in self._heard.items() if now - at > GONE_SECONDS]:
            await self.forget(gone)

    async def forget(self, gateway: str) -> int:
        """Take back what a gateway holds; returns how many others there are."""
        self._heard.pop(gateway, None)
        for place in [place for place in (*self._waiting, *self._held) if place[0] == gateway]:
            await self.leave(place, 0)
        return len(self._heard)

    async def in_flight(self) -> int:
        """Requests in flight, of all gateways."""
        return self._limits.admission.in_flight


class SharedLimits:
    """A gateway's side: a `Limiter` that asks the keeper of its application."""

    def __init__(self, app: str, limits: Limits) -> None:
        self._limits = limits
        digest = hashlib.sha256(limits.model_dump_json().encode()).hexdigest()[:8]
        self._keeper_name = f"{app}-limits-{digest}"  # others, after a change, are kept by another keeper
        self._name = secrets.token_hex(4)
        self._numbers = itertools.count()
        self._keeper: Any = None

    async def enter(self, caller: str) -> Place:
        """See `Limiter`; RequestError 503 where the keeper does not answer."""
        for _ in range(TRIES):
            place = (self._name, next(self._numbers))
            try:
                refused = await self._of_keeper().enter.remote(place, caller)
            except RayError:
                logger.exception("the keeper of limits does not answer, trying again")
                self.leave(place, 0)  # it may live, and only its answer be lost
                self._keeper = None
                await asyncio.sleep(RETRY_SECONDS)
            except asyncio.CancelledError:
                self.leave(place, 0)
                raise
            else:
                if refused is not None:
                    raise refused
                return place
        raise RequestError(503, "The limits cannot be asked at the moment, try again", "limits_unavailable", None, 2)

    def leave(self, place: Place, tokens: int) -> None:
        """See `Limiter`; a keeper that has died holds nothing any more."""
        if self._keeper is not None:
            self._keeper.leave.remote(place, tokens)

    async def beat(self) -> None:
        """Tell the keeper that this gateway lives."""
        try:
            await self._of_keeper().beat.remote(self._name)
        except RayError:
            self._keeper = None
            raise

    def close(self) -> None:
        """Give back what is held; the last gateway ends the keeper."""
        if self._keeper is None:
            return
        try:
            if ray.get(self._keeper.forget.remote(self._name), timeout=GONE_SECONDS) == 0:
                ray.kill(self._keeper)
        except RayError:
            logger.exception("the keeper of limits does not answer")

    def _of_keeper(self) -> Any:
        """The keeper, started by whoever asks first; it holds no CPU, and outlives the gateway that started it."""
        if self._keeper is None:
            most = self._limits.max_in_flight + self._limits.max_queued
            keeper = ray.remote(Keeper).options(
                name=self._keeper_name,
                namespace=NAMESPACE,
                get_if_exists=True,
                lifetime="detached",
                num_cpus=0,
                max_restarts=-1,
                max_concurrency=most + 100,
            )
            self._keeper = keeper.remote(self._limits)
        return self._keeper


def end_keepers(app: str) -> None:
    """End an application's keepers, which the last gateway does not where it, or one before it, was killed."""
    for actor in ray.util.list_named_actors(all_namespaces=True):
        if actor["namespace"] == NAMESPACE and actor["name"].startswith(f"{app}-limits-"):
            with suppress(ValueError):  # it has ended in the meantime
                ray.kill(ray.get_actor(actor["name"], namespace=NAMESPACE))
