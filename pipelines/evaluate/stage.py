"""Evaluate: evalscope's scores of every model on the held-out rows, and style metrics beside them."""

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pipelines.artifacts.reports.evaluate import (
    BenchmarkResult,
    ChangedAnswer,
    ChangedAnswers,
    DatasetResult,
    EvaluateReport,
    ModelBenchmark,
    ModelScores,
)
from pipelines.artifacts.reports.interval import Interval
from pipelines.artifacts.stage import Stage
from pipelines.artifacts.workspace import Place, to_json
from pipelines.evaluate.batch import answer_jobs
from pipelines.evaluate.endpoint import ON_DISK, ModelInputs, models_endpoint
from pipelines.evaluate.evalscope.datasets import Dataset, prepare
from pipelines.evaluate.evalscope.job import ScoringJob
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
from pipelines.models.lineup import Lineup, served_models
from pipelines.models.served import BASE
from pipelines.recipe.evaluate import Evaluate
from pipelines.recipe.serve import Serve

SHOWN = 3
"""How many of the most improved and most harmed answers the report has."""

Jobs = Mapping[tuple[str, str], ScoringJob]
"""By data set and model."""


@dataclass(frozen=True)
class EvaluateStage(Stage[ModelInputs, EvaluateReport]):
    """Ask every model every data set and score the answers."""

    name: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 2
    on_disk: ClassVar[tuple[str, ...]] = ON_DISK

    section: Evaluate
    models: Lineup
    serve: Serve
    system: str | None
    """The system prompt of rows that bring none."""
    seed: int
    """Of the bootstrap."""

    @property
    def reports(self) -> type[EvaluateReport]:
        """The class of its report."""
        return EvaluateReport

    def fingerprint_inputs(self) -> dict[str, Any]:
        """The section, what the answers further follow from, and the seed; not what only changes speed."""
        return {
            "section": self.section.model_dump(exclude={"eval_batch_size", "timeout"}),
            "files": {entry.path: _sizes(Path(entry.path)) for entry in self.section.datasets if entry.path},
            "system": self.system,
            "engine": self.serve.engine.model_dump(include={"dtype", "max_model_len"}),
            "models": self.models.names(),
            **self.models.fingerprint(),
            "seed": self.seed,
        }

    def run(self, place: Place, inputs: ModelInputs) -> EvaluateReport:
        """Answers are kept as they arrive: after a crash only what is missing is asked.

        StageError where the endpoint fails or a metric could not be computed.
        """
        section = self.section
        datasets = prepare(section, inputs.split, self.system, place)
        pairs = list(itertools.product(datasets, self.models.names()))
        given = self.models.chat_template_kwargs
        jobs = {(dataset.label, model): _job(place, section, dataset, model, given) for dataset, model in pairs}
        listed = list(jobs.values())
        if all(d.questions and jobs[d.label, model].answered() == len(d.questions) for d, model in pairs):
            score(place, listed, datasets)
        elif section.engine == "vllm":
            models = served_models(self.models, inputs.train, inputs.merge)
            file = answer_jobs(self.serve, models, section.generation, place, listed, datasets)
            score(place, [replace(job, answers=str(file)) for job in listed], datasets)
        else:
            with models_endpoint(self.models, self.serve, inputs, section.endpoint) as url:
                score(place, [replace(job, url=url) for job in listed], datasets)
        return _report(self, place, datasets, jobs)


def _sizes(folder: Path) -> dict[str, str]:
    """The files of a data set with their checksums."""
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.glob("*.jsonl"))}


def _job(
    place: Place, section: Evaluate, dataset: Dataset, model: str, chat_template_kwargs: dict[str, Any]
) -> ScoringJob:
    generation = section.generation.model_dump(exclude_none=True)
    if chat_template_kwargs:
        generation["extra_body"] = {"chat_template_kwargs": chat_template_kwargs}
    return ScoringJob(
        model=model,
        url="http://127.0.0.1/v1",
        folder=str(place.local("evalscope", dataset.label, model)),
        benchmark=dataset.benchmark,
        arguments=dataset.arguments,
        limit=None if dataset.questions else section.limit,
        generation=generation,
        eval_batch_size=section.eval_batch_size,
        timeout=section.timeout,
        prompts=str(place.local("questions", dataset.label, "prompts.jsonl")),
    )


def _report(stage: EvaluateStage, place: Place, datasets: list[Dataset], jobs: Jobs) -> EvaluateReport:
    """What evalscope left, with style metrics and differences to the base; writes `answers.jsonl`."""
    section, lineup = stage.section, stage.models
    results: dict[str, DatasetResult] = {}
    benchmarks: dict[str, BenchmarkResult] = {}
    answers = b""
    for dataset in datasets:
        own = {model: jobs[dataset.label, model] for model in lineup.names()}
        if dataset.questions:
            references = [question.reference for question in dataset.questions]
            scored = {model: read_scored(job, references) for model, job in own.items()}
            answers += _answer_lines(dataset, scored)
            changed = _changed(dataset.questions, scored[BASE], scored[lineup.name])
            results[dataset.label] = _result(section, dataset.questions, scored, changed, stage.seed)
        else:
            benchmarks[dataset.label] = _benchmark({m: read_benchmark(job) for m, job in own.items()}, stage.seed)
    place.workspace.write(place.path("answers.jsonl"), answers)
    scores_of_benchmarks = {label: result.model_dump(mode="json") for label, result in benchmarks.items()}
    return EvaluateReport(
        summary="; ".join([*map(_headline, results.items()), *map(_benchmark_headline, benchmarks.items())]),
        digest=hashlib.sha256(answers + to_json(scores_of_benchmarks)).hexdigest(),
        headline=HEADLINE,
        models=lineup.names(),
        results=results,
        benchmarks=benchmarks,
        how={**HOW, **style.HOW, **_how_marked(section)},
        generation=section.generation,
        files={"answers": "answers.jsonl", "evalscope": "evalscope"},
    )


