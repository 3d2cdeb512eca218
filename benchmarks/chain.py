"""The whole chain, stage by stage: seconds, CPU seconds and peak memory of each.

    python -m benchmarks.chain [--quick] [--recipe tiny] [--workspace FOLDER]

Each stage runs as a command of its own, so that its memory is its own; starting Ray and, for the last two, vLLM is
part of it. There is no peer: no single tool covers the chain. The last line is one JSON object.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.measure import Measured, measure
from pipelines.recipe.load import load_recipe
from pipelines.report.page import environment
from rayjobs.pipeline import stages_of

QUICK = ["train.max_steps=4", "train.eval_rows=8", "evaluate.limit=4", "compare.queries=2"]


def main() -> int:
    """Measure every stage and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="tiny")
    parser.add_argument("--workspace", default=None)
    parser.add_argument(
        "--quick", action="store_true", help="few steps and questions: checks the benchmark, not the speed"
    )
    parser.add_argument("--peer", choices=["none"], default="none")
    options = parser.parse_args()
    overrides = QUICK if options.quick else []
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        workspace = options.workspace or temporary
        results = {stage: _measure(options.recipe, stage, workspace, overrides) for stage in _stages(options.recipe)}
    _print(results)
    summary = {
        "name": "chain",
        "ours": round(sum(result.seconds for result in results.values()), 1),
        "peer": None,
        "unit": "s",
        "ratio": None,
        "equal": None,
        "runs": {
            stage: {
                "seconds": round(result.seconds, 1),
                "cpu_seconds": round(result.cpu_seconds, 1),
                "peak_mib": result.peak_bytes >> 20,
            }
            for stage, result in results.items()
        },
        "environment": environment().model_dump(),
    }
    print(json.dumps(summary, ensure_ascii=False))
    return 0


def _stages(recipe: str) -> list[str]:
    return [stage.name for stage in stages_of(load_recipe(recipe))]


def _measure(recipe: str, stage: str, workspace: str, overrides: list[str]) -> Measured:
    danlu = str(Path(sys.executable).parent / "danlu")
    print(f"{stage} …", file=sys.stderr, flush=True)
    result = measure([danlu, stage, recipe, "--workspace", workspace, *overrides])
    if result.returncode:
        raise SystemExit(f"{stage} ended with {result.returncode}:\n{result.output}")
    return result


def _print(results: dict[str, Measured]) -> None:
    table = Table("stage", "seconds", "CPU seconds", "peak MiB", box=None)
    for stage, result in results.items():
        table.add_row(stage, f"{result.seconds:.1f}", f"{result.cpu_seconds:.1f}", str(result.peak_bytes >> 20))
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
