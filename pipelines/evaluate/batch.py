"""Answers without an endpoint: engines in the cluster answer for all models in one job, a file keeps what is answered.

Each engine is asked everything that its model and the model's adapters are asked, one engine after the other.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines.artifacts.workspace import Place
from pipelines.errors import StageError
from pipelines.evaluate.answers import EvaluationAnswer, EvaluationRequest, kept_answers, key_of, unanswered
from pipelines.evaluate.evalscope.datasets import Dataset
from pipelines.evaluate.evalscope.job import ScoringJob
from pipelines.evaluate.evalscope.parent import list_prompts
from pipelines.llm.reasoning import split_reasoning
from pipelines.llm.vllm_batch import Completion, Prompt, complete
from pipelines.models.served import BASE, ServedModel
from pipelines.progress import progress
from pipelines.recipe.base import Generation
from pipelines.recipe.serve import Serve


def answer_jobs(
    serve: Serve,
    models: list[ServedModel],
    generation: Generation,
    place: Place,
    jobs: list[ScoringJob],
    datasets: list[Dataset],
) -> Path:
    """The file that holds the answer to every question of `jobs`; only what is missing there is computed.

    StageError where evalscope cannot read a data set, an engine dies, or a question is refused.
    """
    list_prompts(place, [job for job in jobs if job.model == BASE], datasets)
    requests = {request.key: request for job in jobs for request in _requests(job, generation)}
    file = place.local("answers-by-engine.jsonl")
    answer_in_batch(serve, models, list(requests.values()), file)
    return file


def _requests(job: ScoringJob, generation: Generation) -> Iterator[EvaluationRequest]:
    with open(job.prompts, encoding="utf-8") as lines:
        for messages in map(json.loads, lines):
            yield EvaluationRequest(key_of(job.model, messages), job.model, messages, generation)


def answer_in_batch(
    serve: Serve, models: list[ServedModel], requests: Sequence[EvaluationRequest], file: Path
) -> dict[str, EvaluationAnswer]:
    """Answer what `file` does not answer yet and return all its answers by key, as `ask_endpoint` does over HTTP.

    Answers are filed block by block. StageError where an engine dies or refuses a question; the others are kept.
    """
    pending = unanswered(requests, file)
    file.parent.mkdir(parents=True, exist_ok=True)
    refused: list[str] = []
    with (
        open(file, "a", encoding="utf-8") as sink,
        progress("answers", len(requests), "answers", done=len(requests) - len(pending)) as advance,
    ):
        for model in models if pending else ():
            own = [request for request in pending if request.model in (model.name, *model.adapters)]
            for completions in complete(serve, model, _rows(own, model.name), prompt_of):
                refused += [f"{own[c.pos].messages[-1]['content']}: {c.error}" for c in completions if c.error]
                sink.writelines(_line(own[c.pos], c) for c in completions if not c.error)
                sink.flush()
                advance(len(completions))
    if refused:
        raise StageError(f"{len(refused)} questions were refused, the first: {refused[0]}")
    return kept_answers(file)


def _rows(requests: list[EvaluationRequest], base: str) -> pa.Table:
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
    """The prompt of a row that `answer_in_batch` made."""
    return Prompt(json.loads(row["messages"]), json.loads(row["sampling"]), row["adapter"])


def _line(request: EvaluationRequest, completion: Completion) -> str:
    reason = "length" if completion.is_cut else "stop"
    thought, said = split_reasoning(completion.text)
    answer = EvaluationAnswer(request.key, request.model, request.messages[-1]["content"], said, reason, thought)
    return json.dumps(asdict(answer), ensure_ascii=False) + "\n"
