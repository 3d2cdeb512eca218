"""Does all of it work on this card, and how fast beside what one would use instead?

    python -m benchmarks.gpu [--folder runs/gpu] [--dry] [--only PART ...] [--peer-python PYTHON]

Twelve minutes at most on one card, without network once everything is installed (`make install-gpu`). Every part runs
in a process of its own, three minutes at most (six in a dry run, where three share the cores), and its result is in
FOLDER/results.json as soon as there is one: a run that is killed goes on with the next part, and what was at work then
stands there as interrupted. Delete the file, or name parts with --only, to run them again. `--dry` runs every part on a
CPU with a model of 0.2 M parameters, to test the parts themselves. The table at the end says what each part found; the
last line is one JSON object.

Exits 3 where there is no CUDA device and --dry was not asked for, 1 where a part failed.
"""

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.machine import has_cuda
from benchmarks.gpu.parts import PARTS, run_part, seconds_of
from benchmarks.gpu.setting import Setting
from pipelines.report.page import environment
from rayjobs.cluster import Cluster

NO_DEVICE = 3
LANES = 3
"""Parts of a dry run that go on at a time: speed says nothing there, and one or two leave cores idle."""
LONGEST = ("endpoint", "batch")
"""Parts that a dry run begins with, so that nothing waits for them at its end."""
_WRITING = threading.Lock()


def main() -> int:
    """Run the parts that have no result yet, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="for models, runs and results.json")
    parser.add_argument("--dry", action="store_true", help="on a CPU with a tiny model: checks the parts themselves")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=[], help="these parts, also if they are done")
    parser.add_argument("--peer-python", default=None, help="Python with torch, transformers, peft, trl and liger")
    options = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", "0")  # as those that run beside ours
    paths = filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")])
    if options.dry:
        os.environ.update(DS_ACCELERATOR="cpu", OMP_WAIT_POLICY="PASSIVE")  # waiting threads leave the cores to others
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), PYTHONSAFEPATH="1")  # what parts start finds this package
    setting = Setting(options.folder.resolve(), options.dry, options.peer_python)
    if not options.dry and not has_cuda():
        print("PyTorch sees no CUDA device here; --dry checks the parts on a CPU", file=sys.stderr)
        return NO_DEVICE
    setting.folder.mkdir(parents=True, exist_ok=True)
    results = _read(setting)
    wanted = options.only or [name for name in PARTS if name not in results]
    if options.dry:
        wanted.sort(key=lambda name: name not in LONGEST)
    with _ray_of_all() if setting.dry else nullcontext(), ThreadPoolExecutor(LANES if setting.dry else 1) as pool:
        list(pool.map(partial(_do, setting, results), wanted))
    _print(results)
    print(json.dumps({"name": "gpu", "dry": setting.dry, "parts": results, "environment": environment().model_dump()}))
    return 1 if any(result["state"] == "failed" for result in results.values()) else 0


@contextmanager
def _ray_of_all() -> Iterator[None]:
    """One Ray for the parts of a dry run; on a card each starts its own, since a part that is stopped may harm it."""
    with Cluster() as cluster:
        cluster.connect()
        import ray  # slow to import, and not needed where there is no device

        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        yield


def _read(setting: Setting) -> dict[str, Any]:
    """The results that are there; a part that was at work when the run was killed counts as interrupted."""
    if not setting.results.is_file():
        return {}
    results: dict[str, Any] = json.loads(setting.results.read_text(encoding="utf-8"))
    for result in results.values():
        if result["state"] == "running":
            result["state"] = "interrupted"
    return results


def _keep(setting: Setting, results: dict[str, Any], name: str, result: dict[str, Any]) -> None:
    """Write a part's result down at once."""
    with _WRITING:
        results[name] = result
        beside = setting.results.with_suffix(".tmp")
        beside.write_text(json.dumps(results, indent=1, ensure_ascii=False), encoding="utf-8")
        os.replace(beside, setting.results)


def _do(setting: Setting, results: dict[str, Any], name: str) -> None:
    """Run one part in a process of its own, and keep what it found, or why it found nothing."""
    _keep(setting, results, name, {"state": "running"})
    print(f"{name}: {PARTS[name].title} …", file=sys.stderr, flush=True)
    began = time.monotonic()
    ended = run_part(setting, name)
    seconds = round(time.monotonic() - began, 1)
    if ended.figures is not None:
        state = "skipped" if "missing" in ended.figures else "done"
        _keep(setting, results, name, {"state": state, "seconds": seconds, "figures": ended.figures})
    else:
        why = f"stopped after {seconds_of(setting):.0f} s" if ended.code is None else f"exit code {ended.code}"
        failed = {"state": "failed", "seconds": seconds, "figures": {"why": why}, "output": ended.output[-4000:]}
        _keep(setting, results, name, failed)
    print(f"{name}: {results[name]['state']} in {seconds} s", file=sys.stderr, flush=True)


def _print(results: dict[str, Any]) -> None:
    table = Table("part", "state", "seconds", "found", box=None, pad_edge=False)
    for name, part in PARTS.items():
        if (result := results.get(name)) is None:
            continue
        told = ", ".join(f"{key} {_shown(value)}" for key, value in result.get("figures", {}).items())
        table.add_row(part.title, result["state"], str(result.get("seconds", "")), told)
    Console(width=160, highlight=False).print(table)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return "(" + ", ".join(f"{key} {_shown(inner)}" for key, inner in value.items()) + ")"
    if isinstance(value, list):
        return "; ".join(map(_shown, value))
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


if __name__ == "__main__":
    sys.exit(main())