def _how_marked(section: Evaluate) -> dict[str, str]:
    """How the recipe's own marks are counted."""
    said = {}
    for name, mark in section.marks.items():
        what = f"share of /{mark.each}/ in the question that the answer repeats" if mark.each else f"/{mark.answer}/"
        said[name] = what + (f", over questions that match /{mark.where}/" if mark.where else "")
    return said


def _headline(item: tuple[str, DatasetResult]) -> str:
    label, result = item
    shown = ", ".join(f"{model} {scores.scores[HEADLINE]:.3f}" for model, scores in result.models.items())
    cut = ", ".join(f"{model} {scores.truncated}" for model, scores in result.models.items() if scores.truncated)
    return f"{label}, {result.rows} rows: ROUGE-L F1 {shown}{f' (cut at max_tokens: {cut})' if cut else ''}"


def _benchmark_headline(item: tuple[str, BenchmarkResult]) -> str:
    label, result = item
    metric = next(iter(result.models[BASE].scores))
    shown = ", ".join(f"{model} {scores.scores[metric]:.3f}" for model, scores in result.models.items())
    return f"{label}, {result.rows} rows: {metric} {shown}"


def _result(
    section: Evaluate, questions: list[Question], scored: dict[str, Scored], changed: ChangedAnswers, seed: int
) -> DatasetResult:
    """A question-answering data set's part of the report."""
    queries = [question.query for question in questions]
    styles = {
        model: style.per_answer(result.answers, section.stock_phrases)
        | style.marked(queries, result.answers, section.marks)
        for model, result in scored.items()
    }
    base = {**scored[BASE].values, **styles[BASE]}
    return DatasetResult(
        rows=len(scored[BASE].answers),
        models={model: _model_scores(result, styles[model]) for model, result in scored.items()},
        deltas={
            model: _deltas(base, {**result.values, **styles[model]}, seed)
            for model, result in scored.items()
            if model != BASE
        },
        changed=changed,
    )


def _changed(questions: list[Question], base: Scored, tuned: Scored) -> ChangedAnswers:
    """The answers that training improved and harmed most, by the headline score."""
    before, after = base.values[HEADLINE], tuned.values[HEADLINE]
    order = sorted(range(len(questions)), key=lambda index: before[index] - after[index])

    def answer(index: int) -> ChangedAnswer:
        return ChangedAnswer(
            query=questions[index].query,
            base=base.answers[index],
            tuned=tuned.answers[index],
            difference=after[index] - before[index],
        )

    return ChangedAnswers(
        improved=[answer(index) for index in order[:SHOWN] if after[index] > before[index]],
        harmed=[answer(index) for index in order[::-1][:SHOWN] if after[index] < before[index]],
    )


def _model_scores(result: Scored, styles: dict[str, list[float]]) -> ModelScores:
    """One model's means over the rows."""
    means = {name: sum(values) / len(values) for name, values in {**result.values, **styles}.items()}
    return ModelScores(
        scores={name: means[name] for name in METRICS},
        style={**{name: means[name] for name in styles}, **style.over_answers(result.answers)},
        empty=result.empty,
        truncated=sum(result.truncated),
    )


def _deltas(before: dict[str, list[float]], after: dict[str, list[float]], seed: int) -> dict[str, Interval]:
    """After minus before for every per-row metric, with its bootstrap interval."""
    deltas = {}
    for name, values in before.items():
        differences = [new - old for new, old in zip(after[name], values, strict=True)]
        deltas[name] = Interval(**asdict(bootstrap(differences, seed)))
    return deltas


def _benchmark(scored: dict[str, BenchmarkScores], seed: int) -> BenchmarkResult:
    """A part of the report for a benchmark that evalscope scores by itself."""
    base = scored[BASE]
    return BenchmarkResult(
        rows=base.rows,
        models={model: ModelBenchmark(scores=result.scores, unread=result.unread) for model, result in scored.items()},
        deltas={
            model: _deltas(
                {name: list(values.values()) for name, values in base.values.items()},
                {name: [result.values[name][row] for row in values] for name, values in base.values.items()},
                seed,
            )
            for model, result in scored.items()
            if model != BASE
        },
    )


def _answer_lines(dataset: Dataset, scored: dict[str, Scored]) -> bytes:
    """One JSON object a row: the question, the reference, and every model's answer with its headline score."""
    lines = []
    for index, question in enumerate(dataset.questions):
        line = {
            "dataset": dataset.label,
            "row_id": question.row_id,
            "query": question.query,
            "reference": question.reference,
            "answers": {model: result.answers[index] for model, result in scored.items()},
            HEADLINE: {model: result.values[HEADLINE][index] for model, result in scored.items()},
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines).encode()
