"""Bodies of requests: read, checked against the limits, and rewritten for the engine."""

import json
from typing import Any

from pipelines.recipe.serve import Limits
from serve.asgi import Receive, RequestError, Scope

COMPLETION_TOKENS = 16
"""Tokens of an answer to `/v1/completions` that asks for no number of them, vLLM's default and OpenAI's."""

PROMPT_PARTS = ("tools", "documents", "chat_template_kwargs")
"""What a chat template writes into the prompt beside the messages."""


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
    if streamed:
        request["stream_options"] = {**(request.get("stream_options") or {}), "include_usage": True}
    return json.dumps(request).encode()


def is_streamed(request: dict[str, Any]) -> bool:
    """Whether a stream is asked for; RequestError 400 for what only the engine would take for a yes, such as 1."""
    for key, kind, what in (("stream", bool, "true or false"), ("stream_options", dict, "an object")):
        if request.get(key) is not None and not isinstance(request[key], kind):
            raise RequestError(400, f"{key} is {what}, not {str(request[key])[:40]}", "invalid_type", key)
    return request.get("stream") is True


def hold_to_limits(request: dict[str, Any], limits: Limits, is_chat: bool) -> bool:
    """Refuse prompts and answers that are too long with RequestError 400; returns whether the request was changed.

    The limit of tokens is shared by all answers to a request. A chat request that names no length gets the longest
    allowed, since the engine would go on to the model's end.
    """
    _refuse_long_prompts(request, limits.max_prompt_characters)
    if limits.max_tokens is None:
        return False
    most = limits.max_tokens // _answers(request, limits.max_tokens)
    named = {key: request[key] for key in ("max_tokens", "max_completion_tokens") if request.get(key) is not None}
    for key, value in named.items():
        if type(value) is not int or value > most:
            message = f"{key} is a whole number of at most {most} here, not {str(value)[:40]}"
            raise RequestError(400, message, "max_tokens_too_large", key)
    if is_chat and not named:
        request["max_tokens"] = most
    elif not is_chat and "max_tokens" not in named:  # null too: some versions of vLLM take it for no limit
        request["max_tokens"] = min(most, COMPLETION_TOKENS)
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
    sizes = {key: length(request.get(key)) for key in ("messages", "prompt")}
    sizes |= {key: length(request.get(key), names=True) for key in PROMPT_PARTS}
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
