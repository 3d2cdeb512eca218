"""data-juicer 1.6.1 in a virtual environment of its own, as the peer of cleaning: `make .peers/data-juicer` makes it.

Both sides run one and the same YAML. The published recipe without votes and for short texts, so that every operator
meets rows: `PROCESS`.
"""

import argparse
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from benchmarks.measure import Measured, measure
from pipelines.errors import InputError

ASSETS = ("zh.sp.model", "zh.arpa.bin", "lid.176.ftz", "flagged_words.json")
SIMHASH = {
    "document_simhash_deduplicator": {
        "tokenization": "character",
        "window_size": 5,
        "lowercase": False,
        "ignore_pattern": r"\p{P}",
        "num_blocks": 10,
        "hamming_distance": 6,
    }
}
PROCESS: list[Any] = [
    {"specified_numeric_field_filter": {"field_key": "upvotes", "min_value": 0}},
    {"text_length_filter": {"min_len": 20, "max_len": 2000}},
    {"clean_email_mapper": None},
    {"clean_html_mapper": None},
    {"clean_ip_mapper": None},
    {"clean_links_mapper": None},
    {"clean_copyright_mapper": None},
    {"language_id_score_filter": {"lang": "zh", "min_score": 0.9}},
    {"alphanumeric_filter": {"tokenization": False, "min_ratio": 0.72}},
    {"flagged_words_filter": {"lang": "zh", "tokenization": False, "max_ratio": 0.0005}},
    {"perplexity_filter": {"lang": "zh", "max_ppl": 1500}},
    {"special_characters_filter": {"max_ratio": 0.4}},
    SIMHASH,
    {"topk_specified_field_selector": {"field_key": "upvotes", "topk": 50000}},
]
CORES = 2
"""Processes of data-juicer, and tasks at a time of ours."""

_DONE = re.compile(r"OP \[(\w+)\] Done in ([\d.]+)s\. Left (\d+) samples")
_STAMP = re.compile(r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) \|", re.MULTILINE)


@dataclass(frozen=True)
class PeerRun:
    """One finished run of data-juicer."""

    whole: Measured
    """The command, its start-up included."""
    seconds: float
    """From where it begins to load the data to its last word: reading, operators and what it writes."""
    operators: dict[str, tuple[float, int]]
    """Seconds of wall time and rows left, by operator."""


def options_of(description: str | None) -> argparse.ArgumentParser:
    """The arguments that the benchmarks with this peer share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, required=True, help="Parquet file with id, query, response and upvotes")
    parser.add_argument("--assets", type=Path, required=True, help=f"folder with {', '.join(ASSETS)}")
    parser.add_argument("--peer", choices=["data-juicer", "none"], default="data-juicer")
    parser.add_argument(
        "--peer-python",
        type=Path,
        default=Path(".peers/data-juicer/bin/python"),
        help="python of a virtual environment with benchmarks/data-juicer.txt; make .peers/data-juicer makes it",
    )
    parser.add_argument("--rounds", type=int, default=1, help="runs of each side, alternating; medians are told")
    parser.add_argument("--rows", type=int, default=None, help="so many made rows of Zhihu-KOL's lengths, without peer")
    parser.add_argument("--folder", type=Path, default=None, help="where made rows are kept and found again")
    parser.add_argument("--quick", action="store_true", help="few rows: checks the benchmark, not the speed")
    return parser


def check_peer(python: Path) -> None:
    """InputError where the peer's environment is not there."""
    if not python.is_file():
        raise InputError(f"{python}: no data-juicer there; run `make .peers/data-juicer`, or say --peer none")


def write_config(path: Path, source: Path, export: Path, process: Sequence[Any] = PROCESS) -> Path:
    """The YAML that both sides run, in data-juicer's own terms and at its best setting."""
    config = {
        "project_name": path.stem,
        "dataset_path": str(source),
        "export_path": str(export),
        "text_keys": "response",
        "np": CORES,
        "turbo": True,
        "use_cache": False,
        "open_tracer": False,
        "open_monitor": False,
        "process": list(process),
    }
    path.write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")
    return path


def model_home(assets: Path, folder: Path) -> dict[str, str]:
    """Environment in which both sides find the models in `folder`, and neither looks anywhere else."""
    for name in ASSETS:
        target = folder / ("assets" if name.endswith(".json") else "models") / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(assets / name, target)
    shutil.copyfile(assets / "lid.176.ftz", folder / "models" / "lid.176.bin")  # the name it looks for
    return {
        "DATA_JUICER_CACHE_HOME": str(folder),
        "HF_HUB_OFFLINE": "1",
        "UV_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "OMP_NUM_THREADS": "1",
    }


def run_peer(python: Path, command: str, config: Path, env: dict[str, str]) -> PeerRun:
    """Run `dj-process` or `dj-analyze` on a YAML."""
    whole = measure([str(python.parent / command), "--config", str(config)], env={**env, "PYTHONPATH": ""})
    if whole.returncode:
        raise SystemExit(f"{command} ended with {whole.returncode}:\n{whole.output[-4000:]}")
    operators = {name: (float(seconds), int(rows)) for name, seconds, rows in _DONE.findall(whole.output)}
    loading = whole.output.rindex("\n", 0, whole.output.index("Loading dataset from")) + 1
    stamps = [datetime.fromisoformat(stamp) for stamp in _STAMP.findall(whole.output[loading:])]
    return PeerRun(whole, (stamps[-1] - stamps[0]).total_seconds(), operators)


def rows_of(path: Path, columns: Sequence[str]) -> list[tuple[Any, ...]]:
    """The rows of a JSONL file, of each the given columns."""
    with open(path, encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return [tuple(row[column] for column in columns) for row in rows]
