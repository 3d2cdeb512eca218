"""Refine: the second cleaning, of what a model answered.

Each row is held to the rules in their order; the first defect it has and that is not mended names the reason it is
dropped for. Then answers that repeat an earlier one, in the same cell or anywhere in the grid, are dropped, then those
that a judge model scores too low, and last what a person deleted.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.reports.rows import RowFiles, RowsReport
from pipelines.artifacts.reports.synthesize import Coverage, RefineExample, RefineOperator, RefineReport
from pipelines.artifacts.rows import DROPPED, RowDigest, with_same_messages
from pipelines.artifacts.shards import Attempt, Commit, Shard, read_tables, run_shards
from pipelines.artifacts.stage import Inputs, Output, Stage
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import DataError, Problem, StageError, nearest
from pipelines.llm.dispatch import missing_keys
from pipelines.recipe.llm import NOT_IN_FINGERPRINT
from pipelines.recipe.refine import Refine, RefineJudge
from pipelines.recipe.synthesize import Style, Synthesize
from pipelines.refine.judge import SECTION_KEY, judge_rows
from pipelines.refine.rules import FIXES, RULES, Expected
from pipelines.similarity.minhash import first_alike, pair_hashes
from pipelines.similarity.on_ray import find_alike
from pipelines.sources.manual_edits import Line, digest_of, read_edited, require_known_columns, with_edits

MAX_DRAWN_VALUES = 60
"""Dimensions of more values than this are left out of the drawn coverage."""
MAX_EXAMPLES = 3
"""Examples of each defect that the report shows."""
MANUAL_EDITS = "by_hand"
"""What a person's changes are called in dropped rows and reports."""
ROWS_AT_A_TIME = 4096
ANSWER_KEYS = pa.schema([("pos", pa.int64()), ("row_id", pa.string()), ("pairs", pa.large_list(pa.uint32()))])
"""What near-duplicates are found by: the character pairs of each answer."""


@dataclass(frozen=True)
class Demands:
    """What answers should look like by style, and the values that their cells may have by dimension."""

    styles: dict[str, Style]
    dimensions: dict[str, list[str]]


def demands_of(section: Refine, synthesize: Synthesize | None) -> Demands:
    """The demands of the grid that the rows were synthesized from, or the section's own for rows from elsewhere."""
    if synthesize is not None:
        return Demands(dict(synthesize.styles), dict(synthesize.dimensions))
    styles = {name: demands.as_style() for name, demands in section.styles.items()}
    return Demands(styles, dict(section.dimensions))


def check_refine(section: Refine) -> list[Problem]:
    """What is wrong with a section beyond its schema: rules that do not exist."""
    unknown = [f"no rule {name!r}; {nearest(name, RULES)}" for name in section.rules if name not in RULES]
    return [Problem("refine.rules", "; ".join(unknown))] if unknown else []


@dataclass(frozen=True)
class RefineInputs(Inputs):
    """What the stage reads."""

    rows: Output[RowsReport]


@dataclass(frozen=True)
class RefineStage(Stage[RefineInputs, RefineReport]):
    """The second cleaning, of what a model answered."""

    section: Refine
    demands: Demands

    name: ClassVar[str] = "refine"
    version: ClassVar[int] = 6

    @property
    def reports(self) -> type[RefineReport]:
        """The class of its report."""
        return RefineReport

    def fingerprint_inputs(self) -> dict[str, Any]:
        """The section, what the edited file holds, and what the grid demands of its answers."""
        section: dict[str, Any] = self.section.model_dump(mode="json", exclude={"judge": set(NOT_IN_FINGERPRINT)})
        section["edited"] = digest_of("refine.edited", self.section.edited) if self.section.edited else None
        styles = {name: style.model_dump(mode="json") for name, style in self.demands.styles.items()}
        return {"section": section, "styles": styles, "dimensions": self.demands.dimensions}

    def preflight(self) -> list[Problem]:
        """The keys of the judge's endpoints that are not set."""
        return missing_keys(self.section.judge, SECTION_KEY) if self.section.judge else []

    def run(self, place: Place, inputs: RefineInputs) -> RefineReport:
        """Hold every answer to the rules, then drop repetitions, and what judge and person leave out.

        DataError for rows that have no cell, and for an edited file that does not fit; StageError where the judge is
        stopped.
        """
        workspace = place.workspace
        paths = inputs.rows.paths(inputs.rows.report.outputs.rows)
        shards = [{"index": number, "path": path} for number, path in enumerate(paths)]
        work = _rules_work(workspace, self.section, self.demands)
        # The pass is called "judged" in workspaces made before, so that a run that was killed is continued.
        checked = run_shards(place, "judged", lambda: shards, work, concurrency=None, title="refine: rules")
        began = time.monotonic()
        decisions = _decide(workspace, self.section, checked)
        seconds = time.monotonic() - began
        left = [{"index": c["index"], "path": c["files"]["rows"]} for c in checked]
        work = _decisions_work(workspace, decisions, self.demands)
        commits = run_shards(place, "rows", lambda: left, work, concurrency=None, title="refine: what is left")
        return _report(place, checked, commits, decisions, self.demands, seconds)


