"""Evaluate: evalscope's scores of every model on the held-out rows, and style metrics beside them."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from pipelines.artifacts.workspace import Place, to_json
from pipelines.evaluate.batch import answer_jobs
from pipelines.evaluate.endpoint import BASE, model_names, models_endpoint
from pipelines.evaluate.evalscope.child import Job
from pipelines.evaluate.evalscope.datasets import Dataset, prepare
from pipelines.evaluate.evalscope.parent import score
from pipelines.evaluate.evalscope.results import (
    HEADLINE,
    HOW,
    METRICS,
    BenchmarkScores,
    Scored,
    read_benchmark,
    read_scored,
)
from pipelines.evaluate.questions import Question
from pipelines.metrics import style
from pipelines.metrics.bootstrap import bootstrap
from pipelines.recipe.evaluate import Evaluate
from pipelines.recipe.schema import Recipe

VERSION = 1
SHOWN = 3
"""How many of the most improved and most harmed answers the report has."""


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section, what the answers further follow from, and the seed of the bootstrap; not what only changes speed."""
    assert recipe.evaluate and recipe.train
    return {
        "section": recipe.evaluate.model_dump(exclude={"eval_batch_size", "timeout"}),
        "files": {entry.path: _sizes(Path(entry.path)) for entry in recipe.evaluate.datasets if entry.path},
        "system": recipe.train.system,
        "engine": recipe.serve.engine.model_dump(include={"dtype", "max_model_len"}),
        "models": model_names(recipe),
        "seed": recipe.seed,
    }


def _sizes(folder: Path) -> dict[str, str]:
    """The files of a data set with their checksums."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.jsonl"))}


def evaluate(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Ask every model every data set and score the answers.

    Answers are kept as they arrive: after a crash only what is missing is asked. StageError where the endpoint fails
    or a metric could not be computed.
    """
    section = recipe.evaluate
    assert section
    datasets = prepare(recipe, place)
    jobs = {(d.label, model): _job(place, section, d, model) for d, model in _pairs(recipe, datasets)}
    if all(d.questions and jobs[d.label, m].answered() == len(d.questions) for d, m in _pairs(recipe, datasets)):
        score(place, list(jobs.values()), datasets)
    elif section.engine == "vllm":
        file = answer_jobs(recipe, place, list(jobs.values()), datasets)
        score(place, [replace(job, answers=str(file)) for job in jobs.values()], datasets)
    else:
        with models_endpoint(recipe, place, section.endpoint) as url:
            score(place, [replace(job, url=url) for job in jobs.values()], datasets)
    return _report(recipe, place, datasets, jobs)


def _pairs(recipe: Recipe, datasets: list[Dataset]) -> Iterator[tuple[Dataset, str]]:
    return itertools.product(datasets, model_names(recipe))


def _job(place: Place, section: Evaluate, dataset: Dataset, model: str) -> Job:
    return Job(
        model=model,
        url="http://127.0.0.1/v1",
        folder=str(place.local("evalscope", dataset.label, model)),
        benchmark=dataset.benchmark,
        arguments=dataset.arguments,
        limit=None if dataset.questions else section.limit,
        generation=section.generation.model_dump(exclude_none=True),
        eval_batch_size=section.eval_batch_size,
        timeout=section.timeout,
        prompts=str(place.local("questions", dataset.label, "prompts.jsonl")),
    )


def _report(recipe: Recipe, place: Place, datasets: list[Dataset], jobs: dict[tuple[str, str], Job]) -> dict[str, Any]:
    assert recipe.evaluate
    results, benchmarks = {}, {}
    answers = b""
    for dataset in datasets:
        own = {model: jobs[dataset.label, model] for model in model_names(recipe)}
        if dataset.questions:
            references = [question.reference for question in dataset.questions]
            scored = {model: read_scored(job, references) for model, job in own.items()}
            answers += _answer_lines(dataset, scored)
            result = _result(recipe.evaluate, dataset.questions, scored, recipe.seed)
            results[dataset.label] = result | {
                "changed": _changed(dataset.questions, scored[BASE], scored[recipe.name])
            }
        else:
            benchmarks[dataset.label] = _benchmark({m: read_benchmark(job) for m, job in own.items()}, recipe.seed)
    place.workspace.write(place.path("answers.jsonl"), answers)
    return {
        "summary": "; ".join([*map(_headline, results.items()), *map(_benchmark_headline, benchmarks.items())]),
        "digest": hashlib.sha256(answers + to_json(benchmarks)).hexdigest(),
        "headline": HEADLINE,
        "models": model_names(recipe),
        "results": results,
        "benchmarks": benchmarks,
        "how": {**HOW, **style.HOW, **_how_marked(recipe.evaluate)},
        "generation": recipe.evaluate.generation.model_dump(),
        "files": {"answers": "answers.jsonl", "evalscope": "evalscope"},
    }


