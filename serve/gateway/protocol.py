"""HTTP/1.1 as uvicorn speaks it, with limits on what a connection may cost before and after it is understood.

uvicorn's fast parser has none of its own: neither a size of the head, nor a time in which head and body must have come,
nor one in which an answer must have been read.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from serve.asgi import RequestError

HEAD_BYTES = 64 << 10
"""Request line and headers together."""

HEAD_SECONDS = 20.0
"""From a connection's or a request's first byte to the end of its headers."""

BODY_SECONDS = 60.0
"""From the end of the headers to the end of the body."""

WRITE_SECONDS = 30.0
"""How long a client may leave unread what it was sent; then its connection is closed, and its engine stops."""

REASONS = {408: "Request Timeout", 431: "Request Header Fields Too Large"}


class LimitedProtocol(HttpToolsProtocol):
    """One connection. Timers run only while a request is unfinished: those that come whole cost none."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._in_body = False
        self._has_begun = False
        self._head_bytes = 0
        self._reading: asyncio.TimerHandle | None = None
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client is there; it must ask soon."""
        super().connection_made(transport)
        self._wait_for_head()

    def data_received(self, data: bytes) -> None:
        """Parse, and refuse a head that does not end."""
        self._has_begun = False
        super().data_received(data)
        if self._in_body and self._reading is None:
            self._reading = self.loop.call_later(BODY_SECONDS, self._body_is_late)
        if not self._in_head:
            return
        if not self._has_begun:  # else the data may hold the end of a body too, which is no part of this head
            self._head_bytes += len(data)
        if self._head_bytes > HEAD_BYTES:
            self._refuse(431, f"The headers are longer than {HEAD_BYTES} bytes", "headers_too_large")
        elif self._reading is None:
            self._wait_for_head()

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        super().on_message_begin()
        self._in_head = self._has_begun = True
        self._head_bytes = 0

    def on_headers_complete(self) -> None:
        """The head is there; the body must follow."""
        super().on_headers_complete()
        self._in_head, self._in_body = False, True
        self._stop_reading_timer()

    def on_message_complete(self) -> None:
        """The body is there."""
        super().on_message_complete()
        self._in_body = False
        self._stop_reading_timer()

    def pause_writing(self) -> None:
        """The client does not read what it is sent."""
        super().pause_writing()
        if self._writing is None:
            self._writing = self.loop.call_later(WRITE_SECONDS, self.transport.abort)

    def resume_writing(self) -> None:
        """It has read enough of it."""
        super().resume_writing()
        self._stop_writing_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is gone, and so are its timers."""
        super().connection_lost(exc)
        self._stop_reading_timer()
        self._stop_writing_timer()

    def _wait_for_head(self) -> None:
        self._stop_reading_timer()
        self._reading = self.loop.call_later(HEAD_SECONDS, self._head_is_late)

    def _head_is_late(self) -> None:
        self._reading = None
        if self.cycle is not None and not self.cycle.response_complete:  # an answer to the request before goes on
            self._wait_for_head()
        elif self._has_begun or self._head_bytes:
            self._refuse(408, f"The headers did not end within {HEAD_SECONDS:g} s", "request_timeout")
        else:
            self.transport.close()

    def _body_is_late(self) -> None:
        self._reading = None
        if self.pipeline or self.flow.read_paused:  # it is we who do not read: an answer before it goes on
            self._reading = self.loop.call_later(BODY_SECONDS, self._body_is_late)
        else:
            self._refuse(408, f"The body did not end within {BODY_SECONDS:g} s", "request_timeout")

    def _refuse(self, status: int, message: str, code: str) -> None:
        """Answer what cannot become a request, and close; where an answer has begun, only close."""
        if self.transport.is_closing():
            return
        if self.cycle is None or self.cycle.response_complete or not (self._in_head or self.cycle.response_started):
            body = RequestError(status, message, code).body
            head = f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()

    def _stop_reading_timer(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    def _stop_writing_timer(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None
