"""Clean: operators over the rows, shard by shard and fused; operators over the whole data set in between.

rows-0      each phase of the plan is a pass over the shards: kept rows, dropped rows, statistics, and one key
            per row for the whole-data-set operators that follow; these decide on the keys alone. Where it begins
            with such operators, only keys are written
buckets-0,  only where such an operator changes the order of the rows: they are sorted by their new `pos`, through
sorted-0    buckets where there are too many for one task
rows-1      carries the decisions out, and runs the next phase
edited      only where a person has edited the rows: carries that out, last
"""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, pairwise
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.reports.clean import ChangedRow, CleanReport, EditCounts, OperatorStats
from pipelines.artifacts.reports.rows import RowFiles, RowsReport
from pipelines.artifacts.rows import RowDigest
from pipelines.artifacts.shards import Commit, Shard, Work, read_tables, run_shards
from pipelines.artifacts.stage import Inputs, Output, Stage
from pipelines.artifacts.workspace import Place, Workspace, to_json
from pipelines.clean.assets import checksum
from pipelines.clean.custom import load_operators
from pipelines.clean.custom_source import source_of
from pipelines.clean.dataset_ops import decide
from pipelines.clean.decontaminate import NO_SETS, EvaluationSets, compared, decontaminated
from pipelines.clean.fused import SAMPLES
from pipelines.clean.manual_edits import edit_shards, edit_work
from pipelines.clean.passes import (
    SORTED_ROWS,
    PassResult,
    bucket_number,
    bucket_work,
    keys_work,
    result_of,
    rows_work,
    sort_work,
)
from pipelines.clean.plan import OwnOperators, Phase, Plan, build_plan, check_process
from pipelines.errors import InputError, Problem
from pipelines.recipe.clean import Clean
from pipelines.similarity.on_ray import find_near
from pipelines.sources.manual_edits import read_edited, require_known_columns

NOT_DECIDING = ("concurrency", "assets", "custom_operators", "edited")
"""Keys of the section that change only speed, or are represented by the content of what they name."""


@dataclass(frozen=True)
class CleanInputs(Inputs):
    """What is cleaned."""

    rows: Output[RowsReport]


@dataclass(frozen=True)
class CleanStage(Stage[CleanInputs, CleanReport]):
    """The operators of the recipe's section `clean`."""

    section: Clean
    evaluation_sets: EvaluationSets = NO_SETS

    name: ClassVar[str] = "clean"
    version: ClassVar[int] = 3

    @property
    def reports(self) -> type[CleanReport]:
        """The class of its report."""
        return CleanReport

    def fingerprint_inputs(self) -> Mapping[str, Any]:
        """The section without what only changes speed, the operators' versions, and the content of their models and of
        a person's own operators."""
        section = self.section
        steps = plan_of(section).steps
        inputs: dict[str, Any] = {
            "section": section.model_dump(exclude={*NOT_DECIDING, "decontaminate"}),
            "custom_operators": [source_of(path).digest for path in section.custom_operators],
            "versions": [[step.operator.name, step.operator.version] for step in steps],
            "models": [[checksum(path) for path in step.filled_in.get("assets", {}).values()] for step in steps],
        }
        if section.decontaminate and self.evaluation_sets.places:
            inputs["evaluation_sets"] = self.evaluation_sets.fingerprint()
        if section.edited:
            if not os.path.isfile(section.edited):
                raise InputError(f"clean.edited {section.edited}: no such file")
            inputs["edited"] = checksum(section.edited)
        return inputs

    def run(self, place: Place, inputs: CleanInputs) -> CleanReport:
        """Clean the rows; the report counts those into and out of every operator."""
        return clean(self.section, place, inputs.rows.paths(inputs.rows.report.outputs.rows), self.evaluation_sets)


def check_clean(section: Clean) -> list[Problem]:
    """What is wrong with the operators and their parameters, packages and model files."""
    return check_process(section.process, section.dialect, section.assets, section.custom_operators)


