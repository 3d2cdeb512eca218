"""Cleaning beside data-juicer: one YAML, one corpus, rows per second from reading to writing, and the same rows kept.

    python -m benchmarks.clean --corpus FILE --assets FOLDER [--quick] [--rounds 1] [--peer data-juicer|none]
    python -m benchmarks.clean --corpus FILE --assets FOLDER --rows 1006218 [--folder FOLDER]

The first form tells the steady state, with Ray up and kernels cached, and the cold command apart; data-juicer's
start-up is not counted either. Beside it, on the same rows, the operators of the recipe `zhihu` in the dialect `zh`.
The second cleans rows made of real text to Zhihu-KOL's lengths by the recipe `zhihu`, as published and with every row
before every operator. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured
from benchmarks.million import clean_at_scale
from benchmarks.ours import Run, run_command, run_warm, told
from benchmarks.peer_data_juicer import (
    CORES,
    PROCESS,
    PeerRun,
    check_peer,
    model_home,
    options_of,
    rows_of,
    run_peer,
    write_config,
)
from pipelines.artifacts.reports.clean import CleanReport
from pipelines.recipe.load import shipped_recipes
from pipelines.report.page import environment

QUICK_ROWS = 2000
AGAIN = ("export.overwrite=true",)
"""Every run writes the file of the one before."""
BY_VOLUME = ("{'specified_numeric_field_filter'", "{'text_length_filter'")
"""Operators whose limits are those of the peer's recipe."""


def main() -> int:
    """Measure and print."""
    options = options_of(__doc__).parse_args()
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        folder = Path(temporary)
        os.environ.update(model_home(options.assets, folder / "models"))
        summary = clean_at_scale(options, folder) if options.rows else _beside_peer(options, folder)
    print(json.dumps(summary, ensure_ascii=False))
    return 0


def corpus_of(options: argparse.Namespace, folder: Path) -> Path:
    """The corpus, or its first rows."""
    if not options.quick:
        return Path(options.corpus)
    path = folder / "quick.parquet"
    pq.write_table(pq.read_table(options.corpus).slice(0, QUICK_ROWS), path)
    return path


def _beside_peer(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    if options.peer != "none":
        check_peer(options.peer_python)
    source = corpus_of(options, folder)
    rows = pq.read_metadata(source).num_rows
    config = write_config(folder / "ours.yaml", source, folder / "ours.jsonl")
    chinese = _chinese_config(folder / "zh.yaml", source, folder / "zh.jsonl")
    theirs = write_config(folder / "theirs.yaml", source, folder / "theirs" / "theirs.jsonl")
    runs: list[Run] = []
    chinese_runs: list[Run] = []
    peers: list[PeerRun] = []
    for number in range(options.rounds):
        runs.append(run_warm(config, folder / f"warm-{number}", "export", AGAIN))
        chinese_runs.append(run_warm(chinese, folder / f"zh-{number}", "export", AGAIN))
        if options.peer != "none":
            peers.append(run_peer(options.peer_python, "dj-process", theirs, {}))
    cold = run_command("export", config, folder / "cold", AGAIN, env={"NUMBA_CACHE_DIR": str(folder / "kernels")})
    equal = _equal(folder) if peers else None
    ours = statistics.median(run.seconds for run in runs)
    peer = statistics.median(run.seconds for run in peers) if peers else None
    zh = statistics.median(run.seconds for run in chinese_runs)
    _print(rows, ours, peer, runs[-1], peers[-1] if peers else None, cold)
    beside = f"; ratio {peer / zh:.1f}" if peer else ""
    print(f"the recipe zhihu in the dialect zh, whole stage: {zh:.2f} s, {rows / zh:.0f} rows/s{beside}")
    return {
        "name": "clean",
        "ours": round(rows / ours, 1),
        "peer": round(rows / peer, 1) if peer else None,
        "unit": "rows/s",
        "ratio": round(peer / ours, 2) if peer else None,
        "equal": equal,
        "zh": round(rows / zh, 1),
        "zh_ratio": round(peer / zh, 2) if peer else None,
        "runs": {
            "rows": rows,
            "ours_seconds": [round(run.seconds, 2) for run in runs],
            "peer_seconds": [round(run.seconds, 2) for run in peers],
            "ours_cold": told(cold),
            "peer_cold": told(peers[-1].whole) if peers else None,
            "operators": _operators(runs[-1], peers[-1] if peers else None),
        },
        "environment": environment().model_dump(),
    }


def _chinese_config(path: Path, source: Path, export: Path) -> Path:
    """The recipe `zhihu`'s operators in the dialect `zh`, for rows as short and as little voted for as the peer's."""
    shipped = yaml.safe_load(shipped_recipes()["zhihu"].read_text(encoding="utf-8"))
    process = [step for step in shipped["clean"]["process"] if not str(step).startswith(BY_VOLUME)]
    config = {
        "name": path.stem,
        "ingest": {"source": str(source), "adapter": "columns"},
        "clean": {"process": [*PROCESS[:2], *process], "text_keys": "response", "concurrency": CORES},
        "export": {"path": str(export)},
    }
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


def _equal(folder: Path) -> bool:
    """Whether both kept the same rows with the same texts in the same order, from cold and warm."""
    columns = ("id", "query", "response", "upvotes")
    return rows_of(folder / "ours.jsonl", columns) == rows_of(folder / "theirs" / "theirs.jsonl", columns)


def _operators(run: Run, peer: PeerRun | None) -> list[dict[str, Any]]:
    """Beside each other: seconds of one core (for data-juicer, its processes times wall seconds) and rows left."""
    entries = []
    for stats in run.report(CleanReport).operators:
        seconds, left = peer.operators[stats.operator] if peer else (None, None)
        entries.append(
            {
                "operator": stats.operator,
                "ours_core_seconds": round(stats.seconds, 3),
                "ours_rows": stats.rows_out,
                "peer_core_seconds": None if seconds is None else round(CORES * seconds, 3),
                "peer_rows": left,
            }
        )
    return entries


def _print(rows: int, ours: float, peer: float | None, run: Run, theirs: PeerRun | None, cold: Measured) -> None:
    table = Table("operator", "ours, core s", "rows left", "data-juicer, core s", "rows left", box=None)
    for entry in _operators(run, theirs):
        table.add_row(*("" if value is None else str(value) for value in entry.values()))
    Console().print(table)
    print(f"whole stage, reading and writing included: ours {ours:.2f} s, {rows / ours:.0f} rows/s")
    if peer and theirs:
        print(f"  data-juicer {peer:.2f} s, {rows / peer:.0f} rows/s; ratio {peer / ours:.1f}")
        print(f"as a cold command: data-juicer {theirs.whole.seconds:.1f} s, {theirs.whole.peak_bytes >> 20} MiB")
    print(f"as a cold command, kernels compiled: ours {cold.seconds:.1f} s, {cold.peak_bytes >> 20} MiB")


if __name__ == "__main__":
    sys.exit(main())
