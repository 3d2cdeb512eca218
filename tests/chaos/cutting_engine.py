"""An engine that answers anything and cuts some answers off: after their head, or in the middle of a stream.

Run by uvicorn as `tests.chaos.cutting_engine:app`; it imports little, so that one that was killed is soon replaced.
"""

import json
import random
from typing import Any

ANSWER = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
CUT = 0.02
"""The share of answers that end after their head, and of streams that end in the middle."""


async def app(scope: Any, receive: Any, send: Any) -> None:
    """The ASGI application."""
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    streamed = scope["path"] != "/health" and json.loads(body).get("stream") is True
    kind = b"text/event-stream" if streamed else b"application/json"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    if scope["path"] != "/health" and random.random() < CUT:
        await send({"type": "http.response.body", "body": b"", "more_body": True})
        raise ConnectionAbortedError("cut after the head")
    if not streamed:
        await send({"type": "http.response.body", "body": json.dumps(ANSWER).encode()})
        return
    event = b"data: " + json.dumps(ANSWER).encode() + b"\n\n"
    await send({"type": "http.response.body", "body": event, "more_body": True})
    if random.random() < CUT:
        raise ConnectionAbortedError("cut in the middle")
    await send({"type": "http.response.body", "body": event + b"data: [DONE]\n\n"})
