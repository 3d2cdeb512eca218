"""The gateway as a Ray Serve deployment that listens on its own port.

Ray Serve's HTTP proxy would copy every byte once more, through two processes; here Serve keeps the replica alive,
and clients speak to the gateway itself.
"""

import asyncio
import threading
from typing import Any

import aiohttp
import uvicorn
from ray.serve.handle import DeploymentHandle

from serve import directory
from serve.gateway import Gateway
from serve.models import ServedModel


class GatewayReplica:
    """Runs the gateway in a thread of its own, and keeps its list of engines up to date."""

    def __init__(
        self, app: str, models: list[ServedModel], key: str, host: str, port: int, *engines: DeploymentHandle[Any]
    ) -> None:
        self._app = app
        self._gateway = Gateway(models, key)
        config = uvicorn.Config(
            self._gateway, host=host, port=port, log_level="warning", access_log=False, lifespan="off", backlog=2048
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=asyncio.run, args=(self._serve(),), name="gateway", daemon=True)
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
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout, auto_decompress=False) as session:
            self._gateway.session = session
            follower = asyncio.create_task(self._follow_engines())
            await self._server.serve()
            follower.cancel()

    async def _follow_engines(self) -> None:
        liveness = directory.Liveness()
        while True:
            found = await asyncio.to_thread(directory.records, self._app)
            self._gateway.update(liveness.live(found))
            await asyncio.sleep(directory.BEAT_SECONDS)