def clean(
    section: Clean, place: Place, source_paths: Sequence[str], evaluation_sets: EvaluationSets = NO_SETS
) -> CleanReport:
    """Clean the rows of Parquet files, pass by pass."""
    plan = plan_of(section)
    if not section.decontaminate:
        evaluation_sets = NO_SETS
    if evaluation_sets.places:
        plan = decontaminated(plan, evaluation_sets)
    passes: list[list[Commit]] = []

    def run(name: str, shards: Callable[[], Sequence[Shard]], work: Work) -> list[Commit]:
        passes.append(run_shards(place, name, shards, work, concurrency=section.concurrency, title=f"clean {name}"))
        return passes[-1]

    paths = source_paths
    shards = partial(_shards, paths)
    phases = _closed(plan)
    for number, phase in enumerate(phases):
        final = phase is phases[-1] and not phase.dataset_ops
        if number == 0 and _only_keys(phase):
            commits = run("rows-0", shards, keys_work(place.workspace, phase, plan.text_key))
        else:
            commits = run(f"rows-{number}", shards, rows_work(place.workspace, phase, plan.text_key, final))
            paths = _paths([commits], "rows")
        if phase.dataset_ops:
            shards = partial(_decided, place, number, plan, phase, commits, paths)
        if _reorders(plan, phase):
            if sum(result_of(commit).rows for commit in commits) > SORTED_ROWS:
                buckets = run(f"buckets-{number}", shards, bucket_work(place.workspace, plan.text_key))
                shards = partial(_bucket_shards, buckets)
            else:
                shards = partial(_one_shard, shards)
            sorted_rows = run(f"sorted-{number}", shards, sort_work(place.workspace, plan.text_key))
            shards = partial(_shards, [commit["files"]["rows"] for commit in sorted_rows])
    if section.edited:
        edits = read_edited("clean.edited", section.edited, needs_kept=True)
        reordered = any(_reorders(plan, phase) for phase in plan.phases)
        cleaned = _paths(passes[-1:], "rows")
        measured = [name for commits in passes for name in _columns(place.workspace, _paths([commits], "stats"))]
        require_known_columns("clean.edited", edits, _columns(place.workspace, cleaned), measured)
        shards = partial(edit_shards, place, cleaned, source_paths, edits, at_the_end=reordered)
        run("edited", shards, edit_work(place.workspace, edits, plan.text_key))
    return _report(place, plan, passes, evaluation_sets)


def plan_of(section: Clean, own_operators: OwnOperators = load_operators) -> Plan:
    """The checked plan of a recipe's section; own operators are run for it, unless `own_operators` differs."""
    process, own = section.process, section.custom_operators
    return build_plan(process, section.dialect, section.text_keys, section.assets, own, own_operators)


def _reorders(plan: Plan, phase: Phase) -> bool:
    return plan.dialect == "data_juicer" and any(step.operator.kind == "selector" for step in phase.dataset_ops)


def _only_keys(phase: Phase) -> bool:
    """Whether the phase itself neither changes nor drops a row."""
    return not phase.row_ops and not any("drop" in (step.if_missing, step.if_error) for step in phase.dataset_ops)


def _closed(plan: Plan) -> list[Phase]:
    """The phases, and an empty one where the last decisions are still to be carried out."""
    last = plan.phases[-1]
    if last.dataset_ops and not _reorders(plan, last):
        return [*plan.phases, Phase((), ())]
    return list(plan.phases)


def _shards(paths: Sequence[str]) -> list[Shard]:
    return [{"index": index, "path": path} for index, path in enumerate(paths)]


def _bucket_shards(commits: list[Commit]) -> list[Shard]:
    """One shard for each range of new positions, with the files that hold rows of it."""
    parts: dict[int, list[Shard]] = {}
    for commit in commits:
        for kind, path in commit["files"].items():
            number = bucket_number(kind)
            if number is not None:
                parts.setdefault(number, []).append({"path": path})
    return [{"index": index, "parts": parts[number]} for index, number in enumerate(sorted(parts))]


def _one_shard(decided: Callable[[], Sequence[Shard]]) -> list[Shard]:
    """One shard of all rows, which brings them into their new order by itself."""
    return [{"index": 0, "parts": [*decided()]}]


def _decided(
    place: Place, number: int, plan: Plan, phase: Phase, commits: list[Commit], paths: Sequence[str]
) -> list[Shard]:
    """Decide over the whole data set, and leave each shard its part; returns the shards of the next pass.

    `paths` are the rows that the keys of `commits` belong to, shard by shard.
    """
    tables = [pa.concat_tables(read_tables(place.workspace, [commit["files"]["keys"]])) for commit in commits]
    keys = pa.concat_tables(tables)
    shard = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    order = np.argsort(keys["pos"].to_numpy(), kind="stable")
    decisions = decide(phase.dataset_ops, keys.take(pa.array(order)), _reorders(plan, phase), find_near)
    owner = shard[order][decisions.listed]
    rows = decisions.rows.take(pa.array(np.argsort(owner, kind="stable")))
    ends = np.cumsum(np.bincount(owner, minlength=len(commits))).tolist()
    shards = []
    for index, (begin, end) in enumerate(pairwise([0, *ends])):
        path = _decided_path(place, number, f"{index:05d}.parquet")
        _write_table(place, path, rows.slice(begin, end - begin))
        shards.append({"index": index, "path": paths[index], "decisions": path})
    _write_table(place, _decided_path(place, number, "clusters.parquet"), decisions.clusters)
    stats = [entry.model_dump(mode="json") for entry in decisions.stats]
    place.workspace.write(_stats_path(place, number), to_json(stats))
    return shards


