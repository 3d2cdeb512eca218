"""The gateway as a Ray Serve deployment that listens on its own port.

Ray Serve's HTTP proxy would copy every byte once more, through two processes; here Serve keeps the replica alive,
and clients speak to the gateway itself.
"""

import asyncio
import threading
from dataclasses import dataclass
from typing import Any

import aiohttp
import uvicorn
import uvloop
from ray.serve.handle import DeploymentHandle

from serve import directory
from serve.gateway import Gateway
from serve.guard import Limits
from serve.models import ServedModel

ENGINE_CONNECT_SECONDS = 5.0


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


class GatewayReplica:
    """Runs the gateway in a thread of its own, and keeps its list of engines and adapters up to date.

    The handles make the engines part of the same application; the gateway finds them through the directory.
    """

    def __init__(self, plan: GatewayPlan, *engines: DeploymentHandle[Any]) -> None:
        self._plan = plan
        self._gateway = Gateway(plan.models, plan.engine_key, plan.keys, plan.limits)
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._gateway,
                host=plan.host,
                port=plan.port,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
            )
        )
        self._thread = threading.Thread(target=uvloop.run, args=(self._serve(),), name="gateway", daemon=True)
        self._thread.start()

    def check_health(self) -> None:
        """Called by Ray Serve; raises when the gateway's thread has ended."""
        if not self._thread.is_alive():
            raise RuntimeError("the gateway has ended")

    def __del__(self) -> None:
        """Called by Ray Serve when it stops the replica: answer what is in flight, then end."""
        self._server.should_exit = True
        self._thread.join()

    async def _serve(self) -> None:
        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=ENGINE_CONNECT_SECONDS)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
            self._gateway.session = session
            follower = asyncio.create_task(self._follow())
            server = asyncio.create_task(self._server.serve())
            await asyncio.wait((follower, server), return_when=asyncio.FIRST_COMPLETED)
            follower.cancel()
            await server

    async def _follow(self) -> None:
        liveness = directory.Liveness()
        while True:
            found = await asyncio.to_thread(directory.records, self._plan.app)
            self._gateway.update(liveness.live(found))
            await asyncio.to_thread(self._gateway.update_published)
            await asyncio.sleep(directory.BEAT_SECONDS)