def _how_marked(section: Evaluate) -> dict[str, str]:
    """How the recipe's own marks are counted."""
    said = {}
    for name, mark in section.marks.items():
        what = f"share of /{mark.each}/ in the question that the answer repeats" if mark.each else f"/{mark.answer}/"
        said[name] = what + (f", over questions that match /{mark.where}/" if mark.where else "")
    return said


def _headline(item: tuple[str, dict[str, Any]]) -> str:
    label, result = item
    shown = ", ".join(f"{model} {summary['scores'][HEADLINE]:.3f}" for model, summary in result["models"].items())
    return f"{label}, {result['rows']} rows: ROUGE-L F1 {shown}"


def _benchmark_headline(item: tuple[str, dict[str, Any]]) -> str:
    label, result = item
    metric = next(iter(next(iter(result["models"].values()))["scores"]))
    shown = ", ".join(f"{model} {summary['scores'][metric]:.3f}" for model, summary in result["models"].items())
    return f"{label}, {result['rows']} rows: {metric} {shown}"


def _result(section: Evaluate, questions: list[Question], scored: dict[str, Scored], seed: int) -> dict[str, Any]:
    """A question-answering data set's part of the report."""
    queries = [question.query for question in questions]
    styles = {
        model: style.per_answer(result.answers, section.stock_phrases)
        | style.marked(queries, result.answers, section.marks)
        for model, result in scored.items()
    }
    base = {**scored[BASE].values, **styles[BASE]}
    return {
        "rows": len(scored[BASE].answers),
        "models": {model: _summary(result, styles[model]) for model, result in scored.items()},
        "deltas": {
            model: _deltas(base, {**result.values, **styles[model]}, seed)
            for model, result in scored.items()
            if model != BASE
        },
    }


def _changed(questions: list[Question], base: Scored, tuned: Scored) -> dict[str, list[dict[str, Any]]]:
    """The answers that training improved and harmed most, by the headline score."""
    before, after = base.values[HEADLINE], tuned.values[HEADLINE]
    order = sorted(range(len(questions)), key=lambda index: before[index] - after[index])

    def row(index: int) -> dict[str, Any]:
        difference = after[index] - before[index]
        answers = {"base": base.answers[index], "tuned": tuned.answers[index]}
        return {"query": questions[index].query, **answers, "difference": difference}

    return {
        "improved": [row(index) for index in order[:SHOWN] if after[index] > before[index]],
        "harmed": [row(index) for index in order[::-1][:SHOWN] if after[index] < before[index]],
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


def _deltas(before: dict[str, list[float]], after: dict[str, list[float]], seed: int) -> dict[str, dict[str, float]]:
    """After minus before for every per-row metric, with its bootstrap interval."""
    return {
        name: asdict(bootstrap([new - old for new, old in zip(after[name], before[name], strict=True)], seed))
        for name in before
    }


def _benchmark(scored: dict[str, BenchmarkScores], seed: int) -> dict[str, Any]:
    """A part of the report for a benchmark that evalscope scores by itself."""
    base = scored[BASE]
    return {
        "rows": base.rows,
        "models": {model: {"scores": result.scores, "unread": result.unread} for model, result in scored.items()},
        "deltas": {
            model: _deltas(
                {name: list(values.values()) for name, values in base.values.items()},
                {name: [result.values[name][row] for row in values] for name, values in base.values.items()},
                seed,
            )
            for model, result in scored.items()
            if model != BASE
        },
    }


def _answer_lines(dataset: Dataset, scored: dict[str, Scored]) -> bytes:
    """One JSON object a row: the question, the reference, and every model's answer with its headline score."""
    return "".join(
        json.dumps(_answer_line(dataset.label, question, index, scored), ensure_ascii=False) + "\n"
        for index, question in enumerate(dataset.questions)
    ).encode()


def _answer_line(label: str, question: Question, index: int, scored: dict[str, Scored]) -> dict[str, Any]:
    return {
        "dataset": label,
        "row_id": question.row_id,
        "query": question.query,
        "reference": question.reference,
        "answers": {model: result.answers[index] for model, result in scored.items()},
        HEADLINE: {model: result.values[HEADLINE][index] for model, result in scored.items()},
    }
