"""Our own side of a benchmark: a recipe in this process with Ray up and kernels cached, or as a command from cold."""

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.measure import Measured, measure
from pipelines.artifacts.stage import Output, Report, report_of
from pipelines.artifacts.workspace import Workspace
from rayjobs import pipeline
from rayjobs.cluster import Cluster

R = TypeVar("R", bound=Report)


@dataclass(frozen=True)
class Run:
    """One run up to a stage: seconds of wall time, and what each stage left."""

    seconds: float
    outputs: list[Output[Any]]

    def report(self, kind: type[R]) -> R:
        """The report of the stage that reports a `kind`."""
        found = report_of(self.outputs, kind)
        assert found
        return found


def run_warm(config: Path, folder: Path, last: str, overrides: Sequence[str] = ()) -> Run:
    """Run a recipe up to `last` twice, anew each time, and tell the second: each worker has models and kernels then."""
    recipe = pipeline.load(str(config), list(overrides))
    with Cluster("local") as cluster:
        cluster.connect()
        pipeline.run(recipe, Workspace(str(folder / "first")), cluster, last=last)
        began = time.perf_counter()
        done = pipeline.run(recipe, Workspace(str(folder / "second")), cluster, last=last)
        return Run(time.perf_counter() - began, list(done.values()))


def run_command(stage: str, recipe: Path, workspace: Path, overrides: Sequence[str] = (), env: Any = None) -> Measured:
    """Run `danlu STAGE` as a process of its own; what it did before in that workspace is taken up."""
    danlu = str(Path(sys.executable).parent / "danlu")
    print(f"{recipe.stem} {stage} …", file=sys.stderr, flush=True)
    command = [danlu, stage, str(recipe), "--workspace", str(workspace), *overrides]
    result = measure(command, env={**os.environ, **(env or {})})
    if result.returncode:
        raise SystemExit(f"{stage} ended with {result.returncode}:\n{result.output[-4000:]}")
    return result


def told(result: Measured) -> dict[str, Any]:
    """A measured command as JSON."""
    return {
        "seconds": round(result.seconds, 1),
        "cpu_seconds": round(result.cpu_seconds, 1),
        "peak_mib": result.peak_bytes >> 20,
    }
