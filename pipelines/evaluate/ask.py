"""Ask models through the openai client, a few requests in flight; every answer is kept the moment it arrives."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any

from pipelines.direct_http import is_loopback
from pipelines.errors import StageError
from pipelines.evaluate.answers import EvaluationAnswer, EvaluationRequest, kept_answers, unanswered
from pipelines.llm.reasoning import split_reasoning
from pipelines.progress import progress


@dataclass(frozen=True)
class RequestOptions:
    """How requests are sent: where to, with which key, how many at a time, how long one may take in seconds."""

    url: str
    api_key: str
    concurrency: int
    timeout: float
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the models' chat template is given; sent, since an endpoint that is named may have another default."""


def ask_endpoint(
    options: RequestOptions, requests: Sequence[EvaluationRequest], file: Path, title: str
) -> dict[str, EvaluationAnswer]:
    """Ask what `file` does not answer yet and return all its answers by key.

    Three attempts each. A request that fails then stops everything with a StageError.
    """
    from openai import OpenAIError  # an extra that cleaning does without

    pending = unanswered(requests, file)
    if pending:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a", encoding="utf-8") as sink:
            try:
                asyncio.run(_ask_all(options, pending, len(requests), sink, title))
            except OpenAIError as error:
                message = f"{options.url}: {error}; run again to go on with what is not answered"
                raise StageError(message) from None
    return kept_answers(file)


async def _ask_all(
    options: RequestOptions, pending: list[EvaluationRequest], total: int, sink: IO[str], title: str
) -> None:
    from openai import AsyncOpenAI, DefaultAsyncHttpxClient

    gate = asyncio.Semaphore(options.concurrency)
    client = AsyncOpenAI(
        base_url=options.url,
        api_key=options.api_key,
        timeout=options.timeout,
        max_retries=2,
        http_client=DefaultAsyncHttpxClient(trust_env=not is_loopback(options.url)),
    )
    with progress(title, total, "answers", done=total - len(pending)) as advance:

        async def one(request: EvaluationRequest) -> None:
            async with gate:
                answer = await _ask(client, request, options)
            sink.write(json.dumps(asdict(answer), ensure_ascii=False) + "\n")
            sink.flush()
            advance(1)

        async with client:
            await asyncio.gather(*map(one, pending))


async def _ask(client: Any, request: EvaluationRequest, options: RequestOptions) -> EvaluationAnswer:
    given = request.generation.model_dump(exclude_none=True)
    beyond_openai: dict[str, Any] = {name: given.pop(name) for name in ("top_k", "repetition_penalty") if name in given}
    if options.chat_template_kwargs:
        beyond_openai["chat_template_kwargs"] = options.chat_template_kwargs
    completion = await client.chat.completions.create(
        model=request.model, messages=request.messages, extra_body=beyond_openai or None, **given
    )
    choice = completion.choices[0]
    query = request.messages[-1]["content"]
    told = getattr(choice.message, "reasoning", None) or getattr(choice.message, "reasoning_content", None)
    written, answer = split_reasoning(choice.message.content or "")
    reasoning = told or written
    return EvaluationAnswer(request.key, request.model, query, answer, choice.finish_reason, reasoning)
