"""The access log: a JSON object a line for each request, where `serve.access_log` asks for it.

Neither keys nor texts stand in it: `caller` is the beginning of the SHA-256 of the key.
"""

import json
import logging
import time
from datetime import UTC, datetime
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any

from serve.asgi import Message, Receive, Scope, Send

DETAILS = "danlu.access"
"""Key of the ASGI scope under which the gateway leaves what it knows of a request."""

FILE_BYTES, FILES = 64 << 20, 8
"""Where a file reaches this size another is begun; so many older ones are kept, as `access.jsonl.1` and on."""


def note(scope: Scope, **details: Any) -> None:
    """Say more about a request, for its line; nothing where there is no log."""
    if DETAILS in scope:
        scope[DETAILS].update(details)


class AccessLog:
    """ASGI middleware that writes a line when a request has been answered; status 0 where its client left before."""

    def __init__(self, app: Any, file: Path) -> None:
        self._app = app
        file.parent.mkdir(parents=True, exist_ok=True)
        # a logger of its own: a disk that is full must not break answers, and logging only says so
        self._log = logging.Logger("danlu.access")
        self._log.addHandler(RotatingFileHandler(file, maxBytes=FILE_BYTES, backupCount=FILES, encoding="utf-8"))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        details: dict[str, Any] = {}
        status = 0

        async def sending(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        began = time.monotonic()
        try:
            await self._app({**scope, DETAILS: details}, receive, sending)
        except Exception:
            status = status or 500  # what the server answers for a bug
            raise
        finally:
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "client": (scope.get("client") or [""])[0],
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "seconds": round(time.monotonic() - began, 4),
                **details,
            }
            self._log.info("%s", json.dumps(line, ensure_ascii=False))
