"""HTTP on this machine: what every server of the tests answers with, and where it listens."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Handler(BaseHTTPRequestHandler):
    """Connections that stay open, nothing on the test's output, whole answers."""

    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Keep test output clean."""

    def send(self, status: int, data: bytes, head: Mapping[str, str] | None = None) -> None:
        """Answer with bytes; to HEAD without them."""
        self.send_response(status)
        for name, value in {**(head or {}), "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def send_json(self, status: int, body: Any) -> None:
        """Answer with a JSON document."""
        self.send(status, json.dumps(body).encode(), {"Content-Type": "application/json"})


@contextmanager
def listening(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of a server on a free port."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    http.server_close()
