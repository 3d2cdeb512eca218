"""A grid of millions that is nearly done, taken up again: seconds to the first request, and memory of each process.

    python -m benchmarks.resume [--millions 1 2 10] [--folder FOLDER]

Of so many million cells one in ten thousand has no answer, evenly spread. The ledger is made once and kept in the
folder, where one is given. Measured are the seconds from the command to the first request that reaches the server,
the CPU seconds of all its processes until then, the largest proportional set size of any process, and that of all
together. The run is stopped then. What a further million costs is the difference between two sizes. The last line is
one JSON object.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import yaml

from benchmarks.measure import proportional_set_size
from benchmarks.synthesize import answering_server, log_of
from pipelines.artifacts.workspace import Workspace
from pipelines.llm.ledger import LedgerRecord, LedgerWriter, RecordKind
from pipelines.recipe.schema import Recipe
from pipelines.report.page import environment
from pipelines.synthesize.grid import Grid
from pipelines.synthesize.stage import grid_of

PROJECT = Path(__file__).parents[1]
GAP = 10_000
"""One cell in so many has no answer."""
CHUNK = 100_000
LIMIT_SECONDS, LIMIT_BYTES, BYTES_PER_MILLION = 90.0, 2e9, 30e6
PAYLOAD = json.dumps(
    {"cell": {"name": "人"}, "sample": 0, "query": "祝", "text": "愿你平安喜乐！" * 4, "attempts": 1, "seconds": 1.0},
    ensure_ascii=False,
).encode()


def recipe(url: str, millions: int) -> Recipe:
    """A grid of three dimensions of a hundred values, and as many samples as there are millions of cells."""
    words = {name: [f"{name}{number}" for number in range(100)] for name in ("name", "scene", "place")}
    section = {
        "model": "gpt-4",
        "endpoints": [{"base_url": url}],
        "dimensions": words,
        "styles": {"正常": {"template": "写一句祝福，送给{name}，在{place}，祝的是{scene}，不超过二十个字。"}},
        "queries": ["祝{name}{scene}"],
        "samples_per_cell": millions,
    }
    return Recipe.model_validate({"name": "bench", "synthesize": section})


def fill(grid: Grid, workspace: Workspace) -> None:
    """File an answer to all cells but one in `GAP`."""
    writer = LedgerWriter(workspace)
    for start in range(0, grid.size, CHUNK):
        positions, keys = grid.keys(start, min(start + CHUNK, grid.size))
        filed = np.asarray(keys)[positions % GAP != GAP // 2]
        writer.append(LedgerRecord(key.tobytes(), RecordKind.ANSWER, PAYLOAD, 40, 30) for key in filed)
    writer.close()


@contextmanager
def running(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """The command, in a session of its own that ends with this context."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=PROJECT, start_new_session=True, stdout=output, stderr=output)
        try:
            yield process
            if process.poll() is not None:
                output.seek(0)
                raise SystemExit(output.read().decode()[-3000:])
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGTERM)
                process.wait()


def usage_of(pid: int) -> tuple[dict[str, int], dict[int, float]]:
    """Of a process and its descendants the proportional set sizes, by name, and the CPU seconds, by number."""
    sizes, seconds = dict[str, int](), dict[int, float]()
    try:
        for process in [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]:
            sizes[f"{process.name()} {process.pid}"] = proportional_set_size(process.pid)
            times = process.cpu_times()
            seconds[process.pid] = times.user + times.system
    except (psutil.NoSuchProcess, FileNotFoundError, ProcessLookupError, PermissionError):
        pass
    return sizes, seconds


def take_up(millions: int, folder: Path) -> dict[str, Any]:
    """Make the ledger where it is not there, and measure until the first request."""
    folder.mkdir(parents=True, exist_ok=True)
    with answering_server() as server:
        what = recipe(f"{server}/v1", millions)
        path, workspace = folder / f"{millions}.yaml", folder / f"w{millions}"
        path.write_text(
            yaml.safe_dump(what.model_dump(mode="json", exclude_defaults=True), allow_unicode=True), "utf-8"
        )
        if not (workspace / "made").exists():
            print(f"filing {millions} million answers …", file=sys.stderr, flush=True)
            assert what.synthesize
            fill(grid_of(what.synthesize, what.seed), Workspace(str(workspace)))
            (workspace / "made").touch()
        print(f"{millions} million …", file=sys.stderr, flush=True)
        danlu = str(Path(sys.executable).parent / "danlu")
        began, largest, whole, cpu = time.time(), dict[str, int](), 0, dict[int, float]()
        with running([danlu, "synthesize", str(path), "--workspace", str(workspace)]) as process:
            while process.poll() is None and not log_of(server):
                sizes, spent = usage_of(process.pid)
                cpu |= spent
                whole = max(whole, sum(sizes.values()))
                largest = {name: max(size, largest.get(name, 0)) for name, size in (largest | sizes).items()}
                time.sleep(0.2)
        seconds = min(at for at, _, _ in log_of(server)) - began
    return {
        "millions": millions,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(sum(cpu.values()), 1),
        "largest_process_mb": round(max(largest.values()) / 1e6),
        "all_processes_mb": round(whole / 1e6),
        "processes": {name: round(size / 1e6) for name, size in sorted(largest.items(), key=lambda item: -item[1])[:5]},
    }


def main() -> int:
    """Measure each size, print a line for each, and one for programs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=int, nargs="+", default=[1, 2, 10])
    parser.add_argument("--folder", type=Path, help="where ledgers are kept from one run to the next")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as made:
        runs = [take_up(millions, options.folder or Path(made)) for millions in options.millions]
    for run in runs:
        print(
            f"{run['millions']} million: {run['seconds']} s of {LIMIT_SECONDS:g} to the first request, largest process "
            f"{run['largest_process_mb']} MB, all {run['all_processes_mb']} of {LIMIT_BYTES / 1e6:g} MB"
        )
    first, further = runs[0], []
    for run in runs[1:]:
        more = run["millions"] - first["millions"]
        names = {"seconds_per_million": "seconds", "cpu_seconds_per_million": "cpu_seconds"}
        names |= {"mb_per_million": "largest_process_mb"}
        cost = {name: round((run[of] - first[of]) / more, 2) for name, of in names.items()}
        further.append({"millions": run["millions"], **cost})
    for cost in further:
        print(
            f"from {first['millions']} to {cost['millions']} million, for each: {cost['seconds_per_million']} s, "
            f"{cost['cpu_seconds_per_million']} s of CPU, {cost['mb_per_million']} of {BYTES_PER_MILLION / 1e6:g} MB"
        )
    print(json.dumps({"name": "resume", "runs": runs, "further": further, "environment": environment().model_dump()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
