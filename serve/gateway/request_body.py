"""Bodies of requests: read, checked against the limits, and rewritten for the engine."""

import json
import zlib
from typing import Any

from pipelines.recipe.serve import Limits
from serve.asgi import Receive, RequestError, Scope

COMPLETION_TOKENS = 16
"""Tokens of an answer to `/v1/completions` that asks for no number of them, vLLM's default and OpenAI's."""

PROMPTS = ("messages", "prompt", "input", "instructions", "tokens")
"""Fields that hold the prompt, by the path that is asked."""

PROMPT_PARTS = ("tools", "documents", "chat_template_kwargs")
"""What a chat template writes into the prompt beside the messages."""

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
RESPONSES = "/v1/responses"

LENGTHS = {
    CHAT: ("max_tokens", "max_completion_tokens"),
    COMPLETIONS: ("max_tokens", "max_completion_tokens"),
    RESPONSES: ("max_output_tokens",),
}
"""Fields that limit an answer's tokens; the first is set where a request names none."""

UNFINISHED_BYTES = 64 << 20
"""Bytes of bodies that have begun and not ended, all together."""

GZIP_WINDOW = 31
"""zlib's `wbits` for gzip alone."""


def parse(body: bytes) -> dict[str, Any]:
    """The request's JSON object; raises RequestError 400."""
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError(400, f"The body is not JSON: {error}", "invalid_json") from None
    if not isinstance(request, dict):
        raise RequestError(400, "The body is not a JSON object", "invalid_json")
    return request


def rewritten(request: dict[str, Any], name: str, counts_usage: bool) -> bytes:
    """The request's body with the engine's name for the model; `counts_usage` asks for token counts at its end."""
    request["model"] = name
    if counts_usage:
        options = request.get("stream_options") or {}
        if not options.get("include_usage"):
            options.pop("continuous_usage_stats", None)  # without include_usage it does nothing
        request["stream_options"] = {**options, "include_usage": True}
    return json.dumps(request).encode()


def is_streamed(request: dict[str, Any]) -> bool:
    """Whether a stream is asked for; RequestError 400 for what only the engine would take for a yes, such as 1."""
    for key, kind, what in (("stream", bool, "true or false"), ("stream_options", dict, "an object")):
        if request.get(key) is not None and not isinstance(request[key], kind):
            raise RequestError(400, f"{key} is {what}, not {str(request[key])[:40]}", "invalid_type", key)
    return request.get("stream") is True


def hold_to_limits(request: dict[str, Any], limits: Limits, path: str) -> bool:
    """Refuse prompts and answers that are too long with RequestError 400; returns whether the request was changed.

    The limit of tokens is shared by all answers to a request. A request that names no length gets the longest allowed,
    since the engine would go on to the model's end; one to `/v1/completions` no more than what OpenAI gives.
    """
    _refuse_long_prompts(request, limits.max_prompt_characters)
    if limits.max_tokens is None or path not in LENGTHS:
        return False
    most = limits.max_tokens // _answers(request, limits.max_tokens)
    named = {key: request[key] for key in LENGTHS[path] if request.get(key) is not None}
    for key, value in named.items():
        if type(value) is not int or value > most:
            message = f"{key} is a whole number of at most {most} here, not {str(value)[:40]}"
            raise RequestError(400, message, "max_tokens_too_large", key)
    if path == COMPLETIONS and "max_tokens" not in named:  # null too: some versions of vLLM take it for no limit
        request["max_tokens"] = min(most, COMPLETION_TOKENS)
    elif path != COMPLETIONS and not named:
        request[LENGTHS[path][0]] = most
    else:
        return False
    return True


def _answers(request: dict[str, Any], most: int) -> int:
    """How many answers are asked for: `n` to each prompt; RequestError 400 where they are more than `most`."""
    n = 1 if request.get("n") is None else request["n"]
    if type(n) is not int or not 1 <= n <= most:
        raise RequestError(400, f"n is a whole number from 1 to {most} here, not {str(n)[:40]}", "invalid_n", "n")
    prompt = request.get("prompt")
    prompts = len(prompt) if isinstance(prompt, list) and prompt and not isinstance(prompt[0], int) else 1
    if n * prompts > most:
        raise RequestError(400, f"{prompts} prompts: more than {most // n} here", "too_many_prompts", "prompt")
    return n * prompts


