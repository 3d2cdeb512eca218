"""Analysis beside dj-analyze: one YAML, one corpus, every filter's statistic over all rows, and the same table.

    python -m benchmarks.analyze --corpus FILE --assets FOLDER [--quick] [--rounds 1] [--peer data-juicer|none]
    python -m benchmarks.analyze --corpus FILE --assets FOLDER --rows 1006218 [--folder FOLDER]

The second form tells time and memory for rows made of real text to Zhihu-KOL's lengths, by the recipe `zhihu`. The
last line is one JSON object.
"""

import argparse
import csv
import json
import math
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.clean import corpus_of
from benchmarks.made_rows import write_rows
from benchmarks.million import QUICK_ROWS, recipe_of, stage
from benchmarks.ours import Run, run_warm, told
from benchmarks.peer_data_juicer import PeerRun, check_peer, model_home, options_of, run_peer, write_config
from pipelines.artifacts.reports.clean import AnalyzeReport
from pipelines.report.page import environment

ENTRIES = ("count", "mean", "std", "min", "25%", "50%", "75%", "max", "unique", "top", "freq")
TOLERANCE = 1e-6
"""Relative: data-juicer rounds to ten decimals before it describes."""


def main() -> int:
    """Measure and print."""
    options = options_of(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        folder = Path(temporary)
        os.environ.update(model_home(options.assets, folder / "models"))
        summary = _at_scale(options, folder) if options.rows else _beside_peer(options, folder)
    print(json.dumps(summary, ensure_ascii=False))
    return 0


def _at_scale(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    rows = min(options.rows, QUICK_ROWS) if options.quick else options.rows
    made = write_rows(options.corpus, (options.folder or folder) / f"made-{rows}.jsonl", rows)
    recipe = recipe_of(made, folder, "analyzed", analyze=True)
    runs = {name: stage(name, recipe, folder / "work") for name in ("ingest", "analyze")}
    table = Table("", "seconds", "of it the stage", "peak MiB", box=None)
    for name, run in runs.items():
        table.add_row(name, str(run["seconds"]), str(run["stage_seconds"]), str(run["peak_mib"]))
    Console().print(table)
    return _summary(rows, runs["analyze"]["stage_seconds"], None, None, {"rows": rows, **runs})


def _beside_peer(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if options.peer != "none":
        check_peer(options.peer_python)
    source = corpus_of(options, folder)
    rows = pq.read_metadata(source).num_rows
    config = write_config(folder / "ours.yaml", source, folder / "ours.jsonl")
    theirs = write_config(folder / "theirs.yaml", source, folder / "theirs" / "theirs.jsonl")
    runs: list[Run] = []
    peers: list[PeerRun] = []
    for number in range(options.rounds):
        runs.append(run_warm(config, folder / f"warm-{number}", "analyze", ["analyze={}"]))
        if options.peer != "none":
            peers.append(run_peer(options.peer_python, "dj-analyze", theirs, {}))
    ours = statistics.median(run.seconds for run in runs)
    peer = statistics.median(run.seconds for run in peers) if peers else None
    found = {entry.name: entry.model_dump() for entry in runs[-1].report(AnalyzeReport).statistics}
    expected = _their_table(folder / "theirs") if peers else {}
    different = [f"{name} {key}: {a} and {b}" for name in expected for key, a, b in _pairs(found[name], expected[name])]
    _print(found)
    for line in different:
        print(f"differs: {line}")
    print(f"ours {ours:.2f} s, {rows / ours:.0f} rows/s" + (f"; data-juicer {peer:.2f} s" if peer else ""))
    details = {
        "rows": rows,
        "ours_seconds": [round(run.seconds, 2) for run in runs],
        "peer_seconds": [round(run.seconds, 2) for run in peers],
        "peer_cold": told(peers[-1].whole) if peers else None,
    }
    return _summary(rows, ours, peer, not different if peers else None, details)


def _summary(rows: int, ours: float, peer: float | None, equal: bool | None, runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "analyze",
        "ours": round(rows / ours, 1),
        "peer": round(rows / peer, 1) if peer else None,
        "unit": "rows/s",
        "ratio": round(peer / ours, 2) if peer else None,
        "equal": equal,
        "runs": runs,
        "environment": environment().model_dump(),
    }


def _their_table(folder: Path) -> dict[str, dict[str, str]]:
    """What `dj-analyze` wrote: by statistic, its entries as text, those without a value left out."""
    (path,) = folder.glob("*/analysis/overall.csv")
    table: dict[str, dict[str, str]] = {}
    with open(path, encoding="utf-8", newline="") as stream:
        for row in csv.DictReader(stream):
            entry = row.pop("")
            for name, value in row.items():
                if value:
                    table.setdefault(name, {})[entry] = value
    return table


def _pairs(ours: dict[str, Any], theirs: dict[str, str]) -> list[tuple[str, Any, str]]:
    """The entries that do not agree."""
    return [(key, ours.get(key), value) for key, value in theirs.items() if not _agree(ours.get(key), value)]


def _agree(ours: Any, theirs: str) -> bool:
    if isinstance(ours, int | float):
        return math.isclose(ours, float(theirs), rel_tol=TOLERANCE, abs_tol=1e-9)
    return bool(ours == theirs)


def _print(found: dict[str, dict[str, Any]]) -> None:
    table = Table("", *found, box=None)
    for key in ENTRIES:
        values = [entry.get(key, "") for entry in found.values()]
        table.add_row(key, *(f"{value:.6g}" if isinstance(value, float) else str(value) for value in values))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
