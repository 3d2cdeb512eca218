"""One endpoint that speaks OpenAI's HTTP: a request in, an outcome out, every way it can go wrong with a name.

It is the HTTP client that the openai library comes with, without the library around it, whose checks of types that are
right cost more than asking. Whether a request is sent again is decided where the whole cluster is seen.
"""

import asyncio
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import aiohttp
import httpx2
import openai
from pydantic import SecretStr

from pipelines.direct_http import is_loopback
from pipelines.llm.replies import estimate_tokens, read_reply, shown
from pipelines.llm.requests import Outcome, OutcomeKind
from pipelines.recipe.llm import Endpoint, ModelRequests

MAX_BYTES = 4 << 20
"""An answer above this is not read to its end."""
LAST_SECONDS = 1.0
"""Seconds at the end of a time limit that count only once this process runs again, see `_time_limit`."""

BROKEN_HTTP = (
    httpx2.HTTPError,
    aiohttp.ClientError,
    aiohttp.http_exceptions.HttpProcessingError,
    OSError,
    EOFError,
    zlib.error,
)
"""What the libraries below raise for replies that are not HTTP, or break off."""


class _TooLargeError(Exception):
    """The body is larger than `MAX_BYTES`."""


class _RedirectedError(Exception):
    """The reply sends a browser elsewhere; followed, the request would become one without its prompt."""


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
        self._max_tokens = section.generation.max_tokens
        parameters = section.generation.model_dump(exclude_none=True)
        self._body: dict[str, Any] = {"model": endpoint.model or section.model, **parameters, **endpoint.extra_body}
        if endpoint.chat_template_kwargs:
            self._body["chat_template_kwargs"] = endpoint.chat_template_kwargs
        if endpoint.reasoning_effort is not None:
            self._body["reasoning_effort"] = endpoint.reasoning_effort
        if response_format is not None:
            self._body["response_format"] = response_format
        self._url = f"{endpoint.base_url.rstrip('/')}/chat/completions"
        self._http = openai.DefaultAioHttpClient(
            headers={
                "Authorization": f"Bearer {self._key or 'EMPTY'}",
                "Accept": "application/json",
                "Accept-Encoding": "identity",  # so that the bound on bytes is one on the body
                "User-Agent": "danlu",
            },
            timeout=httpx2.Timeout(None, connect=self._timeout),  # the whole has a limit, in `send`
            limits=httpx2.Limits(max_connections=endpoint.max_in_flight * 2, max_keepalive_connections=None),
            event_hooks={"response": [_look_at_head]},
            trust_env=not is_loopback(endpoint.base_url),  # a proxy knows nothing of this machine
        )

    async def send(self, messages: list[dict[str, str]]) -> Outcome:
        """Send one request; never raises for what an endpoint may do."""
        prompt = "\n".join(turn["content"] for turn in messages)
        try:
            async with _time_limit(self._timeout):
                response = await self._http.post(self._url, json={"messages": messages, **self._body})
        except _TooLargeError:
            tokens = estimate_tokens(prompt), self._max_tokens
            said = f"an answer of more than {MAX_BYTES >> 20} MiB"
            return Outcome(OutcomeKind.FAILED, "too_large", said, *tokens, is_estimated=True)
        except _RedirectedError as error:
            return Outcome(OutcomeKind.RETRY, "redirect", shown(f"it points to {error}"))
        except httpx2.ConnectTimeout as error:  # the aiohttp transport's word for connections that are lost, too
            return Outcome(OutcomeKind.RETRY, "connection", shown(str(error)))
        except (TimeoutError, httpx2.TimeoutException):
            return Outcome(OutcomeKind.RETRY, "timeout")
        except BROKEN_HTTP as error:
            return Outcome(OutcomeKind.RETRY, "connection", shown(str(error)))
        outcome = self._read(response, response.content, prompt)
        if self._key and outcome.kind is not OutcomeKind.ANSWERED:  # some endpoints repeat the key in their errors
            masked = response.content.replace(self._key.encode(), b"***")
            return replace(outcome, text=self._read(response, masked, prompt).text)
        return outcome

    def _read(self, response: Any, body: bytes, prompt: str) -> Outcome:
        return read_reply(response.status_code, response.headers, body, prompt, self._max_tokens)

    async def close(self) -> None:
        """Close the connections."""
        await self._http.aclose()


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


async def _look_at_head(response: httpx2.Response) -> None:
    """Refuse a redirect that drops the prompt, and a body that is too large, before or while it is read."""
    if response.status_code in (301, 302, 303):
        await response.aclose()
        raise _RedirectedError(response.headers.get("location", "nowhere"))
    length = response.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > MAX_BYTES:
        await response.aclose()
        raise _TooLargeError
    is_packed = response.headers.get("content-encoding", "").lower() in ("gzip", "x-gzip", "deflate")
    if is_packed:
        del response.headers["content-encoding"]  # it is unpacked here, so that the bound is one on the whole
    response.stream = _LimitedStream(response.stream, is_packed)  # type: ignore[arg-type]


class _LimitedStream(httpx2.AsyncByteStream):
    """A body up to `MAX_BYTES`, unpacked where it is packed."""

    def __init__(self, stream: httpx2.AsyncByteStream, is_packed: bool) -> None:
        self._stream = stream
        self._unpack = zlib.decompressobj(zlib.MAX_WBITS | 32).decompress if is_packed else None

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for chunk in self._stream:
            part = self._unpack(chunk, MAX_BYTES + 1) if self._unpack else chunk
            size += len(part)
            if size > MAX_BYTES:
                raise _TooLargeError
            yield part

    async def aclose(self) -> None:
        """Close the stream below."""
        await self._stream.aclose()
