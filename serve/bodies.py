"""Bodies of requests: read, checked against the limits, and rewritten for the engine."""

import json
from typing import Any

from serve.answers import Receive, RequestError, Scope
from serve.section import Limits


def parse(body: bytes) -> dict[str, Any]:
    """The request's JSON object; raises RequestError 400."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"The body is not JSON: {error}", "invalid_json") from None
    if not isinstance(request, dict):
        raise RequestError(400, "The body is not a JSON object", "invalid_json")
    return request


def rewritten(request: dict[str, Any], name: str, streamed: bool) -> bytes:
    """The request's body with the engine's name for the model; a stream also asks for token counts at its end."""
    request["model"] = name
    options = request.get("stream_options")
    if streamed and (options is None or isinstance(options, dict)):
        request["stream_options"] = {**(options or {}), "include_usage": True}
    return json.dumps(request).encode()


def hold_to_limits(request: dict[str, Any], limits: Limits, is_chat: bool) -> bool:
    """Refuse prompts and answers that are too long with RequestError 400; returns whether the request was changed.

    A chat request that names no length gets the longest allowed, since the engine would go on to the model's end.
    """
    _refuse_long_prompts(request, limits.max_prompt_characters)
    if limits.max_tokens is None:
        return False
    named = {key: request[key] for key in ("max_tokens", "max_completion_tokens") if request.get(key) is not None}
    for key, value in named.items():
        if not isinstance(value, int) or value > limits.max_tokens:
            message = f"{key} is a whole number of at most {limits.max_tokens} here, not {str(value)[:40]}"
            raise RequestError(400, message, "max_tokens_too_large", key)
    if is_chat and not named:
        request["max_tokens"] = limits.max_tokens
        return True
    return False


def _refuse_long_prompts(request: dict[str, Any], most: int | None) -> None:
    for key in ("messages", "prompt"):
        if most is not None and length(request.get(key)) > most:
            raise RequestError(400, f"{key}: longer than {most} characters in all", "prompt_too_long", key)


def length(prompt: Any) -> int:
    """Characters of all texts in a prompt or in messages; numbers, being tokens, count one each."""
    total, rest = 0, [prompt]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            rest += value.values()
        elif isinstance(value, list):
            rest += value
        else:
            total += isinstance(value, int)
    return total


async def read_body(scope: Scope, receive: Receive, most: int) -> bytes:
    """The whole body of a request; raises RequestError 413 as soon as it is known to be longer than `most` bytes."""
    declared = next((value for name, value in scope["headers"] if name == b"content-length"), b"0")
    size = int(declared) if declared.isdigit() else 0
    parts: list[bytes] = []
    received, more = 0, True
    while more and size <= most:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RequestError(400, "The connection closed before the body ended", "disconnected")
        parts.append(message.get("body", b""))
        received += len(parts[-1])
        size, more = max(size, received), message.get("more_body", False)
    if size > most:
        raise RequestError(413, f"The body is longer than {most} bytes", "body_too_large")
    return b"".join(parts)
