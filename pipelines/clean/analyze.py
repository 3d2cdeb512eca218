"""Analyze: every filter's statistic over all rows, before clean and after it; no row is dropped for it."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.artifacts.shards import Attempt, Commit, Shard, Work, read_tables, run_shards
from pipelines.artifacts.workspace import Place, Workspace, to_json
from pipelines.clean.assets import checksum
from pipelines.clean.fused import measure
from pipelines.clean.passes import row_batches
from pipelines.clean.plan import Step
from pipelines.clean.stage import plan_of
from pipelines.clean.statistics import Floats, describe_numbers, describe_strings
from pipelines.recipe.schema import Recipe

VERSION = 2


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The filters with their parameters and versions, and the content of their models and of a person's own files."""
    assert recipe.clean
    steps = filters_of(recipe)
    return {
        "steps": [[s.operator.name, s.operator.version, s.parameters, s.text_key, s.if_missing] for s in steps],
        "intervals": [asdict(s.filled_in["interval"]) if "interval" in s.filled_in else None for s in steps],
        "dialect": recipe.clean.dialect,
        "models": [[checksum(path) for path in step.filled_in.get("assets", {}).values()] for step in steps],
        "custom_operators": [checksum(path) for path in recipe.clean.custom_operators],
    }


def filters_of(recipe: Recipe) -> list[Step]:
    """The operators that have statistics."""
    assert recipe.clean
    return [step for step in plan_of(recipe.clean).steps if step.operator.kind == "filter"]


def analyze(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Describe the statistics of the rows that clean will read."""
    (source,) = place.inputs.values()
    return describe(recipe, place, source, {})


def describe(recipe: Recipe, place: Place, source: Place, edges: dict[str, list[float]]) -> dict[str, Any]:
    """The report on the rows of `source`; `edges` are those of histograms that it shall be comparable with."""
    assert recipe.clean and recipe.analyze
    steps = filters_of(recipe)
    shards = [{"index": index, "path": path} for index, path in enumerate(source.outputs("rows"))]
    commits = run_shards(
        place,
        "stats",
        lambda: shards,
        _work(place.workspace, steps),
        concurrency=recipe.analyze.concurrency,
        title=place.stage,
    )
    rows = sum(commit["result"]["rows"] for commit in commits)
    statistics = list(_statistics(place, steps, commits, rows, edges))
    cuts = [sum(counts) for counts in zip(*(commit["result"]["cuts"] for commit in commits), strict=True)]
    return {
        "summary": f"{len(statistics)} statistics of {rows} rows",
        "digest": hashlib.sha256(to_json(statistics)).hexdigest()[:32],
        "rows": rows,
        "statistics": statistics,
        "filters": [
            {"operator": step.operator.name, "bounds": _bounds(step), "cuts": cut}
            for step, cut in zip(steps, cuts, strict=True)
        ],
    }


def _work(workspace: Workspace, steps: Sequence[Step]) -> Work:
    """Measure the rows of a shard; counts what each filter alone would drop."""

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        rows, cuts = 0, np.zeros(len(steps), dtype=np.int64)
        names: list[list[str]] = []
        tables = row_batches(workspace, shard["path"])
        measured = measure(steps, next(tables))
        with attempt.writer("stats", measured.stats.schema) as writer:
            while True:
                writer.write_table(measured.stats)
                rows, cuts, names = rows + measured.stats.num_rows, cuts + measured.cuts, measured.names
                if (table := next(tables, None)) is None:
                    break
                measured = measure(steps, table)
        return {"rows": rows, "cuts": cuts.tolist(), "names": names}

    return work


def _statistics(
    place: Place, steps: Sequence[Step], commits: list[Commit], rows: int, edges: dict[str, list[float]]
) -> Iterator[dict[str, Any]]:
    paths = [commit["files"]["stats"] for commit in commits]
    with place.workspace.parquet_file(paths[0]) as file:
        schema = file.schema_arrow
    for step, names in zip(steps, commits[0]["result"]["names"], strict=True):
        for name in names:
            if pa.types.is_string(schema.field(name).type):
                told = describe_strings(part[name].to_pylist() for part in read_tables(place.workspace, paths, [name]))
            else:
                told = describe_numbers(partial(_values, place.workspace, paths, name), rows, edges.get(name))
            yield {"name": name, "operator": step.operator.name, "bounds": _bounds(step), **told}


def _values(workspace: Workspace, paths: list[str], name: str) -> Iterator[Floats]:
    for table in read_tables(workspace, paths, [name]):
        yield table[name].to_numpy()


def _bounds(step: Step) -> dict[str, float]:
    """The limits that the recipe sets; those that no value can pass are left out."""
    return {
        name: value
        for name, value in step.parameters.items()
        if name.startswith(("min_", "max_")) and abs(value) < np.iinfo(np.int64).max
    }