def _refuse_long_prompts(request: dict[str, Any], most: int | None) -> None:
    if most is None:
        return
    sizes = {key: length(request[key]) for key in PROMPTS if key in request}
    sizes |= {key: length(request[key], names=True) for key in PROMPT_PARTS if key in request}
    if sum(sizes.values()) > most:
        longest = max(sizes, key=sizes.__getitem__)
        parts = ", ".join(key for key, size in sizes.items() if size)
        raise RequestError(400, f"{parts}: longer than {most} characters in all", "prompt_too_long", longest)


def length(prompt: Any, names: bool = False) -> int:
    """Characters of all texts in a prompt or in messages; numbers, being tokens, count one each.

    `names`: the names of fields count too.
    """
    total, rest = 0, [prompt]
    while rest:
        value = rest.pop()
        if isinstance(value, str):
            total += len(value)
        elif isinstance(value, dict):
            rest += [*value.values(), *value] if names else value.values()
        elif isinstance(value, list):
            rest += value
        else:
            total += isinstance(value, int)
    return total


class UnfinishedBodies:
    """The bytes of all bodies that are being read."""

    def __init__(self, most_of_one: int) -> None:
        self._most = max(UNFINISHED_BYTES, 2 * most_of_one)
        self.held = 0

    def hold(self, size: int) -> None:
        """Count bytes, to be given back by a negative size; raises RequestError 429 when there are too many."""
        self.held += size
        if size > 0 and self.held > self._most:
            self.held -= size
            raise RequestError(429, "Too many bodies are being sent, try again", "too_many_bodies", retry_after=2)


async def read_body(scope: Scope, receive: Receive, most: int, unfinished: UnfinishedBodies) -> bytes:
    """The whole body of a request, of at most `most` bytes, unpacked where it is gzip.

    Raises RequestError 413 as soon as it is known to be longer, 415 for an encoding other than gzip.
    """
    declared = encoding = b""
    for name, value in scope["headers"]:
        if name == b"content-length":
            declared = value
        elif name == b"content-encoding":
            encoding = value.strip().lower()
    if encoding not in (b"", b"identity", b"gzip"):
        message = f"Content-Encoding {encoding.decode('latin-1')!r} is not read here; send gzip, or none"
        raise RequestError(415, message, "unsupported_encoding")
    size = int(declared) if declared.isdigit() else 0
    parts: list[bytes] = []
    received, more = 0, True
    try:
        while more and size <= most:
            message_part = await receive()
            if message_part["type"] == "http.disconnect":
                raise RequestError(400, "The connection closed before the body ended", "disconnected")
            part = message_part.get("body", b"")
            more = message_part.get("more_body", False)
            if more:
                unfinished.hold(len(part))
                received += len(part)
            parts.append(part)
            size = max(size, received + (0 if more else len(part)))
    finally:
        unfinished.hold(-received)
    if size > most:
        raise RequestError(413, f"The body is longer than {most} bytes", "body_too_large")
    body = b"".join(parts)
    return _unpacked(body, most) if encoding == b"gzip" else body


def _unpacked(body: bytes, most: int) -> bytes:
    """What a gzip body holds; RequestError 413 where that is more than `most` bytes, 400 where it is not gzip."""
    unpacker = zlib.decompressobj(GZIP_WINDOW)
    try:
        content = unpacker.decompress(body, most + 1)
    except zlib.error as error:
        raise RequestError(400, f"The body is not gzip: {error}", "invalid_gzip") from None
    if len(content) > most:
        raise RequestError(413, f"The body is longer than {most} bytes, unpacked", "body_too_large")
    if not unpacker.eof or unpacker.unused_data:
        raise RequestError(400, "The body is not one whole gzip stream", "invalid_gzip")
    return content
