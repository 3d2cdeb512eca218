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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.artifacts.rows import RowDigest
from pipelines.artifacts.shards import Commit, Shard, Work, read_tables, run_shards
from pipelines.artifacts.workspace import Place, to_json
from pipelines.clean.assets import checksum
from pipelines.clean.dataset_ops import decide
from pipelines.clean.fused import SAMPLES, Tally
from pipelines.clean.manual_edits import edit_shards, edit_work
from pipelines.clean.passes import SORTED_ROWS, bucket_work, keys_work, rows_work, sort_work
from pipelines.clean.plan import Phase, Plan, build_plan
from pipelines.errors import InputError
from pipelines.recipe.clean import Clean
from pipelines.recipe.schema import Recipe
from pipelines.similarity.hamming import Indices, Signatures, forest, units
from pipelines.sources.manual_edits import read_edited

VERSION = 3
ALONE = 2_000_000
"""Signatures up to which near-duplicates are found in this process: it takes less time than to start workers."""


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section without what only changes speed, the operators' versions, and the content of their models and of a
    person's own operators."""
    assert recipe.clean
    steps = plan_of(recipe.clean).steps
    edited = recipe.clean.edited
    if edited and not os.path.isfile(edited):
        raise InputError(f"clean.edited {edited}: no such file")
    return {
        "section": recipe.clean.model_dump(exclude={"concurrency", "assets", "custom_operators", "edited"}),
        **({"edited": checksum(edited)} if edited else {}),
        "custom_operators": [checksum(path) for path in recipe.clean.custom_operators],
        "versions": [[step.operator.name, step.operator.version] for step in steps],
        "models": [[checksum(path) for path in step.filled_in.get("assets", {}).values()] for step in steps],
    }


