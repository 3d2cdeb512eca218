"""Which pages in browsers may ask: allowed origins, and a gateway of this machine alone that has no keys.

A page of any site can send requests to 127.0.0.1, and by DNS rebinding (its own name pointed at 127.0.0.1) read the
answers. A browser tells such a page by `Host` and `Origin`.
"""

from typing import Any
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware

from serve.asgi import Receive, RequestError, Scope, Send, send_body
from serve.auth import LOCAL


class LocalOnly:
    """ASGI middleware: 403 for requests to a name that is not this machine's, and for those of other sites' pages."""

    def __init__(self, app: Any, origins: tuple[str, ...]) -> None:
        self._app = app
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] == "http" and (refused := self._refused(scope)):
            await send_body(send, refused.status, refused.body, refused.headers)
            return
        await self._app(scope, receive, send)

    def _refused(self, scope: Scope) -> RequestError | None:
        host, origin = b"", None
        for name, value in scope["headers"]:
            if name == b"host":
                host = value
            elif name == b"origin":
                origin = value.decode("latin-1")
        asked = host.decode("latin-1")
        if asked and hostname(asked) not in LOCAL:
            message = f"Host {asked!r} is not this machine's; set API keys, or serve.open, to be asked by another name"
            return RequestError(403, message, "host_not_allowed")
        same = origin is None or origin.partition("://")[2] == asked
        if not same and origin not in self._origins and "*" not in self._origins:
            message = f"Pages of {origin!r} may not ask; allow them with serve.allow_origins"
            return RequestError(403, message, "origin_not_allowed")
        return None


def hostname(host: str) -> str:
    """The name in a `Host` header, without port and brackets; empty where it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def with_origins(app: Any, origins: tuple[str, ...]) -> Any:
    """An application with CORS headers for the allowed origins.

    Their pages may send any header: OpenAI's client adds a dozen of its own (`x-stainless-…`), and keys protect what is
    asked, not names of headers.
    """
    if not origins:
        return app
    return CORSMiddleware(
        app,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],
        allow_private_network=True,
        expose_headers=["x-request-id", "retry-after"],
    )
