"""Requests to a model: how many a second and CPU for each, beside bespokelabs-curator, against the same local server.

    python -m benchmarks.synthesize [--quick] [--peer curator|none] [--peer-python PATH] [--seconds 60] [--workers 1 4]
                                    [--grid CELLS]

The server answers after a second, as a function of the prompt; 256 requests are in flight. The rate is that of the
arrivals at the server from the third second to the last request sent, and the ideal is 256 a second. CPU is that
of the client alone, Ray and its start included. Ours is measured with one actor and with four. A bare loop of aiohttp,
which keeps nothing, shows how near to the ideal the machine lets anybody come in that hour. Then a grid of 100,000
cells, all but a thousand of them answered, is taken up again: the seconds until its first request reaches the server.
`--grid 100000` does neither: it runs so many cells from the first to the last, at a server that answers at once, and
shows how memory goes. The last line is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.measure import measure
from pipelines.artifacts.workspace import Workspace
from pipelines.llm.ledger import LedgerRecord, LedgerWriter
from pipelines.llm.requests import Outcome, OutcomeKind, record_of
from pipelines.recipe.schema import Recipe
from pipelines.report.page import environment
from pipelines.synthesize.stage import grid_of

PROJECT = Path(__file__).parents[1]
IN_FLIGHT = 256
DELAY = 1.0
WARM_UP = 3.0
"""Seconds after the first request that do not count."""
LEFT = 1000
"""Cells that are still to be asked where a run is taken up again."""


@dataclass(frozen=True)
class Run:
    """One client's run: its rate in steady state, its CPU, its memory, and whether each prompt had one answer."""

    requests_per_second: float
    cpu_ms_per_request: float
    peak_mib: int
    growth_mib: float | None
    """Memory in the last third of the steady state less that in its first third."""
    seconds: float
    requests: int
    each_once: bool