def cell_of(row: Mapping[str, Any], demands: Demands) -> dict[str, str]:
    """A row's cell: its own columns, or for rows from elsewhere the longest value that its query holds.

    DataError where the query holds none of a dimension's values.
    """
    own = [*demands.dimensions, "style"]
    if all(name in row for name in own) and (demands.dimensions or row["style"] in demands.styles):
        return {name: str(row[name]) for name in own}
    query = str(row["query"])
    last = [*demands.styles][-1] if demands.styles else ""
    cell = {"style": max((name for name in demands.styles if name in query), key=len, default=last)}
    for name, values in demands.dimensions.items():
        found = [value for value in values if value in query]
        if not found:
            raise DataError(f"row {row['row_id']}: no value of refine.dimensions.{name} is in its query {query!r}")
        cell[name] = max(found, key=len)
    return cell


def apply_rules(
    text: str, expected: Expected, rules: Sequence[str], fix: Sequence[str]
) -> tuple[str, str | None, list[str]]:
    """The answer as mended, the defect it is dropped for if any, and the defects that were mended."""
    mended: list[str] = []
    text = text.strip()
    for name in rules:
        if not RULES[name](text, expected):
            continue
        if name not in fix:
            return text, name, mended
        text = FIXES[name](text).strip()
        mended.append(name)
    return text, None, mended


def _rules_work(workspace: Workspace, section: Refine, demands: Demands) -> Callable[[Shard, Attempt], dict[str, Any]]:
    """The first pass: hold each row to the rules by itself."""
    # what is mended comes first, so that lengths are those of what stays
    rules_in_order = sorted(RULES, key=lambda name: name not in section.fix)
    rules = [name for name in rules_in_order if not section.rules or name in section.rules]
    of_styles = {name for style in demands.styles.values() for name in style.rules or ()}
    pair_of = _pair_of(demands)
    reported = [name for name in rules_in_order if name in rules or name in of_styles]

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        with workspace.parquet_file(shard["path"]) as file:
            schema = file.schema_arrow
        examples: list[list[Any]] = []
        mended, counts, count = Counter[str](), Counter[str](), 0
        cells: Counter[tuple[str, str, str]] = Counter()
        with ExitStack() as files:
            rows_file, dropped_file = (files.enter_context(attempt.writer(*kind)) for kind in _kinds(schema))
            keys_file = None
            if section.near_duplicates is not None:
                keys_file = files.enter_context(attempt.writer("keys", ANSWER_KEYS))
            for rows in _in_parts(workspace, shard["path"]):
                kept, dropped = [], []
                for row in rows:
                    cell = cell_of(row, demands)
                    style = demands.styles.get(cell["style"], _ANY)
                    expected = Expected(cell, style, demands.dimensions, section.aliases)
                    names = rules if style.rules is None else [name for name in rules_in_order if name in style.rules]
                    text, reason, changes = apply_rules(row["response"], expected, names, section.fix)
                    mended.update(changes)
                    examples += [[name, row["row_id"], row["response"], text, ""] for name in changes]
                    cells[*pair_of(cell), reason or ""] += 1
                    if reason is None:
                        kept.append(with_same_messages({**row, "response": text}, row))
                        continue
                    dropped.append(_dropped(row, reason, reason))
                    examples.append([reason, row["row_id"], row["response"], None, ""])
                rows_file.write_table(pa.Table.from_pylist(kept, schema=schema))
                dropped_file.write_table(pa.Table.from_pylist(dropped, schema=DROPPED))
                if keys_file is not None:
                    keys_file.write_table(_keys_of(kept))
                counts.update(row["operator"] for row in dropped)
                examples, count = _first_of_each(examples), count + len(rows)
        return {
            "rows": count,
            "dropped": dict(counts),
            "mended": dict(mended),
            "examples": examples,
            "rules": reported,
            "cells": [[*where, count] for where, count in cells.items()],
        }

    return work


