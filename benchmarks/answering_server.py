"""A chat endpoint that answers after a fixed time as a function of the prompt, and misbehaves as it is told.

    python -m benchmarks.answering_server [--host 127.0.0.1] [--port 0] [--delay 1.0]
        [--faults '{"429": 0.05, "drop": 0.01}']

It prints `listening PORT`. `GET /log` returns what it saw: [arrival time, digest of the prompt, outcome] per request.
"""

import argparse
import asyncio
import hashlib
import json
import random
import time
from dataclasses import dataclass, field
from typing import Any

FAULTS = ("429", "500", "drop", "hang")


@dataclass
class Behaviour:
    """How the server answers: seconds before an answer, share of each fault, and a fixed body instead of an answer."""

    delay: float = 1.0
    faults: dict[str, float] = field(default_factory=dict)
    retry_after: float = 1.0
    status: int = 200
    body: bytes | None = None
    content_type: bytes = b"application/json"
    finish_reason: str = "stop"
    key: str | None = None
    requests_per_second: float | None = None
    log: list[tuple[float, str, str]] = field(default_factory=list)
    generator: random.Random = field(default_factory=lambda: random.Random(7))
    in_flight: int = 0
    most_in_flight: int = 0


def answer_to(messages: list[dict[str, str]]) -> str:
    """The answer to a prompt: a wish that names the digest of the prompt."""
    digest = hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()
    return f"愿你平安喜乐，{digest[:12]}！"


class Connection(asyncio.Protocol):
    """One HTTP/1.1 connection; requests with Content-Length, one after another."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.buffer = bytearray()
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport that answers go to."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        """Take in bytes and handle the requests that are complete."""
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = bytes(self.buffer[:end]).lower()
            at = head.find(b"\r\ncontent-length:")
            length = int(head[at + 17 :].split(b"\r\n", 1)[0]) if at >= 0 else 0
            if len(self.buffer) < end + 4 + length:
                return
            body = bytes(self.buffer[end + 4 : end + 4 + length])
            del self.buffer[: end + 4 + length]
            self._handle(head, body)

    def _handle(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"get /log"):
            behaviour = self.behaviour
            seen = {"requests": behaviour.log, "most_in_flight": behaviour.most_in_flight}
            self._send(200, json.dumps(seen).encode())
            return
        behaviour = self.behaviour
        request = json.loads(body)
        digest = hashlib.sha256(json.dumps(request["messages"], sort_keys=True).encode()).hexdigest()[:16]
        outcome = self._outcome(head)
        behaviour.log.append((time.time(), digest, outcome))
        behaviour.in_flight += 1
        behaviour.most_in_flight = max(behaviour.most_in_flight, behaviour.in_flight)
        asyncio.get_running_loop().call_later(
            0.0 if outcome in ("429", "key") else behaviour.delay, self._finish, outcome, request
        )

    def _outcome(self, head: bytes) -> str:
        behaviour = self.behaviour
        if behaviour.key is not None and f"authorization: bearer {behaviour.key}".encode().lower() not in head:
            return "key"
        if behaviour.requests_per_second is not None:
            recent = sum(1 for at, _, outcome in behaviour.log[-2000:] if outcome != "429" and at > time.time() - 1)
            if recent >= behaviour.requests_per_second:
                return "429"
        draw = behaviour.generator.random()
        for fault in FAULTS:
            share = behaviour.faults.get(fault, 0.0)
            if draw < share:
                return fault
            draw -= share
        return "ok"

    def _finish(self, outcome: str, request: dict[str, Any]) -> None:
        behaviour = self.behaviour
        behaviour.in_flight -= 1
        assert self.transport
        if outcome == "hang":
            return
        if outcome == "drop":
            self.transport.abort()
        elif outcome == "429":
            self._send(429, b'{"error":{"message":"slow down","code":"rate_limit"}}', behaviour.retry_after)
        elif outcome == "500":
            self._send(500, b'{"error":{"message":"injected"}}')
        elif outcome == "key":
            self._send(401, b'{"error":{"message":"invalid key"}}')
        elif behaviour.body is not None:
            self._send(behaviour.status, behaviour.body)
        else:
            self._send(behaviour.status, json.dumps(self._completion(request), ensure_ascii=False).encode())

    def _completion(self, request: dict[str, Any]) -> dict[str, Any]:
        content = answer_to(request["messages"])
        prompt_tokens = sum(len(message["content"]) for message in request["messages"])
        return {
            "id": "x",
            "object": "chat.completion",
            "created": 0,
            "model": request["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": self.behaviour.finish_reason,
                    "message": {"role": "assistant", "content": content},
                }
            ],
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": len(content),
                "total_tokens": prompt_tokens + len(content),
            },
        }

    def _send(self, status: int, body: bytes, retry_after: float | None = None) -> None:
        assert self.transport
        wait = f"Retry-After: {retry_after:g}\r\n" if retry_after is not None else ""
        head = f"HTTP/1.1 {status} X\r\nContent-Type: {self.behaviour.content_type.decode()}\r\n{wait}"
        if not self.transport.is_closing():
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


async def listen(behaviour: Behaviour, host: str = "127.0.0.1", port: int = 0) -> asyncio.Server:
    """Start serving on an address, which is that of this machine alone unless another is given."""
    return await asyncio.get_running_loop().create_server(lambda: Connection(behaviour), host, port, backlog=4096)


async def _serve(behaviour: Behaviour, host: str, port: int) -> None:
    server = await listen(behaviour, host, port)
    print(f"listening {server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


def main() -> None:
    """Serve until stopped."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--delay", type=float, default=1.0)
    parser.add_argument("--faults", type=json.loads, default={})
    options = parser.parse_args()
    asyncio.run(_serve(Behaviour(delay=options.delay, faults=options.faults), options.host, options.port))


if __name__ == "__main__":
    main()
