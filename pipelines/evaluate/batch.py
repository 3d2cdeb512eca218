"""Answers without an endpoint: engines in the cluster answer for all models in one job, a file keeps what is answered.

Each engine is asked everything that its model and the model's adapters are asked, one engine after the other.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.artifacts.workspace import Place
from pipelines.errors import StageError
from pipelines.evaluate.ask import Answer, Request, kept_answers, unanswered
from pipelines.evaluate.endpoint import BASE, served_models
from pipelines.evaluate.evalscope.child import Job
from pipelines.evaluate.evalscope.datasets import Dataset
from pipelines.evaluate.evalscope.parent import list_prompts
from pipelines.llm.vllm_batch import Completion, Prompt, complete
from pipelines.progress import progress
from pipelines.recipe.base import Generation
from pipelines.recipe.schema import Recipe


def answer_jobs(recipe: Recipe, place: Place, jobs: list[Job], datasets: list[Dataset]) -> Path:
    """The file that holds the answer to every question of `jobs`; only what is missing there is computed.

    StageError where evalscope cannot read a data set, an engine dies, or a question is refused.
    """
    assert recipe.evaluate
    list_prompts(place, [job for job in jobs if job.model == BASE], datasets)
    generation = recipe.evaluate.generation
    requests = {request.key: request for job in jobs for request in _requests(job, generation)}
    file = place.local("answers-by-engine.jsonl")
    answer_offline(recipe, place, list(requests.values()), file)
    return file


def _requests(job: Job, generation: Generation) -> Iterator[Request]:
    with open(job.prompts, encoding="utf-8") as lines:
        for messages in map(json.loads, lines):
            yield Request(key_of(job.model, messages), job.model, messages, generation)


def key_of(model: str, messages: list[dict[str, str]]) -> str:
    """The name of a question to a model in a file of answers; the same question twice has one answer."""
    asked = [model, *([message["role"], message["content"]] for message in messages)]
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()


def answer_offline(recipe: Recipe, place: Place, requests: Sequence[Request], file: Path) -> dict[str, Answer]:
    """Answer what `file` does not answer yet and return all its answers by key, as `asking.ask` does over HTTP.

    Answers are filed block by block. StageError where an engine dies or refuses a question; the others are kept.
    """
    pending = unanswered(requests, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    refused: list[str] = []
    with (
        open(file, "a", encoding="utf-8") as sink,
        progress("answers", len(requests), "answers", done=len(requests) - len(pending)) as advance,
    ):
        for model in served_models(recipe, place) if pending else ():
            own = [request for request in pending if request.model in (model.name, *model.adapters)]
            for completions in complete(recipe.serve, model, _rows(own, model.name), prompt_of):
                refused += [f"{own[c.pos].messages[-1]['content']}: {c.error}" for c in completions if c.error]
                sink.writelines(_line(own[c.pos], c) for c in completions if not c.error)
                sink.flush()
                advance(len(completions))
    if refused:
        raise StageError(f"{len(refused)} questions were refused, the first: {refused[0]}")
    return kept_answers(file)


def _rows(requests: list[Request], base: str) -> pa.Table:
    """The requests as `prompt_of` takes them."""
    return pa.table(
        {
            "pos": pa.array(range(len(requests)), pa.int64()),
            "messages": pa.array([json.dumps(request.messages) for request in requests], pa.string()),
            "sampling": pa.array([r.generation.model_dump_json(exclude_none=True) for r in requests], pa.string()),
            "adapter": pa.array([r.model if r.model != base else None for r in requests], pa.string()),
        }
    )


def prompt_of(row: dict[str, Any]) -> Prompt:
    """The prompt of a row that `answer_offline` made."""
    return Prompt(json.loads(row["messages"]), json.loads(row["sampling"]), row["adapter"])


def _line(request: Request, completion: Completion) -> str:
    reason = "length" if completion.is_cut else "stop"
    answer = Answer(request.key, request.model, request.messages[-1]["content"], completion.text, reason)
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"
