"""Evaluate: evalscope's scores of every model on the held-out rows, and style metrics beside them."""

import hashlib
import json
import os
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.errors import StageError
from pipelines.evaluate import style
from pipelines.evaluate.endpoint import BASE, model_names, models_endpoint
from pipelines.evaluate.questions import Question, held_out_questions
from pipelines.evaluate.scores import HEADLINE, HOW, METRICS, Scored, bootstrap, read_scored
from pipelines.evaluate.scoring import Job
from pipelines.progress import progress
from pipelines.recipe import Evaluate, Recipe
from pipelines.workspace import Place, to_json
from serve.parent_death import PARENT

VERSION = 1

BENCHMARK = "general_qa"


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section, what the answers further follow from, and the seed of the bootstrap; not what only changes speed."""
    assert recipe.evaluate and recipe.train
    return {
        "section": recipe.evaluate.model_dump(exclude={"eval_batch_size", "timeout"}),
        "system": recipe.train.system,
        "engine": recipe.serve.engine.model_dump(include={"dtype", "max_model_len"}),
        "models": model_names(recipe),
        "seed": recipe.seed,
    }


def evaluate(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Ask every model the test rows and score the answers.

    Answers are kept as they arrive: after a crash only what is missing is asked. StageError where the endpoint fails
    or a metric could not be computed.
    """
    section = recipe.evaluate
    assert section
    questions = held_out_questions(recipe, place, section.limit)
    data = place.local("questions")
    _write_questions(data / "test.jsonl", questions)
    jobs = [_job(place, section, model, data) for model in model_names(recipe)]
    if sum(map(_answered, jobs)) < len(jobs) * len(questions):
        with models_endpoint(recipe, place, section.endpoint) as url:
            _score(place, [Job(**{**asdict(job), "url": url}) for job in jobs], len(questions))
    else:
        _score(place, jobs, len(questions))
    scored = {job.model: read_scored(job, [question.reference for question in questions]) for job in jobs}
    return _report(recipe, place, questions, scored)


def _write_questions(path: Path, questions: list[Question]) -> None:
    """The questions as evalscope's general_qa reads them."""
    rows = ({"messages": question.messages, "response": question.reference} for question in questions)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _job(place: Place, section: Evaluate, model: str, data: Path) -> Job:
    return Job(
        model=model,
        url="http://127.0.0.1/v1",
        folder=str(place.local("evalscope", model)),
        data=str(data),
        benchmark=BENCHMARK,
        generation=section.generation.model_dump(exclude_none=True),
        eval_batch_size=section.eval_batch_size,
        timeout=section.timeout,
    )


def _answered(job: Job) -> int:
    """How many answers of a job are on disk, complete lines only."""
    return job.predictions.read_bytes().count(b"\n") if job.predictions.exists() else 0


def _score(place: Place, jobs: list[Job], rows: int) -> None:
    """Run evalscope in a process of its own, showing the answers as they arrive; StageError where it fails."""
    path, log = place.local("jobs.json"), place.local("evalscope.log")
    path.write_bytes(to_json([asdict(job) for job in jobs]))
    command = [sys.executable, "-m", "pipelines.evaluate.scoring", str(path)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **offline, PARENT: str(os.getpid())}
    done = sum(map(_answered, jobs))
    with open(log, "ab") as sink, progress("answers", len(jobs) * rows, "rows", done) as advance:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.3)
                done = _advance(jobs, done, advance)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise StageError(f"evalscope stopped: {_last_line(log)}; its log: {log}. Run again to go on from here")


def _advance(jobs: list[Job], done: int, advance: Any) -> int:
    now = sum(map(_answered, jobs))
    if now > done:
        advance(now - done)
    return now


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no message"


def _report(recipe: Recipe, place: Place, questions: list[Question], scored: dict[str, Scored]) -> dict[str, Any]:
    assert recipe.evaluate
    phrases = recipe.evaluate.stock_phrases
    answers = place.path("answers.jsonl")
    place.workspace.write(answers, _answer_lines(questions, scored))
    styles = {model: style.per_answer(result.answers, phrases) for model, result in scored.items()}
    models = {model: _summary(result, styles[model]) for model, result in scored.items()}
    deltas = {
        model: _deltas(scored[BASE], result, styles[BASE], styles[model], recipe.seed)
        for model, result in scored.items()
        if model != BASE
    }
    headline = ", ".join(f"{model} {summary['scores'][HEADLINE]:.3f}" for model, summary in models.items())
    return {
        "summary": f"{len(questions)} rows; ROUGE-L F1: {headline}",
        "digest": hashlib.sha256(place.workspace.read(answers)).hexdigest(),
        "rows": len(questions),
        "headline": HEADLINE,
        "models": models,
        "deltas": deltas,
        "how": {**HOW, **style.HOW},
        "generation": recipe.evaluate.generation.model_dump(),
        "files": {"answers": "answers.jsonl", "evalscope": "evalscope"},
    }


def _summary(result: Scored, styles: dict[str, list[float]]) -> dict[str, Any]:
    """One model's means over the rows."""
    means = {name: sum(values) / len(values) for name, values in {**result.values, **styles}.items()}
    return {
        "scores": {name: means[name] for name in METRICS},
        "style": {**{name: means[name] for name in styles}, **style.over_answers(result.answers)},
        "empty": result.empty,
        "truncated": sum(result.truncated),
    }


def _deltas(
    base: Scored, tuned: Scored, base_style: dict[str, list[float]], tuned_style: dict[str, list[float]], seed: int
) -> dict[str, dict[str, float]]:
    """Tuned minus base for every per-row metric, with its bootstrap interval."""
    before, after = {**base.values, **base_style}, {**tuned.values, **tuned_style}
    return {
        name: asdict(bootstrap([new - old for new, old in zip(after[name], before[name], strict=True)], seed))
        for name in before
    }


def _answer_lines(questions: list[Question], scored: dict[str, Scored]) -> bytes:
    """One JSON object a row: the question, the reference, and every model's answer with its headline score."""
    lines = []
    for index, question in enumerate(questions):
        answers = {model: result.answers[index] for model, result in scored.items()}
        scores = {model: result.values[HEADLINE][index] for model, result in scored.items()}
        row = {"row_id": question.row_id, "query": question.query, "reference": question.reference}
        lines.append(json.dumps({**row, "answers": answers, HEADLINE: scores}, ensure_ascii=False) + "\n")
    return "".join(lines).encode()
