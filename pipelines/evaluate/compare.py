"""Compare: the same questions to every model at the same settings, side by side."""

import hashlib
import html
import itertools
import json
import re
from dataclasses import dataclass
from typing import Any

from pipelines.artifacts.workspace import Place
from pipelines.evaluate.ask import Answer, Manner, Request, ask, kept_answers, unanswered
from pipelines.evaluate.batch import answer_offline
from pipelines.evaluate.checkpoints import checkpoint_requests, checkpoint_result
from pipelines.evaluate.endpoint import BASE, api_key, checkpoint_adapters, model_names, models_endpoint
from pipelines.evaluate.pairwise_judge import SECTION_KEY, judge_answers
from pipelines.evaluate.questions import Question, held_out_questions, probe_questions
from pipelines.evaluate.sweep import recommendation, sweep_requests, sweep_result
from pipelines.llm.dispatch import read_keys
from pipelines.metrics.rouge import rouge_l_f
from pipelines.metrics.style import loops
from pipelines.recipe.evaluate import Compare
from pipelines.recipe.llm import UNPAID
from pipelines.recipe.schema import Recipe

VERSION = 1


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section, and what the answers further follow from; not what only changes speed."""
    assert recipe.compare and recipe.train
    return {
        "section": recipe.compare.model_dump(
            mode="json", exclude={"concurrency": True, "timeout": True, "judge": set(UNPAID)}
        ),
        "system": recipe.train.system,
        "engine": recipe.serve.engine.model_dump(include={"dtype", "max_model_len"}),
        "models": model_names(recipe),
    }


def preflight(recipe: Recipe) -> None:
    """RecipeError naming the keys of the judge's endpoints that are not set."""
    assert recipe.compare
    if recipe.compare.judge:
        read_keys(recipe.compare.judge, SECTION_KEY)


def compare(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Ask every model the probes and the first test questions; write `compare.md` and all answers as JSONL.

    Where the recipe asks for them: the same of every checkpoint, the tuned model over a grid of settings, a judge's
    opinion. Answers are kept as they arrive: after a crash only what is missing is asked. StageError where a model
    cannot be asked.
    """
    section = recipe.compare
    assert section
    plan = _plan(recipe, place, section)
    answers = _answers(recipe, place, section, plan.requests)
    models = model_names(recipe)
    rows = [_row(question, models, answers) for question in [*itertools.chain(*plan.probes.values()), *plan.questions]]
    place.workspace.write(place.path("compare.md"), _markdown(rows, models).encode())
    judged = None
    if section.judge:
        judged = judge_answers(place.workspace, section.judge, rows, BASE, recipe.name, recipe.seed)
    swept = sweep_result(section, plan.swept, answers) if section.sweep else None
    return _report(section, models, rows, swept) | {
        "groups": {name: _group(questions, models, answers) for name, questions in plan.probes.items()},
        "sweep": swept,
        "checkpoints": checkpoint_result(section, plan.steps, plan.rated, answers) if plan.steps else None,
        "judge": judged,
    }


@dataclass(frozen=True)
class Plan:
    """What is asked: probes by group and test questions of every model; `rated` of every checkpoint, whose names
    are in `steps`; `swept` of the tuned model at every setting."""

    probes: dict[str, list[Question]]
    questions: list[Question]
    rated: list[Question]
    swept: list[Question]
    steps: dict[int, str]
    requests: list[Request]


def _plan(recipe: Recipe, place: Place, section: Compare) -> Plan:
    wanted = {
        "questions": section.queries,
        "rated": section.checkpoints.rows if section.checkpoints else 0,
        "swept": section.sweep.rows if section.sweep else 0,
    }
    held_out = held_out_questions(recipe, place, max(wanted.values())) if any(wanted.values()) else []
    questions, rated, swept = (held_out[:count] for count in wanted.values())
    probes = probe_questions(recipe, section.probes)
    steps = {step: name for step, (name, _) in checkpoint_adapters(recipe, place.inputs["train"]).items()}
    asked = [*itertools.chain(*probes.values()), *questions]
    requests = [Request(_key(m, q), m, q.messages, section.generation) for m in model_names(recipe) for q in asked]
    requests += checkpoint_requests(section, list(steps.values()), rated)
    requests += sweep_requests(section, recipe.name, swept, recipe.seed) if section.sweep else []
    return Plan(probes, questions, rated, swept, steps, requests)


def _answers(recipe: Recipe, place: Place, section: Compare, requests: list[Request]) -> dict[str, Answer]:
    """The answers to all requests; no endpoint is started where they are there already."""
    file = place.local("answers.jsonl")
    if not unanswered(requests, file):
        return kept_answers(file)
    if section.engine == "vllm":
        return answer_offline(recipe, place, requests, file)
    with models_endpoint(recipe, place, section.endpoint) as url:
        return ask(Manner(url, api_key(), section.concurrency, section.timeout), requests, file, "answers")


def _group(questions: list[Question], models: list[str], answers: dict[str, Answer]) -> dict[str, dict[str, float]]:
    """How each model answers a group of probes.

    `base` is the mean ROUGE-L F1 between its answers and the base model's: how much training left as it was.
    """
    said = {model: [answers[_key(model, question)].answer for question in questions] for model in models}
    return {
        model: {
            "length": sum(map(len, texts)) / len(texts),
            "loop": sum(map(loops, texts)) / len(texts),
            "base": sum(rouge_l_f(text, old) for text, old in zip(texts, said[BASE], strict=True)) / len(texts),
        }
        for model, texts in said.items()
    }


def _key(model: str, question: Question) -> str:
    return f"{model}/{question.row_id}"


def _row(question: Question, models: list[str], answers: dict[str, Answer]) -> dict[str, Any]:
    return {
        "row_id": question.row_id,
        "query": question.query,
        "reference": question.reference,
        "answers": {model: answers[_key(model, question)].answer for model in models},
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


def _report(
    section: Compare, models: list[str], rows: list[dict[str, Any]], swept: dict[str, Any] | None
) -> dict[str, Any]:
    empty = {model: sum(not row["answers"][model].strip() for row in rows) for model in models}
    silent = [f"{model} gave {count} empty answers" for model, count in empty.items() if count]
    advice = [f"the sweep recommends {recommendation(swept['recommended'])}"] if swept else []
    return {
        "summary": "; ".join([f"{len(rows)} questions to {', '.join(models)}", *silent, *advice]),
        "digest": hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest(),
        "models": models,
        "rows": rows,
        "empty": empty,
        "generation": section.generation.model_dump(),
        "files": {"table": "compare.md", "answers": "answers.jsonl"},
    }