_ANY = Style(template="")
"""The demands on rows without a style."""


def _dropped(row: Mapping[str, Any], operator: str, reason: str) -> dict[str, Any]:
    place = {"row_id": row["row_id"], "pos": row["pos"], "stage": "refine", "operator": operator}
    return {**place, "reason": reason, "text": row["response"]}


def _first_of_each(examples: list[list[Any]]) -> list[list[Any]]:
    """A few examples of each operator."""
    seen: Counter[str] = Counter()
    shown = []
    for example in examples:
        seen[example[0]] += 1
        if seen[example[0]] <= MAX_EXAMPLES:
            shown.append(example)
    return shown


def _in_parts(workspace: Workspace, path: str) -> Iterator[list[dict[str, Any]]]:
    """The rows of a file, so many at a time that a task needs little memory."""
    for table in read_tables(workspace, [path]):
        for start in range(0, table.num_rows, ROWS_AT_A_TIME):
            yield table.slice(start, ROWS_AT_A_TIME).to_pylist()


def _kinds(schema: pa.Schema) -> tuple[tuple[str, pa.Schema], ...]:
    """What each pass writes: the rows that are left, and those that are dropped."""
    return ("rows", schema), ("dropped", DROPPED)


def _keys_of(kept: list[dict[str, Any]]) -> pa.Table:
    pairs, starts = pair_hashes([row["response"] for row in kept])
    columns = [pa.array([row[name] for row in kept], ANSWER_KEYS.field(name).type) for name in ("pos", "row_id")]
    columns.append(pa.LargeListArray.from_arrays(pa.array(starts), pa.array(pairs)))
    return pa.table(columns, schema=ANSWER_KEYS)


@dataclass
class _Decisions:
    """What is decided over all rows: by position, the operator and the reason of a drop; by name, what was edited."""

    operators: list[str]
    dropped: dict[int, tuple[str, str]]
    edits: dict[str, Line]
    unjudged: Counter[str]


def _decide(workspace: Workspace, section: Refine, checked: list[Commit]) -> _Decisions:
    decisions = _Decisions(["near_duplicate"], {}, {}, Counter())
    if section.near_duplicates is not None:
        _find_repeats(workspace, section.near_duplicates, checked, decisions)
    if section.judge is None and section.edited is None:
        return decisions
    paths = [commit["files"]["rows"] for commit in checked]
    columns = ["pos", "row_id", "system", "query", "response", "messages"]
    tables = [
        table.select([name for name in columns if name in table.column_names])
        for table in read_tables(workspace, paths)
    ]
    rows = sorted((row for table in tables for row in table.to_pylist()), key=lambda row: int(row["pos"]))
    if section.judge is not None:
        _judge_what_is_left(workspace, section.judge, rows, decisions)
    if section.edited is not None:
        with workspace.parquet_file(paths[0]) as file:
            columns = file.schema_arrow.names
        _read_manual_edits(section.edited, columns, rows, decisions)
    return decisions


def _find_repeats(workspace: Workspace, threshold: float, checked: list[Commit], decisions: _Decisions) -> None:
    """Drop what repeats an earlier answer; no answer is read, only their character pairs."""
    paths = [commit["files"]["keys"] for commit in checked]
    keys = pa.concat_tables([ANSWER_KEYS.empty_table(), *read_tables(workspace, paths)])
    if (np.diff(keys["pos"].to_numpy()) < 0).any():
        keys = keys.sort_by("pos")
    keys = keys.combine_chunks()
    if not keys.num_rows:
        return
    pairs = keys["pairs"].chunk(0)
    first = first_alike(pairs.values.to_numpy(), pairs.offsets.to_numpy(), threshold, find_alike)
    gone = np.flatnonzero(first != np.arange(len(first)))
    names = keys["row_id"].take(pa.array(first[gone])).to_pylist()
    for pos, name in zip(keys["pos"].to_numpy()[gone].tolist(), names, strict=True):
        decisions.dropped[pos] = "near_duplicate", f"repeats {name}"