def clean(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Clean the rows of the stage before; the report counts the rows into and out of every operator."""
    section = recipe.clean
    assert section
    plan = plan_of(section)
    (source,) = place.inputs.values()
    passes: list[list[Commit]] = []

    def run(name: str, shards: Callable[[], Sequence[Shard]], work: Work) -> list[Commit]:
        passes.append(run_shards(place, name, shards, work, concurrency=section.concurrency, title=f"clean {name}"))
        return passes[-1]

    paths = source.outputs("rows")
    shards = partial(_shards, paths)
    phases = _closed(plan)
    for number, phase in enumerate(phases):
        final = phase is phases[-1] and not phase.whole
        if number == 0 and _only_keys(phase):
            commits = run("rows-0", shards, keys_work(place.workspace, phase, plan.text_key))
        else:
            commits = run(f"rows-{number}", shards, rows_work(place.workspace, phase, plan.text_key, final))
            paths = _paths([commits], "rows")
        if phase.whole:
            shards = partial(_decided, place, number, plan, phase, commits, paths)
        if _reorders(plan, phase):
            if sum(commit["result"]["rows"] for commit in commits) > SORTED_ROWS:
                buckets = run(f"buckets-{number}", shards, bucket_work(place.workspace, plan.text_key))
                shards = partial(_bucket_shards, buckets)
            else:
                shards = partial(_one_shard, shards)
            sorted_rows = run(f"sorted-{number}", shards, sort_work(place.workspace, plan.text_key))
            shards = partial(_shards, [commit["files"]["rows"] for commit in sorted_rows])
    if section.edited:
        edits = read_edited("clean.edited", section.edited, needs_kept=True)
        reordered = any(_reorders(plan, phase) for phase in plan.phases)
        shards = partial(edit_shards, place, _paths(passes[-1:], "rows"), edits, at_the_end=reordered)
        run("edited", shards, edit_work(place.workspace, edits, plan.text_key))
    return _report(place, plan, passes)


def plan_of(section: Clean) -> Plan:
    """The checked plan of a recipe's section."""
    return build_plan(section.process, section.dialect, section.text_keys, section.assets, section.custom_operators)


def _reorders(plan: Plan, phase: Phase) -> bool:
    return plan.dialect == "data_juicer" and any(step.operator.kind == "selector" for step in phase.whole)


def _only_keys(phase: Phase) -> bool:
    """Whether the phase itself neither changes nor drops a row."""
    return not phase.rows and not any("drop" in (step.if_missing, step.if_error) for step in phase.whole)


def _closed(plan: Plan) -> list[Phase]:
    """The phases, and an empty one where the last decisions are still to be carried out."""
    last = plan.phases[-1]
    return [*plan.phases, Phase((), ())] if last.whole and not _reorders(plan, last) else list(plan.phases)


def _shards(paths: list[str]) -> list[Shard]:
    return [{"index": index, "path": path} for index, path in enumerate(paths)]


def _bucket_shards(commits: list[Commit]) -> list[Shard]:
    """One shard for each range of new positions, with the files that hold rows of it."""
    files: dict[str, list[str]] = {}
    for commit in commits:
        for kind, path in commit["files"].items():
            if kind.startswith("bucket-"):
                files.setdefault(kind, []).append(path)
    parts = [[{"path": path} for path in files[kind]] for kind in sorted(files)]
    return [{"index": index, "parts": given} for index, given in enumerate(parts)]


def _one_shard(decided: Callable[[], Sequence[Shard]]) -> list[Shard]:
    """One shard of all rows, which brings them into their new order by itself."""
    return [{"index": 0, "parts": [*decided()]}]


def _decided(
    place: Place, number: int, plan: Plan, phase: Phase, commits: list[Commit], paths: list[str]
) -> list[Shard]:
    """Decide over the whole data set, and leave each shard its part; returns the shards of the next pass.

    `paths` are the rows that the keys of `commits` belong to, shard by shard.
    """
    tables = [pa.concat_tables(read_tables(place.workspace, [commit["files"]["keys"]])) for commit in commits]
    keys = pa.concat_tables(tables)
    shard = np.repeat(np.arange(len(tables)), [table.num_rows for table in tables])
    order = np.argsort(keys["pos"].to_numpy(), kind="stable")
    decisions = decide(phase.whole, keys.take(pa.array(order)), _reorders(plan, phase), find_near)
    owner = shard[order][decisions.listed]
    rows = decisions.rows.take(pa.array(np.argsort(owner, kind="stable")))
    ends = np.cumsum(np.bincount(owner, minlength=len(commits))).tolist()
    shards = []
    for index, (begin, end) in enumerate(pairwise([0, *ends])):
        path = _decided_path(place, number, f"{index:05d}.parquet")
        _write_table(place, path, rows.slice(begin, end - begin))
        shards.append({"index": index, "path": paths[index], "decisions": path})
    _write_table(place, _decided_path(place, number, "clusters.parquet"), decisions.clusters)
    tallies = [asdict(tally) for tally in decisions.tallies]
    place.workspace.write(_decided_path(place, number, "tallies.json"), to_json(tallies))
    return shards


def _decided_path(place: Place, number: int, name: str) -> str:
    return place.path(f"decided-{number}", name)


def _write_table(place: Place, path: str, table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    place.workspace.write(path, sink.getvalue().to_pybytes())


def find_near(signatures: Signatures, hamming_distance: int) -> Iterator[tuple[Indices, Indices]]:
    """The forests of near signatures, from as many Ray tasks as there are CPUs; few are found right here."""
    import ray

    work = units(len(signatures), hamming_distance)
    if len(signatures) <= ALONE or not ray.is_initialized():
        yield forest(signatures, work, hamming_distance)
        return
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = min(len(work), max(1, int(resources.get("CPU", 1))))
    shared = ray.put(signatures)
    task = ray.remote(num_cpus=1)(forest)
    pending = [task.remote(shared, work[part::workers], hamming_distance) for part in range(workers)]
    while pending:
        ready, pending = ray.wait(pending)
        yield from ray.get(ready)


def _report(place: Place, plan: Plan, passes: list[list[Commit]]) -> dict[str, Any]:
    digest = RowDigest()
    for commit in passes[-1]:
        digest.add(commit["result"]["digest"], commit["result"]["rows"])
    tallies = _tallies(place, plan, passes)
    rows_in = sum(commit["result"]["rows_in"] for commit in passes[0])
    by_hand = _by_hand(passes)
    told = "; by hand: " + ", ".join(f"{by_hand[what]} {what}" for what in sorted(by_hand)) if by_hand else ""
    return {
        "summary": f"{digest.rows} of {rows_in} rows stay{told}",
        "by_hand": by_hand,
        "digest": digest.hexdigest(),
        "rows": digest.rows,
        "rows_in": rows_in,
        "dialect": plan.dialect,
        "operators": [asdict(tally) for tally in tallies],
        "samples": _samples(passes),
        "outputs": {"rows": _files(place, passes[-1:], "rows"), "dropped": _files(place, passes, "dropped")},
        "statistics": _files(place, passes, "stats"),
        "clusters": place.relative(
            _decided_path(place, number, "clusters.parquet") for number, phase in enumerate(plan.phases) if phase.whole
        ),
    }


def _files(place: Place, passes: list[list[Commit]], kind: str) -> list[str]:
    return place.relative(_paths(passes, kind))


def _paths(passes: list[list[Commit]], kind: str) -> list[str]:
    return [c["files"][kind] for commits in passes for c in commits if kind in c["files"]]


def _by_hand(passes: list[list[Commit]]) -> Counter[str]:
    """What a person changed, summed over the shards; empty where nobody edited."""
    return sum((Counter(commit["result"].get("by_hand", {})) for commit in passes[-1]), Counter())


def _samples(passes: list[list[Commit]]) -> list[dict[str, Any]]:
    """The first few changed rows of each mapper."""
    seen: dict[int, list[dict[str, Any]]] = {}
    for commits in passes:
        for commit in commits:
            for sample in commit["result"].get("samples", []):
                seen.setdefault(sample["index"], []).append(sample)
    return [sample for index in sorted(seen) for sample in seen[index][:SAMPLES]]


def _tallies(place: Place, plan: Plan, passes: list[list[Commit]]) -> list[Tally]:
    """Each operator's counts over all shards and over the decisions."""
    totals = {step.index: Tally(step.index, step.operator.name, step.operator.kind, 0, 0) for step in plan.steps}
    parts = [tally for commits in passes for commit in commits for tally in commit["result"].get("tallies", [])]
    for number, phase in enumerate(plan.phases):
        if phase.whole:
            parts += place.workspace.read_json(_decided_path(place, number, "tallies.json"))
    for part in parts:
        totals[part["index"]] += Tally(**part)
    return list(totals.values())