def main() -> int:
    """Measure ours and the peer in turn, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few seconds: checks the benchmark, not the speed")
    parser.add_argument("--peer", choices=["curator", "none"], default="curator")
    parser.add_argument("--peer-python", type=Path, default=PROJECT / ".peers" / "curator" / "bin" / "python")
    parser.add_argument("--seconds", type=float, default=60.0, help="of steady state")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 4], help="actors that ask, one run for each")
    parser.add_argument("--resumed", type=int, default=100_000, help="cells of the grid that is taken up again")
    parser.add_argument("--grid", type=int, help="run only a grid of so many cells, to its end")
    options = parser.parse_args()
    if options.grid:
        return _report_whole(options.grid)
    seconds = 5.0 if options.quick else options.seconds
    prompts = round(IN_FLIGHT / DELAY * (WARM_UP + seconds))
    runs = {_name(workers): _ours(prompts, workers) for workers in options.workers}
    runs["bare loop"] = _bare(prompts)
    if options.peer == "curator":
        runs["curator"] = _peer(options.peer_python, prompts)
    resumed = _resumed(4 * LEFT if options.quick else options.resumed)
    _print(runs, resumed)
    ours, peer = runs[_name(options.workers[0])], runs.get("curator")
    summary = {
        "name": "synthesize",
        "ours": round(ours.requests_per_second, 1),
        "peer": round(peer.requests_per_second, 1) if peer else None,
        "unit": f"requests/s of {IN_FLIGHT / DELAY:g}",
        "ratio": round(ours.requests_per_second / peer.requests_per_second, 3) if peer else None,
        "of_bare": round(ours.requests_per_second / runs["bare loop"].requests_per_second, 3),
        "equal": all(run.each_once for run in runs.values()),
        "runs": {name: asdict(run) for name, run in runs.items()} | {"resumed": resumed},
        "environment": environment().model_dump(),
    }
    print(json.dumps(summary, ensure_ascii=False))
    return 0


@contextmanager
def answering_server(delay: float = DELAY) -> Iterator[str]:
    """A server in a process of its own; yields its address."""
    command = [sys.executable, "-m", "benchmarks.answering_server", "--delay", str(delay)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    assert process.stdout
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline().split()[1])}"
    finally:
        process.kill()
        process.communicate()


def log_of(server: str) -> list[tuple[float, str, str]]:
    """What reached it: time of arrival, digest of the prompt, outcome."""
    with urllib.request.urlopen(f"{server}/log") as answer:
        log: list[tuple[float, str, str]] = json.load(answer)["requests"]
    return log


def _name(workers: int) -> str:
    return f"danlu, {workers} actor{'s' if workers > 1 else ''}"


def _ours(prompts: int, workers: int) -> Run:
    with answering_server() as server, tempfile.TemporaryDirectory(prefix="danlu-bench-") as folder:
        return _run(server, prompts, [*_command(server, prompts, folder), f"synthesize.workers={workers}"])


def _bare(prompts: int) -> Run:
    with answering_server() as server:
        script = [sys.executable, "-m", "benchmarks.synthesize_bare"]
        return _run(server, prompts, [*script, f"{server}/v1", str(prompts), str(IN_FLIGHT)])


def _peer(python: Path, prompts: int) -> Run:
    if not python.is_file():
        raise SystemExit(f"{python}: not there; make it with python3.11 -m venv and pip install bespokelabs-curator")
    with answering_server() as server, tempfile.TemporaryDirectory(prefix="danlu-bench-") as folder:
        script = str(Path(__file__).with_name("synthesize_curator.py"))
        return _run(server, prompts, [str(python), script, f"{server}/v1", str(prompts), str(IN_FLIGHT), folder])


def _recipe(server: str, prompts: int) -> Recipe:
    """As many cells as prompts, in two dimensions, and no more words than the peer has."""
    ends = max(count for count in range(1, 1001) if prompts % count == 0)
    names, numbers = range(prompts // ends), range(ends)
    section = {
        "model": "gpt-4",
        "endpoints": [{"base_url": f"{server}/v1", "max_in_flight": IN_FLIGHT}],
        "dimensions": {"name": [f"人{name}" for name in names], "number": [f"{number:03}" for number in numbers]},
        "styles": {"正常": {"template": "祝{name}{number}"}},
        "queries": ["祝{name}{number}"],
    }
    return Recipe.model_validate({"name": "bench", "synthesize": section})


def _command(server: str, prompts: int, folder: str) -> list[str]:
    path = Path(folder) / "bench.yaml"
    tree = _recipe(server, prompts).model_dump(mode="json", exclude_defaults=True)
    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    danlu = str(Path(sys.executable).parent / "danlu")
    return [danlu, "synthesize", str(path), "--workspace", f"{folder}/w"]


def _run(server: str, prompts: int, command: list[str]) -> Run:
    print(f"{Path(command[0]).name} …", file=sys.stderr, flush=True)
    done = measure(command, cwd=PROJECT)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.output}")
    log = [entry for entry in log_of(server) if entry[2] == "ok"]
    counts = Counter(digest for _, digest, _ in log)
    arrivals = sorted(at for at, _, _ in log)
    steady = [at for at in arrivals if at >= arrivals[0] + WARM_UP]
    return Run(
        requests_per_second=(len(steady) - 1) / (steady[-1] - steady[0]),
        cpu_ms_per_request=1000 * done.cpu_seconds / prompts,
        peak_mib=done.peak_bytes >> 20,
        growth_mib=_growth(done.samples, steady[0], steady[-1]),
        seconds=done.seconds,
        requests=len(log),
        each_once=set(counts.values()) == {1} and len(counts) >= prompts,  # the peer asks once without words
    )


def _report_whole(cells: int) -> int:
    """Run a grid to its end; print memory in ten parts of the asking, and while conversations are written after it."""
    with answering_server(0.0) as server, tempfile.TemporaryDirectory(prefix="danlu-bench-") as folder:
        done = measure(_command(server, cells, folder), cwd=PROJECT)
        if done.returncode:
            raise SystemExit(done.output)
        log = log_of(server)
    first, last = log[0][0], log[-1][0]
    parts = [
        [size for at, size in done.samples if 0 <= (at - first) / (last - first) * 10 - part < 1] for part in range(10)
    ]
    asking = [round(fmean(part) / 2**20) for part in parts if part]
    summary = {
        "name": "synthesize-grid",
        "cells": cells,
        "each_once": len(log) == len({digest for _, digest, _ in log}) == cells,
        "asking_mib": asking,
        "writing_mib": max((size for at, size in done.samples if at > last), default=0) >> 20,
        "asking_seconds": round(last - first, 1),
        "seconds": round(done.seconds, 1),
        "environment": environment().model_dump(),
    }
    Console().print(
        f"{cells} cells: {asking} MiB in tenths of the asking, {summary['writing_mib']} MiB at most after it"
    )
    print(json.dumps(summary, ensure_ascii=False))
    return 0


def _growth(samples: Sequence[tuple[float, int]], first: float, last: float) -> float | None:
    third = (last - first) / 3
    early = [size for at, size in samples if first <= at <= first + third]
    late = [size for at, size in samples if last - third <= at <= last]
    return (fmean(late) - fmean(early)) / 2**20 if early and late else None


def _resumed(cells: int) -> dict[str, Any]:
    """Take up a grid that is nearly done: seconds from the command to its first request, and its peak memory."""
    print(f"danlu, {cells} cells, {LEFT} of them left …", file=sys.stderr, flush=True)
    with answering_server() as server, tempfile.TemporaryDirectory(prefix="danlu-bench-") as folder:
        command = _command(server, cells, folder)
        _answer_all_but(LEFT, _recipe(server, cells), Workspace(f"{folder}/w"))
        began = time.time()
        done = measure(command, cwd=PROJECT)
        if done.returncode:
            raise SystemExit(f"{command} ended with {done.returncode}:\n{done.output}")
        first = min(at for at, _, _ in log_of(server))
    return {"cells": cells, "seconds_to_first_request": round(first - began, 1), "peak_mib": done.peak_bytes >> 20}


def _answer_all_but(left: int, recipe: Recipe, workspace: Workspace) -> None:
    assert recipe.synthesize
    grid = grid_of(recipe.synthesize, recipe.seed)
    writer = LedgerWriter(workspace)
    records: list[LedgerRecord] = []
    for pos in range(grid.size - left):
        request = grid.request(pos)
        records.append(record_of(request, Outcome(OutcomeKind.ANSWERED, "", "愿你平安喜乐！" * 4, 5, 30), 1, DELAY))
        if len(records) == 5000:
            writer.append(records)
            records = []
    writer.append(records)
    writer.close()


def _print(runs: dict[str, Run], resumed: dict[str, Any]) -> None:
    table = Table("client", "requests/s", "of the ideal", "CPU ms/request", "peak MiB", "growth", "each once", box=None)
    for name, run in runs.items():
        share = f"{100 * run.requests_per_second * DELAY / IN_FLIGHT:.1f} %"
        cells = [
            f"{run.requests_per_second:.1f}",
            share,
            f"{run.cpu_ms_per_request:.2f}",
            str(run.peak_mib),
            "" if run.growth_mib is None else f"{run.growth_mib:+.1f}",
        ]
        table.add_row(name, *cells, "yes" if run.each_once else "no")
    Console().print(table)
    Console().print(
        f"{resumed['cells']} cells taken up again: {resumed['seconds_to_first_request']} s to the first request, "
        f"peak {resumed['peak_mib']} MiB"
    )


if __name__ == "__main__":
    sys.exit(main())