def _judge_what_is_left(
    workspace: Workspace, section: RefineJudge, rows: list[dict[str, Any]], decisions: _Decisions
) -> None:
    decisions.operators.append("judge")
    left = [row for row in rows if row["pos"] not in decisions.dropped]
    for pos, judgement in judge_rows(workspace, section, left).items():
        if judgement.score is None:
            decisions.unjudged[judgement.reason] += 1
        elif judgement.score < section.min_score:
            decisions.dropped[pos] = "judge", f"score {judgement.score:g}: {judgement.reason}"


def _read_manual_edits(path: str, columns: list[str], rows: list[dict[str, Any]], decisions: _Decisions) -> None:
    """Take back what a person changed in the rows that are left: by the file's lines, and its gaps."""
    decisions.operators.append(MANUAL_EDITS)
    left = [row for row in rows if row["pos"] not in decisions.dropped]
    known = {row["row_id"] for row in left}
    dropped = {row["row_id"] for row in rows} - known
    edits = read_edited("refine.edited", path, needs_kept=False)
    require_known_columns("refine.edited", edits, columns, statistics=None)  # clean's exports have them too
    for row_id, line in edits.items():
        if row_id not in known and (row_id not in dropped or line.get("kept", True)):
            raise DataError(
                f"refine.edited {path}: no row {row_id} is left by the rules before; delete the line, or export again"
            )
        decisions.edits[row_id] = line
    lists_changes = any("kept" in line for line in edits.values())
    for row in left:
        if row["row_id"] not in edits and not lists_changes:
            decisions.dropped[row["pos"]] = MANUAL_EDITS, f"not in {path}"
        elif not edits.get(row["row_id"], {}).get("kept", True):
            decisions.dropped[row["pos"]] = MANUAL_EDITS, f"kept is false in {path}"


def _drawn_axes(demands: Demands) -> dict[str, list[str]]:
    """The two dimensions, style among them, with the most values that can still be drawn; fewer if there are not."""
    axes = {**demands.dimensions, "style": list(demands.styles)}
    drawn = {name: values for name, values in axes.items() if 1 < len(values) <= MAX_DRAWN_VALUES}
    largest = sorted(drawn, key=lambda name: -len(drawn[name]))[:2]
    return {name: drawn[name] for name in drawn if name in largest}


def _pair_of(demands: Demands) -> Callable[[Mapping[str, str]], tuple[str, str]]:
    """A cell's values of those two dimensions, empty where there are not two."""
    names = list(_drawn_axes(demands))
    return lambda cell: (cell[names[0]], cell[names[1]]) if len(names) == 2 else ("", "")


def _coverage(checked: list[Commit], commits: list[Commit], demands: Demands) -> Coverage | None:
    axes = _drawn_axes(demands)
    if len(axes) < 2:
        return None
    (down, rows), (across, columns) = axes.items()
    places = {(row, column): (y, x) for y, row in enumerate(rows) for x, column in enumerate(columns)}
    came, kept = ([[0] * len(columns) for _ in rows] for _ in range(2))
    dropped: list[list[dict[str, int]]] = [[{} for _ in columns] for _ in rows]
    for number, commit in enumerate([*checked, *commits]):
        for row, column, operator, count in commit["result"]["cells"]:
            if (row, column) not in places:
                continue  # rows from elsewhere may hold values that the recipe does not list
            y, x = places[row, column]
            came[y][x] += count if number < len(checked) else 0
            kept[y][x] += count if number >= len(checked) and not operator else 0
            if operator:
                dropped[y][x][operator] = dropped[y][x].get(operator, 0) + count
    return Coverage(dimensions=[down, across], rows=rows, columns=columns, came=came, kept=kept, dropped=dropped)


