"""ASGI, which gateway and engines speak: its types, and answers in JSON with errors in OpenAI's form."""

import json
import math
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

Scope = Mapping[str, Any]
Message = dict[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

ERROR_TYPES = {
    401: "authentication_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
}


class RequestError(Exception):
    """A request that gets an error in OpenAI's form instead of an answer.

    `retry_after`: seconds after which trying again makes sense.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: float | None = None
    ) -> None:
        super().__init__(message)
        self._arguments = (status, message, code, param, retry_after)
        self.status = status
        kind = ERROR_TYPES.get(status, "invalid_request_error")
        error = {"message": message, "type": kind, "param": param, "code": code}
        self.body = json.dumps({"error": error}).encode()
        self.headers: Headers = []
        if retry_after is not None:
            self.headers.append((b"retry-after", str(math.ceil(retry_after)).encode()))
        if status == 401:
            self.headers.append((b"www-authenticate", b"Bearer"))

    def __reduce__(self) -> tuple[type["RequestError"], tuple[Any, ...]]:
        """For pickle, which would give the message alone."""
        return type(self), self._arguments


async def send_json(send: Send, status: int, content: dict[str, Any]) -> None:
    """Answer with a JSON object."""
    await send_body(send, status, json.dumps(content, ensure_ascii=False).encode(), [])


async def send_body(
    send: Send, status: int, body: bytes, headers: Headers, content_type: bytes = b"application/json"
) -> None:
    """Answer with a complete body."""
    fixed = [(b"content-type", content_type), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": fixed + headers})
    await send({"type": "http.response.body", "body": body})
