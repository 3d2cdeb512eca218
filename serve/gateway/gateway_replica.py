"""The gateway as a Ray Serve deployment that listens on its own port.

Ray Serve's HTTP proxy would copy every byte once more, through two processes; here Serve keeps the replica alive,
and clients speak to the gateway itself.
"""

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import uvicorn
import uvloop
from starlette.middleware.cors import CORSMiddleware

from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Limits
from serve import discovery
from serve.gateway.app import Gateway

ENGINE_CONNECT_SECONDS = 5.0
KEEP_ALIVE_SECONDS = 75
"""How long idle connections of clients are kept: longer than clients keep them (httpx 5 s), who then never write into
one that is being closed."""

LOOK_SECONDS = 0.1
"""How old what is known of the engines may be when one of them does not answer."""


@dataclass(frozen=True)
class GatewayPlan:
    """What the gateway serves, to whom, and where it listens; `keys` are SHA-256 digests."""

    app: str
    models: list[ServedModel]
    engine_key: str
    keys: tuple[bytes, ...]
    limits: Limits
    host: str
    port: int
    allow_origins: tuple[str, ...] = ()


class GatewayReplica:
    """Runs the gateway in a thread of its own, and keeps its list of engines and adapters up to date.

    It finds the engines through `discovery`, so that either may be deployed anew without the other.
    """

    def __init__(self, plan: GatewayPlan) -> None:
        self._plan = plan
        self._gateway = Gateway(plan.models, plan.engine_key, plan.keys, plan.limits, self._look)
        self._liveness = discovery.Liveness()
        self._looking = asyncio.Lock()
        self._looked = 0.0
        self._server = uvicorn.Server(
            uvicorn.Config(
                with_origins(self._gateway, plan.allow_origins),
                host=plan.host,
                port=plan.port,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
            )
        )
        self._thread = threading.Thread(target=uvloop.run, args=(self._serve(),), name="gateway", daemon=True)
        self._thread.start()

    async def check_health(self) -> None:
        """Called by Ray Serve, in its event loop; raises when the gateway's thread has ended."""
        if not self._thread.is_alive():
            raise RuntimeError("the gateway has ended")

    def __del__(self) -> None:
        """Called by Ray Serve when it stops the replica: answer what is in flight, then end."""
        self._gateway.stopping = True
        self._server.should_exit = True
        self._thread.join()

    async def _serve(self) -> None:
        async with engine_session() as session:
            self._gateway.session = session
            follower = asyncio.create_task(self._follow())
            server = asyncio.create_task(self._server.serve())
            await asyncio.wait((follower, server), return_when=asyncio.FIRST_COMPLETED)
            follower.cancel()
            await server

    async def _follow(self) -> None:
        while True:
            await self._look()
            await asyncio.to_thread(self._gateway.update_published)
            await asyncio.sleep(discovery.BEAT_SECONDS)

    async def _look(self) -> None:
        """Take over which engines live now; many that ask at once get one look."""
        async with self._looking:
            if time.monotonic() - self._looked < LOOK_SECONDS:
                return
            found, retired = await asyncio.to_thread(discovery.find_engines, self._plan.app)
            self._gateway.update(self._liveness.live(found), retired)
            self._looked = time.monotonic()


def engine_session() -> aiohttp.ClientSession:
    """The gateway's connections to engines: as many as there are requests, without an end to an answer's length."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0),
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=ENGINE_CONNECT_SECONDS),
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
        skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding"),
    )


def with_origins(gateway: Gateway, origins: tuple[str, ...]) -> Any:
    """The gateway with CORS headers for the allowed origins."""
    if not origins:
        return gateway
    headers = ["authorization", "content-type"]
    app: Any = gateway
    return CORSMiddleware(app, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=headers)
