"""The recipe `zhihu` on rows made to Zhihu-KOL's lengths: time, memory, and how both grow with the rows."""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.made_rows import write_rows
from benchmarks.measure import Measured
from benchmarks.ours import run_command, told
from pipelines.artifacts.reports.clean import AnalyzeReport, CleanReport
from pipelines.artifacts.reports.rows import RowsReport
from pipelines.artifacts.workspace import Workspace
from pipelines.recipe.base import SHIPPED
from pipelines.report.page import environment
from rayjobs import pipeline

START_UP_ROWS = 1000
"""A run of so few rows takes what any run takes before its first row."""
QUICK_ROWS = 20_000


def clean_at_scale(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Clean all made rows and a tenth of them, as published and with every row before every operator.

    What was measured in `options.folder` before is not run again, so that the measurement can be made in parts.
    """
    rows = min(options.rows, QUICK_ROWS) if options.quick else options.rows
    folder = (options.folder or folder).absolute()
    made = write_rows(options.corpus, folder / f"made-{rows}.jsonl", rows)
    recipes = {"published": recipe_of(made, folder, "published"), "every-row": recipe_of(made, folder, "every-row", 0)}
    ingest = stage("ingest", recipes["every-row"], folder / f"first-{rows}-0")
    runs = {"ingest": ingest}
    for name, recipe in recipes.items():
        runs[name] = stage("clean", recipe, folder / f"first-{rows}-0")
    growth = _growth(recipes["every-row"], folder, rows, options.rounds)
    _print(rows, runs, growth)
    seconds = ingest["stage_seconds"] + runs["every-row"]["stage_seconds"]
    return {
        "name": "clean",
        "ours": round(rows / seconds, 1),
        "peer": None,
        "unit": "rows/s",
        "ratio": None,
        "equal": None,
        "runs": {"rows": rows, **runs, "growth": growth},
        "environment": environment().model_dump(),
    }


def recipe_of(made: Path, folder: Path, name: str, votes: int | None = None, *, analyze: bool = False) -> Path:
    """The shipped recipe on the made rows, without what follows cleaning; `votes` replaces its threshold."""
    shipped = yaml.safe_load((SHIPPED / "zhihu.yaml").read_text(encoding="utf-8"))
    sections = ("seed", "ingest", *(["analyze"] if analyze else []), "clean")
    tree = {"name": name, **{section: shipped[section] for section in sections}}
    tree["ingest"]["source"] = str(made)
    if votes is not None:
        tree["clean"]["process"][0]["specified_numeric_field_filter"]["min_value"] = votes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(tree, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


def stage(name: str, recipe: Path, workspace: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Run one stage as a command; what it took with and without the start of Ray, memory, and its report's counts.

    What was begun of it before is done anew; what was measured in this workspace before is told again.
    """
    kept = workspace / f"measured-{recipe.stem}-{name}.json"
    if kept.exists():
        before: dict[str, Any] = json.loads(kept.read_text())
        return before
    loaded = pipeline.load(str(recipe), list(overrides))
    begun = pipeline.status(loaded, Workspace(str(workspace)))[name]
    if begun.place and not begun.is_complete:
        begun.place.clear()
    measured: Measured = run_command(name, recipe, workspace, overrides)
    finished = pipeline.status(loaded, Workspace(str(workspace)))[name]
    assert finished.manifest
    result = {**told(measured), "stage_seconds": round(finished.manifest.seconds, 1), **_counts(finished.report)}
    kept.write_text(json.dumps(result))
    return result


def _counts(report: RowsReport | AnalyzeReport) -> dict[str, Any]:
    """Rows into and out of a stage, and the seconds of one core that each of its operators took."""
    if not isinstance(report, CleanReport):
        return {"rows": report.rows, "core_seconds": {}}
    seconds = {stats.operator: round(stats.seconds, 1) for stats in report.operators}
    return {"rows_in": report.rows_in, "rows": report.rows, "core_seconds": seconds}


def _growth(recipe: Path, folder: Path, rows: int, rounds: int) -> dict[str, Any]:
    """Time per row of all rows against that of a tenth, both without what a run of few rows takes; medians."""
    sizes = (START_UP_ROWS, rows // 10, rows)
    seconds = {size: _limited(recipe, folder, size, rounds, [f"ingest.limit={size}"][size == rows :]) for size in sizes}
    start_up, tenth, whole = (statistics.median(seconds[size]) for size in sizes)
    per_row = [(whole - start_up) / rows, (tenth - start_up) / (rows // 10)]
    return {
        "seconds": {str(size): runs for size, runs in seconds.items()},
        "microseconds_per_row": [round(1e6 * value, 1) for value in per_row],
        "growth": round(per_row[0] / per_row[1] - 1, 3),
    }


def _limited(recipe: Path, folder: Path, rows: int, rounds: int, limit: list[str]) -> list[float]:
    """Seconds of cleaning the first rows, each time anew after the same ingest."""
    first = folder / f"first-{rows}-0"
    stage("ingest", recipe, first, limit)
    seconds = []
    for number in range(rounds):
        workspace = folder / f"first-{rows}-{number}"
        workspace.mkdir(exist_ok=True)
        if not (workspace / "ingest").exists():
            (workspace / "ingest").symlink_to(first / "ingest")
        seconds.append(stage("clean", recipe, workspace, limit)["stage_seconds"])
    return seconds


def _print(rows: int, runs: dict[str, dict[str, Any]], growth: dict[str, Any]) -> None:
    table = Table("", "seconds", "of it the stage", "rows/s", "rows left", "core seconds", "peak MiB", box=None)
    for name, run in runs.items():
        seconds = run["stage_seconds"]
        table.add_row(
            name, str(run["seconds"]), str(seconds), f"{rows / seconds:.0f}", str(run["rows"]), str(run["cpu_seconds"]),
            str(run["peak_mib"]),
        )  # fmt: skip
    Console().print(table)
    operators = Table("operator, every row", "core seconds", box=None)
    for name, seconds in runs["every-row"]["core_seconds"].items():
        operators.add_row(name, str(seconds))
    Console().print(operators)
    print(f"time per row against that of a tenth of the rows: {growth['growth']:+.1%}")
