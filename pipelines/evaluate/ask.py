"""Ask models through the openai client, a few requests in flight; every answer is kept the moment it arrives."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from openai import AsyncOpenAI, OpenAIError

from pipelines.errors import StageError
from pipelines.evaluate.evalscope.child import drop_torn_line
from pipelines.progress import progress
from pipelines.recipe.base import Generation


@dataclass(frozen=True)
class Request:
    """One question to one model at given settings; `key` names it in the file of answers."""

    key: str
    model: str
    messages: list[dict[str, str]]
    generation: Generation


@dataclass(frozen=True)
class Answer:
    """What a model answered, and why it stopped: stop, or length where it hit its token limit."""

    key: str
    model: str
    query: str
    answer: str
    finish_reason: str


@dataclass(frozen=True)
class Manner:
    """How requests are sent: where to, with which key, how many at a time, how long one may take in seconds."""

    url: str
    api_key: str
    concurrency: int
    timeout: float


def kept_answers(file: Path) -> dict[str, Answer]:
    """The answers that earlier runs left in `file`, by key; of a torn last line nothing."""
    if not file.exists():
        return {}
    drop_torn_line(file)
    rows = map(json.loads, file.read_text(encoding="utf-8").splitlines())
    return {row["key"]: Answer(**row) for row in rows}


def unanswered(requests: Sequence[Request], file: Path) -> list[Request]:
    """The requests whose answer is not in `file` yet."""
    kept = kept_answers(file)
    return [request for request in requests if request.key not in kept]


def ask(manner: Manner, requests: Sequence[Request], file: Path, title: str) -> dict[str, Answer]:
    """Ask what `file` does not answer yet and return all its answers by key.

    Three attempts each. A request that fails then stops everything with a StageError.
    """
    pending = unanswered(requests, file)
    if pending:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as sink:
            try:
                asyncio.run(_ask_all(manner, pending, len(requests), sink, title))
            except OpenAIError as error:
                message = f"{manner.url}: {error}; run again to go on with what is not answered"
                raise StageError(message) from None
    return kept_answers(file)


async def _ask_all(manner: Manner, pending: list[Request], total: int, sink: IO[str], title: str) -> None:
    gate = asyncio.Semaphore(manner.concurrency)
    client = AsyncOpenAI(base_url=manner.url, api_key=manner.api_key, timeout=manner.timeout, max_retries=2)
    with progress(title, total, "answers", done=total - len(pending)) as advance:

        async def one(request: Request) -> None:
            async with gate:
                answer = await _ask(client, request)
            sink.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
            sink.flush()
            advance(1)

        async with client:
            await asyncio.gather(*map(one, pending))


async def _ask(client: AsyncOpenAI, request: Request) -> Answer:
    given = request.generation.model_dump(exclude_none=True)
    beyond_openai = {name: given.pop(name) for name in ("top_k", "repetition_penalty") if name in given}
    messages: Any = request.messages
    completion = await client.chat.completions.create(
        model=request.model, messages=messages, extra_body=beyond_openai or None, **given
    )
    choice = completion.choices[0]
    query = request.messages[-1]["content"]
    return Answer(request.key, request.model, query, choice.message.content or "", choice.finish_reason)
