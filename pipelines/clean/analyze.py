"""Analyze: every filter's statistic over all rows, before clean and after it; no row is dropped for it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, ClassVar, TypeVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipelines.artifacts.reports.clean import (
    AnalyzeCleanReport,
    AnalyzeReport,
    CleanReport,
    EmptyStatistic,
    FilterCut,
    NumberStatistic,
    StringStatistic,
    Threshold,
)
from pipelines.artifacts.reports.rows import RowsReport
from pipelines.artifacts.shards import Attempt, Commit, Shard, Work, read_tables, run_shards
from pipelines.artifacts.stage import Inputs, Output, Record, Stage
from pipelines.artifacts.workspace import Place, Workspace, to_json
from pipelines.clean.assets import checksum
from pipelines.clean.custom_source import source_of
from pipelines.clean.fused import measure
from pipelines.clean.passes import row_batches
from pipelines.clean.plan import Step
from pipelines.clean.stage import plan_of
from pipelines.clean.statistics import Floats, describe_numbers, describe_strings
from pipelines.clean.thresholds import Limit, limits_of, moves, near_rows, nearest_of
from pipelines.recipe.clean import Analyze, Clean

Edges = Mapping[str, list[float]]
"""The edges of histograms, by the name of their statistic."""
R = TypeVar("R", bound=AnalyzeReport)


@dataclass(frozen=True)
class AnalyzeInputs(Inputs):
    """What is analyzed: the rows that clean reads."""

    rows: Output[RowsReport]


@dataclass(frozen=True)
class AnalyzeStage(Stage[AnalyzeInputs, AnalyzeReport]):
    """The statistics before clean."""

    section: Analyze
    clean: Clean

    name: ClassVar[str] = "analyze"
    version: ClassVar[int] = 3

    @property
    def reports(self) -> type[AnalyzeReport]:
        """The class of its report."""
        return AnalyzeReport

    def fingerprint_inputs(self) -> Mapping[str, Any]:
        """The filters, and the content of the files that they need."""
        return _filters_fingerprint(self.clean)

    def run(self, place: Place, inputs: AnalyzeInputs) -> AnalyzeReport:
        """Describe the statistics of the rows that clean will read."""
        return describe(AnalyzeReport, self.section, self.clean, place, inputs.rows, edges={})


@dataclass(frozen=True)
class AnalyzeCleanInputs(Inputs):
    """What is analyzed, and what it is compared with."""

    analyze: Output[AnalyzeReport]
    clean: Output[CleanReport]


@dataclass(frozen=True)
class AnalyzeCleanStage(Stage[AnalyzeCleanInputs, AnalyzeCleanReport]):
    """The statistics after clean, to stand beside those before it."""

    section: Analyze
    clean: Clean

    name: ClassVar[str] = "analyze_clean"
    version: ClassVar[int] = 3

    @property
    def reports(self) -> type[AnalyzeCleanReport]:
        """The class of its report."""
        return AnalyzeCleanReport

    def fingerprint_inputs(self) -> Mapping[str, Any]:
        """The filters, and the content of the files that they need."""
        return _filters_fingerprint(self.clean)

    def run(self, place: Place, inputs: AnalyzeCleanInputs) -> AnalyzeCleanReport:
        """Describe the statistics of the rows that clean kept, with the histograms of `analyze`."""
        before = inputs.analyze.report.statistics
        edges = {entry.name: entry.histogram.edges for entry in before if isinstance(entry, NumberStatistic)}
        return describe(AnalyzeCleanReport, self.section, self.clean, place, inputs.clean, edges)


def _filters_fingerprint(clean: Clean) -> dict[str, Any]:
    """The filters with their parameters and versions, and the content of their models and of a person's own files."""
    steps = filters_of(clean)
    return {
        "steps": [[s.operator.name, s.operator.version, s.parameters, s.text_key, s.if_missing] for s in steps],
        "intervals": [asdict(s.filled_in["interval"]) if "interval" in s.filled_in else None for s in steps],
        "dialect": clean.dialect,
        "models": [[checksum(path) for path in step.filled_in.get("assets", {}).values()] for step in steps],
        "custom_operators": [source_of(path).digest for path in clean.custom_operators],
    }


def filters_of(clean: Clean) -> list[Step]:
    """The operators that have statistics."""
    return [step for step in plan_of(clean).steps if step.operator.kind == "filter"]


class ShardResult(Record):
    """What was measured of one shard, as its commit keeps it."""

    rows: int
    cuts: list[int]
    """How many rows each filter alone would drop."""
    names: list[list[str]]
    """The columns of each filter's statistics."""
    near: list[Threshold] = Field(default_factory=list)
    """The rows nearest to each limit."""