def _decided_path(place: Place, number: int, name: str) -> str:
    return place.path(f"decided-{number}", name)


def _stats_path(place: Place, number: int) -> str:
    """Where the counts of a phase's operators over the whole data set lie."""
    return _decided_path(place, number, "tallies.json")  # as older versions wrote it, whose killed runs are continued


def _write_table(place: Place, path: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    place.workspace.write(path, sink.getvalue().to_pybytes())


def _report(place: Place, plan: Plan, passes: list[list[Commit]], sets: EvaluationSets) -> CleanReport:
    results = [[result_of(commit) for commit in commits] for commits in passes]
    digest, edits = RowDigest(), EditCounts()
    for result in results[-1]:
        assert result.digest  # the last pass makes it
        digest.add(result.digest, result.rows)
        edits += result.manual_edits
    rows_in = sum(result.rows_in for result in results[0])
    decided = [number for number, phase in enumerate(plan.phases) if phase.dataset_ops]
    operators = _operator_stats(place, plan, results)
    return CleanReport(
        summary=f"{digest.rows} of {rows_in} rows stay{_drops_in_words(operators)}{_idle_in_words(plan, operators)}"
        f"{_edits_in_words(edits)}",
        digest=digest.hexdigest(),
        rows=digest.rows,
        rows_in=rows_in,
        dialect=plan.dialect,
        manual_edits=edits,
        operators=operators,
        evaluation_sets=compared(plan, sets, operators),
        not_compared=list(sets.fetched),
        samples=_samples(results),
        outputs=RowFiles(
            rows=place.relative(_paths(passes[-1:], "rows")), dropped=place.relative(_paths(passes, "dropped"))
        ),
        statistics=place.relative(_paths(passes, "stats")),
        clusters=place.relative(_decided_path(place, number, "clusters.parquet") for number in decided),
    )


def _drops_in_words(operators: Sequence[OperatorStats]) -> str:
    """Which operators dropped the most rows, and how to see them; empty where none dropped any."""
    dropped = Counter[str]()
    for stats in operators:
        dropped[stats.operator] += stats.rows_in - stats.rows_out
    most = [f"{name} {count}" for name, count in dropped.most_common(3) if count > 0]
    rest = sum(dropped.values()) - sum(count for _, count in dropped.most_common(3))
    most += [f"others {rest}"] if rest else []
    return f"; dropped: {', '.join(most)} (danlu rows RECIPE --dropped)" if most else ""


def _idle_in_words(plan: Plan, operators: Sequence[OperatorStats]) -> str:
    """Which operators found their column in no row, so that they did nothing; empty where all found it."""
    columns = {step.index: step.column for step in plan.steps}
    idle = [f"{stats.operator} ({columns[stats.index]})" for stats in operators if 0 < stats.rows_in == stats.missing]
    return f"; no row has the column of {', '.join(idle)}, which did nothing" if idle else ""


def _edits_in_words(edits: EditCounts) -> str:
    """What a person changed, as the end of a summary; empty where nobody edited."""
    counts = [f"{count} {what}" for what, count in edits if count]
    return f"; by hand: {', '.join(counts)}" if counts else ""


def _paths(passes: list[list[Commit]], kind: str) -> list[str]:
    return [c["files"][kind] for commits in passes for c in commits if kind in c["files"]]


def _columns(workspace: Workspace, paths: Sequence[str]) -> list[str]:
    """The columns of files that all have the same ones; none where there is no file."""
    if not paths:
        return []
    with workspace.parquet_file(paths[0]) as file:
        return [str(name) for name in file.schema_arrow.names]


def _samples(results: list[list[PassResult]]) -> list[ChangedRow]:
    """The first few changed rows of each mapper."""
    seen: dict[int, list[ChangedRow]] = {}
    for result in chain.from_iterable(results):
        for sample in result.samples:
            seen.setdefault(sample.index, []).append(sample)
    return [sample for index in sorted(seen) for sample in seen[index][:SAMPLES]]


def _operator_stats(place: Place, plan: Plan, results: list[list[PassResult]]) -> list[OperatorStats]:
    """Each operator's counts over all shards and over the decisions."""
    totals = {
        step.index: OperatorStats(
            index=step.index, operator=step.operator.name, kind=step.operator.kind, rows_in=0, rows_out=0
        )
        for step in plan.steps
    }
    parts = [stats for result in chain.from_iterable(results) for stats in result.operators]
    for number, phase in enumerate(plan.phases):
        if phase.dataset_ops:
            found = place.workspace.read_json(_stats_path(place, number))
            parts += [OperatorStats.model_validate(stats) for stats in found]
    for part in parts:
        totals[part.index] += part
    return list(totals.values())
