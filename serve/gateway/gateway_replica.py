"""The gateway as a Ray Serve deployment that listens on its own port.

Ray Serve's HTTP proxy would copy every byte once more, through two processes; here Serve keeps the replica alive,
and clients speak to the gateway itself.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import ray
import uvicorn
import uvloop

from pipelines.artifacts.node_copy import NodeCopy
from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Limits
from serve import discovery
from serve.auth import LOCAL
from serve.gateway.access_log import AccessLog
from serve.gateway.app import ADAPTERS, ENGINES, Gateway
from serve.gateway.origins import LocalOnly, with_origins
from serve.gateway.protocol import LimitedProtocol
from serve.gateway.shared_limits import SharedLimits

logger = logging.getLogger("ray.serve")

ENGINE_CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 75
"""How long idle connections of clients are kept: longer than clients keep them (httpx 5 s), who then never write into
one that is being closed."""

BACKLOG = 2048
"""Connections that wait to be accepted."""

END_SECONDS = 60
"""How long answers in flight may go on when the gateway is told to stop."""

BLIND_SECONDS = 60.0
"""After so long without one successful look at the engines the gateway is ill, and Ray Serve starts another."""

LOOK_SECONDS = 0.1
"""How old what is known of the engines may be when one of them does not answer."""


@dataclass(frozen=True)
class GatewayPlan:
    """What the gateway serves, to whom, and where it listens; `keys` are SHA-256 digests, `access_log` a file."""

    app: str
    models: list[ServedModel]
    engine_key: str
    keys: tuple[bytes, ...]
    limits: Limits
    host: str
    port: int
    allow_origins: tuple[str, ...] = ()
    open: bool = False
    open_metrics: bool = False
    access_log: str | None = None
    is_one_of_many: bool = False
    """Whether there is a gateway on every node, all of which keep the limits together."""
    copy: NodeCopy | None = None
    """How a node gets the registry of adapters, and an engine its model, that does not see them."""


class GatewayReplica:
    """Runs the gateway in a thread of its own, and keeps its list of engines and adapters up to date.

    It finds the engines through `discovery`, so that either may be deployed anew without the other.
    """

    def __init__(self, plan: GatewayPlan) -> None:
        self._plan = plan
        self._held = ExitStack()
        if plan.copy is not None:
            self._held.enter_context(plan.copy.here())
        self._shared = SharedLimits(plan.app, plan.limits) if plan.is_one_of_many else None
        self._gateway = Gateway(
            plan.models, plan.engine_key, plan.keys, plan.limits, self._look, plan.open_metrics, self._shared
        )
        self._liveness = discovery.Liveness()
        self._looking = asyncio.Lock()
        self._looked, self._has_looked = time.monotonic(), False
        for what in (ENGINES, ADAPTERS):
            self._gateway.looked_at(what)
        self._server = uvicorn.Server(
            uvicorn.Config(
                application(self._gateway, plan),
                http=LimitedProtocol,
                backlog=BACKLOG,
                host=plan.host,
                port=plan.port,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=END_SECONDS,
            )
        )
        self._thread = threading.Thread(target=uvloop.run, args=(self._serve(),), name="gateway", daemon=True)
        self._thread.start()

    async def check_health(self) -> None:
        """Called by Ray Serve, in its event loop; raises when the gateway's thread has ended, or sees no engines.

        A registry that cannot be read is no reason: another gateway could not read it either, and streams would break.
        """
        if not self._thread.is_alive():
            raise RuntimeError("the gateway has ended")
        blind = time.monotonic() - self._looked
        if blind > BLIND_SECONDS:
            raise RuntimeError(f"the gateway has not seen the list of engines for {blind:.0f} s")

    def __del__(self) -> None:
        """Called by Ray Serve when it stops the replica: answer what is in flight, then end."""
        self._gateway.stopping = True
        self._server.should_exit = True
        self._thread.join()
        if self._shared is not None:
            self._shared.close()
        self._held.close()

    async def _serve(self) -> None:
        async with engine_session() as session:
            self._gateway.session = session
            followers = [
                asyncio.create_task(follow("the list of engines", self._look)),
                asyncio.create_task(follow("the registry of adapters", self._read_registries)),
            ]
            if self._shared is not None:
                followers.append(asyncio.create_task(follow("the keeper of limits", self._shared.beat)))
            await self._server.serve()
            for follower in followers:
                follower.cancel()

    async def _read_registries(self) -> None:
        await asyncio.to_thread(self._gateway.published.read)
        self._gateway.looked_at(ADAPTERS)

    async def _look(self) -> None:
        """Take over which engines live now; many that ask at once get one look."""
        async with self._looking:
            if self._has_looked and time.monotonic() - self._looked < LOOK_SECONDS:
                return
            found, retired = await asyncio.to_thread(discovery.find_engines, self._plan.app)
            await self._gateway.update_asking(self._liveness.live(found), retired)
            self._looked, self._has_looked = time.monotonic(), True
            self._gateway.looked_at(ENGINES)


def engine_session() -> aiohttp.ClientSession:
    """The gateway's connections to engines: as many as there are requests, without an end to an answer's length."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=ENGINE_CONNECT_SECONDS),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
    )


async def follow(what: str, look: Callable[[], Awaitable[None]]) -> None:
    """Look again and again, for ever; a look that fails is logged, and what was seen before holds on."""
    while True:
        try:
            await look()
        except Exception:
            logger.exception("cannot read %s, trying again", what)
        await asyncio.sleep(discovery.BEAT_SECONDS)


def application(gateway: Gateway, plan: GatewayPlan) -> Any:
    """The gateway as its server is given it: with the guard of a local address, CORS and the access log."""
    app: Any = gateway
    if not plan.keys and not plan.open and plan.host in LOCAL:
        app = LocalOnly(app, plan.allow_origins)
    app = with_origins(app, plan.allow_origins)
    if plan.access_log is None:
        return app
    log = Path(plan.access_log)
    if plan.is_one_of_many:  # in a folder that all nodes share, perhaps
        log = log.with_stem(f"{log.stem}-{ray.util.get_node_ip_address()}")
    return AccessLog(app, log)