def _decisions_work(
    workspace: Workspace, decisions: _Decisions, demands: Demands
) -> Callable[[Shard, Attempt], dict[str, Any]]:
    """The second pass: carry out what was decided over all rows."""
    import ray

    pair_of = _pair_of(demands)
    gone = pa.table(
        {
            "pos": pa.array(list(decisions.dropped), pa.int64()),
            "operator": pa.array([operator for operator, _ in decisions.dropped.values()], pa.string()),
            "reason": pa.array([reason for _, reason in decisions.dropped.values()], pa.string()),
        }
    )
    shared, edited = ray.put(gone.sort_by("pos")), decisions.edits  # once for all shards

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        decided: pa.Table = ray.get(shared)
        with workspace.parquet_file(shard["path"]) as file:
            schema = file.schema_arrow
        editable = [name for name in schema.names if name not in ("row_id", "pos", "kept")]
        digest, counts, examples, changes = RowDigest(), Counter[str](), list[list[Any]](), 0
        cells: Counter[tuple[str, str, str]] = Counter()
        with ExitStack() as files:
            rows_file, dropped_file = (files.enter_context(attempt.writer(*kind)) for kind in _kinds(schema))
            for rows in _in_parts(workspace, shard["path"]):
                kept, dropped = [], []
                goes = pc.index_in(decided["pos"], pa.array([row["pos"] for row in rows], pa.int64()))
                mine = {row["pos"]: row for row in decided.filter(pc.is_valid(goes)).to_pylist()}
                for row in rows:
                    why = mine.get(row["pos"], {"operator": ""})
                    cells[*pair_of(cell_of(row, demands)), why["operator"]] += 1
                    if why["operator"]:
                        dropped.append(_dropped(row, why["operator"], why["reason"]))
                        examples.append([why["operator"], row["row_id"], row["response"], None, why["reason"]])
                        continue
                    line = edited.get(row["row_id"], {})
                    changed = with_edits("refine.edited", row, line, schema, editable)
                    if changed is not row:
                        changes += 1
                        examples.append([MANUAL_EDITS, row["row_id"], row["response"], changed["response"], ""])
                    kept.append(changed)
                table = pa.Table.from_pylist(kept, schema=schema)
                rows_file.write_table(table)
                digest.update(table)
                dropped_file.write_table(pa.Table.from_pylist(dropped, schema=DROPPED))
                counts.update(row["operator"] for row in dropped)
                examples = _first_of_each(examples)
        return {
            "rows": digest.rows,
            "digest": digest.hexdigest(),
            "dropped": dict(counts),
            "edited": changes,
            "cells": [[*where, count] for where, count in cells.items()],
            "examples": examples,
        }

    return work


def _report(
    place: Place,
    checked: list[Commit],
    commits: list[Commit],
    decisions: _Decisions,
    demands: Demands,
    seconds: float,
) -> RefineReport:
    digest = RowDigest()
    dropped, mended = Counter[str](), Counter[str]()
    for commit in checked:
        dropped.update(commit["result"]["dropped"])
        mended.update(commit["result"]["mended"])
    for commit in commits:
        digest.add(commit["result"]["digest"], commit["result"]["rows"])
        dropped.update(commit["result"]["dropped"])
        mended[MANUAL_EDITS] += commit["result"]["edited"]
    before = rows = sum(commit["result"]["rows"] for commit in checked)
    operators = []
    for name in [*checked[0]["result"]["rules"], *decisions.operators]:
        left = rows - dropped[name]
        operators.append(RefineOperator(operator=name, rows_in=rows, rows_out=left, changed=mended[name]))
        rows = left
    reasons = [f"{o.operator} {o.rows_in - o.rows_out}" for o in operators if o.rows_in != o.rows_out]
    examples = _examples([*checked, *commits])
    if before and not digest.rows:
        first = [shown[0] for shown in examples.values() if shown[0].after is None][-1]
        why = f", {first.why}" if first.why else ""
        raise StageError(
            f"refine: all {before} rows are dropped ({', '.join(reasons)}); see refine.rules, and what the styles "
            f"allow. One of them is {first.row_id}{why}: {first.before[:80]}"
        )
    if decisions.unjudged:
        reasons.append(f"kept without a judgement {decisions.unjudged.total()}")
    return RefineReport(
        summary=f"{digest.rows} of {before} rows kept" + (f"; {', '.join(reasons)}" if reasons else ""),
        digest=digest.hexdigest(),
        rows=digest.rows,
        operators=operators,
        unjudged=dict(decisions.unjudged),
        examples=examples,
        coverage=_coverage(checked, commits, demands),
        seconds_for_verdicts=seconds,
        outputs=RowFiles(
            rows=place.relative(commit["files"]["rows"] for commit in commits),
            dropped=place.relative(commit["files"]["dropped"] for commit in [*checked, *commits]),
        ),
    )


def _examples(commits: list[Commit]) -> dict[str, list[RefineExample]]:
    """A few answers per defect, before and, where it was mended, after."""
    shown: dict[str, list[RefineExample]] = {}
    for commit in commits:
        for name, row_id, before, after, why in commit["result"]["examples"]:
            if len(shown.setdefault(name, [])) < MAX_EXAMPLES:
                shown[name].append(RefineExample(row_id=row_id, before=before, after=after, why=why))
    return shown
