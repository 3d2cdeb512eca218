"""The engine's key, asked for on every path of vLLM's server.

vLLM's own check guards a few prefixes such as `/v1`; `/invocations` and others give the same answers without a key.
"""

import hashlib
import os
from typing import Any

from serve.asgi import Receive, RequestError, Scope, Send, send_body
from serve.auth import ApiKeys

KEY = "VLLM_API_KEY"
"""Environment variable of an engine's process: the key that its gateway asks with."""

OPEN_PATHS = ("/health", "/metrics")
"""What the health checks, the autoscaler and Prometheus read without a key; no text of a request is in it."""


class RequireKey:
    """ASGI middleware, given to vLLM by its dotted path: 401 for who has not the key, on all paths but `OPEN_PATHS`."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._keys = ApiKeys((hashlib.sha256(os.environ[KEY].encode()).digest(),))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application; a websocket without the key is closed before it is accepted."""
        if scope["type"] in ("http", "websocket") and scope["path"] not in OPEN_PATHS:
            try:
                self._keys.check(scope["headers"])
            except RequestError as error:
                if scope["type"] == "websocket":
                    await send({"type": "websocket.close", "code": 1008})
                else:
                    await send_body(send, error.status, error.body, error.headers)
                return
        await self._app(scope, receive, send)
