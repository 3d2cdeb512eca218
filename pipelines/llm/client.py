"""One endpoint behind the openai client: a request in, an outcome out, every way it can go wrong with a name.

The client's own retries are off: whether a request is sent again is decided where the whole cluster is seen.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

import httpx2
import openai
from pydantic import SecretStr

from pipelines.llm.requests import Outcome, OutcomeKind
from pipelines.recipe.llm import Endpoint, ModelRequests

MAX_BYTES = 4 << 20
"""An answer above this is not read to its end."""
SHOWN = 300
"""Characters of an endpoint's error that a message shows."""
LAST_SECONDS = 1.0
"""Seconds at the end of a time limit that count only once this process runs again, see `_time_limit`."""

_FILTER_SIGNS = ("content_filter", "content_policy", "data_inspection_failed", "content exists risk", '"1301"')
"""What an error says where a prompt was refused for its content: OpenAI, Azure, Qwen, DeepSeek, GLM."""


class _TooLarge(Exception):
    """The body is larger than `MAX_BYTES`."""


class Client:
    """One endpoint with its key and the sampling parameters of a recipe."""

    def __init__(
        self,
        endpoint: Endpoint,
        section: ModelRequests,
        key: SecretStr | None,
        response_format: dict[str, Any] | None = None,
    ) -> None:
        self._key = key.get_secret_value() if key else ""
        self._timeout = section.timeout
        parameters = section.generation.model_dump(exclude_none=True)
        self._body: dict[str, Any] = {"model": endpoint.model or section.model, **parameters}
        if response_format is not None:
            self._body["response_format"] = response_format
        self._client = openai.AsyncOpenAI(
            base_url=endpoint.base_url,
            api_key=self._key or "EMPTY",
            max_retries=0,
            default_headers={"Accept-Encoding": "identity"},  # so that the bound on bytes is one on the body
            http_client=openai.DefaultAioHttpClient(
                timeout=httpx2.Timeout(None, connect=self._timeout),  # the whole has a limit, in `send`
                limits=httpx2.Limits(max_connections=endpoint.max_in_flight * 2, max_keepalive_connections=None),
                event_hooks={"response": [_limit_size]},
            ),
        )

    async def send(self, messages: list[dict[str, str]]) -> Outcome:
        """Send one request; never raises for what an endpoint may do."""
        try:
            async with _time_limit(self._timeout):
                # not chat.completions.create: checking types that are right takes it a third of a request's time
                response = await self._client.post(
                    "/chat/completions",
                    cast_to=httpx2.Response,
                    body={"messages": messages, **self._body},
                    options={"security": {"bearer_auth": True}},
                )
            return read_answer(response.content, response.headers.get("content-type", ""))
        except _TooLarge:
            return Outcome(OutcomeKind.FAILED, "too_large", f"an answer of more than {MAX_BYTES >> 20} MiB")
        except (TimeoutError, openai.APITimeoutError) as error:
            # the aiohttp transport also reports lost connections as timeouts
            lost = isinstance(error.__cause__, httpx2.ConnectTimeout)
            return Outcome(
                OutcomeKind.RETRY, "connection" if lost else "timeout", str(error.__cause__ or "") if lost else ""
            )
        except openai.APIConnectionError as error:
            return Outcome(OutcomeKind.RETRY, "connection", self._shown(str(error.__cause__ or error)))
        except openai.APIStatusError as error:
            return self._outcome_of_status(error.response)

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()

    def _outcome_of_status(self, response: Any) -> Outcome:
        body = response.content.decode("utf-8", "replace")
        said = self._shown(f"{response.status_code}: {body}")
        lowered = body.lower()
        status = response.status_code
        if status == 402 or (status == 429 and "insufficient_quota" in lowered):
            return Outcome(OutcomeKind.FATAL, "quota", said)
        if status in (401, 403):
            return Outcome(OutcomeKind.FATAL, "key", said)
        if status == 404:
            return Outcome(OutcomeKind.FATAL, "not_found", said)
        if status == 429 or (status == 503 and "retry-after" in response.headers):
            return Outcome(
                OutcomeKind.RATE_LIMITED, "rate_limit", said, retry_after=parse_retry_after(response.headers)
            )
        if status == 408 or status >= 500:
            return Outcome(OutcomeKind.RETRY, f"status_{status}", said)
        if any(sign in lowered for sign in _FILTER_SIGNS):
            return Outcome(OutcomeKind.FAILED, "filtered", said)
        return Outcome(OutcomeKind.FAILED, "rejected", said)

    def _shown(self, text: str) -> str:
        """An endpoint's words, short, and without the key, which some endpoints repeat."""
        return (text.replace(self._key, "***") if self._key else text)[:SHOWN]