def describe(
    report: type[R], section: Analyze, clean: Clean, place: Place, source: Output[RowsReport], edges: Edges
) -> R:
    """The report on the rows of `source`; `edges` are those of histograms that it shall be comparable with."""
    steps = filters_of(clean)
    paths = source.paths(source.report.outputs.rows)
    commits = run_shards(
        place,
        "stats",
        lambda: [{"index": index, "path": path} for index, path in enumerate(paths)],
        _work(place.workspace, steps),
        concurrency=section.concurrency,
        title=place.stage,
    )
    results = [ShardResult.model_validate(commit["result"]) for commit in commits]
    rows = sum(result.rows for result in results)
    statistics = list(_statistics(place.workspace, steps, commits, results, edges))
    written = [entry.model_dump(mode="json", exclude_none=True) for entry in statistics]
    files = [commit["files"]["stats"] for commit in commits]
    with place.workspace.parquet_file(files[0]) as file:
        limits = _limits(steps, results[0].names, file.schema_arrow)
    spreads = {entry.name: entry.std for entry in statistics if isinstance(entry, NumberStatistic)}
    near = [nearest_of(parts) for parts in zip(*(result.near for result in results), strict=True)]
    thresholds = [
        threshold.model_copy(
            update={
                "moves": moves(
                    limit, spreads.get(limit.statistic, 0.0), _values(place.workspace, files, limit.statistic)
                )
            }
        )
        for limit, threshold in zip(limits, near, strict=True)
    ]
    cuts = [sum(counts) for counts in zip(*(result.cuts for result in results), strict=True)]
    return report(
        summary=f"{len(statistics)} statistics of {rows} rows",
        digest=hashlib.sha256(to_json(written)).hexdigest()[:32],
        rows=rows,
        statistics=statistics,
        filters=[
            FilterCut(operator=step.operator.name, bounds=_bounds(step), cuts=cut, names=names)
            for step, cut, names in zip(steps, cuts, results[0].names, strict=True)
        ],
        thresholds=thresholds,
        files=place.relative(files),
    )


def _work(workspace: Workspace, steps: Sequence[Step]) -> Work:
    """Measure the rows of a shard; counts what each filter alone would drop."""

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        rows, cuts = 0, np.zeros(len(steps), dtype=np.int64)
        names: list[list[str]] = []
        tables = row_batches(workspace, shard["path"])
        table = next(tables)
        measured = measure(steps, table)
        limits = _limits(steps, measured.names, measured.stats.schema)
        near: list[Threshold] | None = None
        with attempt.writer("stats", measured.stats.schema) as writer:
            while True:
                writer.write_table(measured.stats)
                rows, cuts, names = rows + measured.stats.num_rows, cuts + measured.cuts, measured.names
                found = near_rows(limits, steps, table, measured.stats)
                near = found if near is None else [nearest_of(parts) for parts in zip(near, found, strict=True)]
                if (further := next(tables, None)) is None:
                    break
                table, measured = further, measure(steps, further)
        return ShardResult(rows=rows, cuts=cuts.tolist(), names=names, near=near or []).model_dump(mode="json")

    return work


def _statistics(
    workspace: Workspace, steps: Sequence[Step], commits: list[Commit], results: list[ShardResult], edges: Edges
) -> Iterator[NumberStatistic | StringStatistic | EmptyStatistic]:
    paths = [commit["files"]["stats"] for commit in commits]
    rows = sum(result.rows for result in results)
    with workspace.parquet_file(paths[0]) as file:
        schema = file.schema_arrow
    for step, names in zip(steps, results[0].names, strict=True):
        operator, bounds = step.operator.name, _bounds(step)
        for name in names:
            if pa.types.is_string(schema.field(name).type):
                strings = describe_strings(part[name].to_pylist() for part in read_tables(workspace, paths, [name]))
                yield StringStatistic(name=name, operator=operator, bounds=bounds, **dict(strings))
                continue
            numbers = describe_numbers(partial(_values, workspace, paths, name), rows, edges.get(name))
            if numbers is None:
                yield EmptyStatistic(name=name, operator=operator, bounds=bounds)
            else:
                yield NumberStatistic(name=name, operator=operator, bounds=bounds, **dict(numbers))


def _limits(steps: Sequence[Step], names: list[list[str]], schema: pa.Schema) -> list[Limit]:
    """Every limit of every filter, in order."""
    pairs = enumerate(zip(steps, names, strict=True))
    return [limit for number, (step, own) in pairs for limit in limits_of(number, step, own, schema)]


def _values(workspace: Workspace, paths: list[str], name: str) -> Iterator[Floats]:
    for table in read_tables(workspace, paths, [name]):
        yield table[name].to_numpy()


def _bounds(step: Step) -> dict[str, int | float]:
    """The limits that the recipe sets; those that no value can pass are left out."""
    return {
        name: value
        for name, value in step.parameters.items()
        if name.startswith(("min_", "max_")) and abs(value) < np.iinfo(np.int64).max
    }
