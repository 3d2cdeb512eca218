"""Compare: the same questions to every model at the same settings, side by side."""

import asyncio
import hashlib
import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from openai import AsyncOpenAI, OpenAIError

from pipelines.errors import StageError
from pipelines.evaluate.endpoint import api_key, model_names, models_endpoint
from pipelines.evaluate.questions import Question, held_out_questions, probe_questions
from pipelines.evaluate.scoring import drop_torn_line
from pipelines.progress import progress
from pipelines.recipe import Compare, Recipe
from pipelines.section import Generation
from pipelines.workspace import Place

VERSION = 1

Answers = dict[tuple[str, str], str]
"""Answers by model and row id."""


@dataclass(frozen=True)
class Pending:
    """One question that one model has not answered yet."""

    model: str
    question: Question


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section, and what the answers further follow from; not what only changes speed."""
    assert recipe.compare and recipe.train
    return {
        "section": recipe.compare.model_dump(exclude={"concurrency", "timeout"}),
        "system": recipe.train.system,
        "engine": recipe.serve.engine.model_dump(include={"dtype", "max_model_len"}),
        "models": model_names(recipe),
    }


def compare(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Ask every model the probes and the first test questions; write `compare.md` and all answers as JSONL.

    Answers are kept as they arrive: after a crash only what is missing is asked. StageError where a model cannot be
    asked.
    """
    section = recipe.compare
    assert section
    questions = probe_questions(recipe, section.probes)
    questions += held_out_questions(recipe, place, section.queries) if section.queries else []
    models = model_names(recipe)
    file = place.local("answers.jsonl")
    answers = _kept(file)
    pending = [Pending(m, q) for m in models for q in questions if (m, q.row_id) not in answers]
    if pending:
        file.parent.mkdir(parents=True, exist_ok=True)
        with models_endpoint(recipe, place, section.endpoint) as url, open(file, "a", encoding="utf-8") as sink:
            _ask_now(url, section, pending, len(models) * len(questions), sink)
        answers = _kept(file)
    rows = [_row(question, models, answers) for question in questions]
    place.workspace.write(place.path("compare.md"), _markdown(rows, models).encode())
    return _report(section, models, rows)


def _kept(file: Path) -> Answers:
    """What earlier runs were answered."""
    if not file.exists():
        return {}
    drop_torn_line(file)
    lines = file.read_text(encoding="utf-8").splitlines()
    return {(row["model"], row["row_id"]): row["answer"] for row in map(json.loads, lines)}


def _ask_now(url: str, section: Compare, pending: list[Pending], total: int, sink: IO[str]) -> None:
    try:
        asyncio.run(_ask_all(url, section, pending, total, sink))
    except OpenAIError as error:
        raise StageError(f"{url}: {error}; run again to go on with what is not answered") from None


async def _ask_all(url: str, section: Compare, pending: list[Pending], total: int, sink: IO[str]) -> None:
    """Ask what is pending, a few requests in flight, and write every answer as it arrives."""
    gate = asyncio.Semaphore(section.concurrency)
    client = AsyncOpenAI(base_url=url, api_key=api_key(), timeout=section.timeout, max_retries=3)
    with progress("answers", total, "answers", done=total - len(pending)) as advance:

        async def one(item: Pending) -> None:
            async with gate:
                answer = await _ask(client, item, section.generation)
            sink.write(json.dumps(answer, ensure_ascii=False) + "\n")
            sink.flush()
            advance(1)

        async with client:
            await asyncio.gather(*map(one, pending))


async def _ask(client: AsyncOpenAI, item: Pending, generation: Generation) -> dict[str, Any]:
    given = generation.model_dump(exclude_none=True)
    beyond_openai = {name: given.pop(name) for name in ("top_k", "repetition_penalty") if name in given}
    messages: Any = item.question.messages
    completion = await client.chat.completions.create(
        model=item.model, messages=messages, extra_body=beyond_openai or None, **given
    )
    choice = completion.choices[0]
    return {
        "model": item.model,
        "row_id": item.question.row_id,
        "query": item.question.query,
        "answer": choice.message.content or "",
        "finish_reason": choice.finish_reason,
    }


def _row(question: Question, models: list[str], answers: Answers) -> dict[str, Any]:
    return {
        "row_id": question.row_id,
        "query": question.query,
        "reference": question.reference,
        "answers": {model: answers[model, question.row_id] for model in models},
    }


def _markdown(rows: list[dict[str, Any]], models: list[str]) -> str:
    """The rows as one Markdown table: query, reference, then a column per model."""
    header = ["query", "reference", *models]
    lines = [_line(header), _line(["---"] * len(header))]
    lines += [_line([row["query"], row["reference"], *row["answers"].values()]) for row in rows]
    return "".join(lines)


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |\n"


def _cell(text: str) -> str:
    """Text as it stands, kept inside one cell: no character of it is Markdown or HTML."""
    escaped = re.sub(r"([\\`*_\[\]|~])", r"\\\1", html.escape(text.strip(), quote=False))
    return re.sub(r"\s*\n\s*", "<br>", escaped)


def _report(section: Compare, models: list[str], rows: list[dict[str, Any]]) -> dict[str, Any]:
    empty = {model: sum(not row["answers"][model].strip() for row in rows) for model in models}
    silent = [f"{model} gave {count} empty answers" for model, count in empty.items() if count]
    return {
        "summary": "; ".join([f"{len(rows)} questions to {', '.join(models)}", *silent]),
        "digest": hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest(),
        "models": models,
        "rows": rows,
        "empty": empty,
        "generation": section.generation.model_dump(),
        "files": {"table": "compare.md", "answers": "answers.jsonl"},
    }