@asynccontextmanager
async def _time_limit(seconds: float) -> AsyncIterator[None]:
    """`asyncio.timeout`, whose last part begins only once this process runs again.

    Where the process stood still for longer than the limit, an answer that has arrived meanwhile, and is paid for, is
    read in that part.
    """
    loop = asyncio.get_running_loop()
    last = min(LAST_SECONDS, seconds / 2)
    async with asyncio.timeout(None) as limit:
        begins = loop.call_later(seconds - last, lambda: limit.reschedule(loop.time() + last))
        try:
            yield
        finally:
            begins.cancel()


def read_answer(body: bytes, content_type: str) -> Outcome:
    """What a body that came with status 200 holds."""
    if "html" in content_type.lower() or body[:200].lstrip()[:1] == b"<":
        return Outcome(OutcomeKind.RETRY, "html", body[:SHOWN].decode("utf-8", "replace"))
    try:
        completion = json.loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Outcome(OutcomeKind.FAILED, "invalid_utf8", f"byte {error.start} of {len(body)} is not UTF-8")
    except ValueError:
        return Outcome(OutcomeKind.RETRY, "not_json", body[:SHOWN].decode("utf-8", "replace"))
    try:
        choice = completion["choices"][0]
        message = choice["message"]
        text = message.get("content") or ""
        usage = completion.get("usage") or {}
        tokens = int(usage.get("prompt_tokens") or 0), int(usage.get("completion_tokens") or 0)
        if not isinstance(text, str):
            raise TypeError("content is not text")
    except (KeyError, IndexError, TypeError, AttributeError, ValueError):
        return Outcome(OutcomeKind.RETRY, "not_a_completion", body[:SHOWN].decode("utf-8", "replace"))
    reason = _failure_of(choice.get("finish_reason"), message, text)
    if reason:
        return Outcome(OutcomeKind.FAILED, reason, str(message.get("refusal") or text), *tokens)
    return Outcome(OutcomeKind.ANSWERED, "", text, *tokens)


def _failure_of(finish_reason: Any, message: Mapping[str, Any], text: str) -> str:
    if finish_reason == "length":
        return "truncated"
    if finish_reason in ("content_filter", "sensitive"):
        return "filtered"
    if message.get("refusal"):
        return "refused"
    return "" if text.strip() else "empty"


def parse_retry_after(headers: Mapping[str, str]) -> float:
    """Seconds that a response asks to wait: `retry-after-ms`, `Retry-After` as seconds or as a date; 0 without."""
    try:
        if "retry-after-ms" in headers:
            return max(0.0, float(headers["retry-after-ms"]) / 1000)
        value = headers.get("retry-after", "0")
        if value.replace(".", "", 1).isdigit():
            return float(value)
        return max(0.0, parsedate_to_datetime(value).timestamp() - time())
    except ValueError:
        return 0.0


async def _limit_size(response: httpx2.Response) -> None:
    """Refuse a body that is too large, before or while it is read."""
    if int(response.headers.get("content-length", 0)) > MAX_BYTES:
        await response.aclose()
        raise _TooLarge
    response.stream = _LimitedStream(response.stream)  # type: ignore[arg-type]


class _LimitedStream(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            size += len(chunk)
            if size > MAX_BYTES:
                raise _TooLarge
            yield chunk

    async def aclose(self) -> None:
        """Close the stream below."""
        await self._stream.aclose()
