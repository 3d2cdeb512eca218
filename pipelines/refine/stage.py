"""Refine: the second cleaning, of what a model answered.

Each row is held to the rules in their order; the first defect it has and that is not mended names the reason it is
dropped for. Then answers that repeat an earlier one, in the same cell or anywhere in the grid, are dropped, then those
that a judge model scores too low, and last what a person deleted by hand.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.artifacts.rows import DROPPED, RowDigest, with_same_messages
from pipelines.artifacts.shards import Attempt, Commit, Shard, read_tables, run_shards
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import DataError
from pipelines.recipe.llm import UNPAID
from pipelines.recipe.refine import Judge, Refine
from pipelines.recipe.schema import Recipe
from pipelines.recipe.synthesize import Style
from pipelines.refine.rules import FIXES, RULES, Asked
from pipelines.similarity.minhash import near_duplicates
from pipelines.sources.manual_edits import Line, digest_of, read_edited, with_edits

VERSION = 3
SHOWN = 3
"""Examples of each defect that the report shows."""
EDITABLE = ("system", "query", "response", "messages")
"""Columns that a person may change."""


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section, and what the grid demands of its answers."""
    assert recipe.refine
    section = recipe.refine
    styles = {name: style.model_dump(mode="json") for name, style in _styles(recipe).items()}
    told: dict[str, Any] = section.model_dump(mode="json", exclude={"judge": set(UNPAID)})
    told["edited"] = digest_of("refine.edited", section.edited) if section.edited else None
    return {"section": told, "styles": styles, "dimensions": _dimensions(recipe)}


def preflight(recipe: Recipe) -> None:
    """RecipeError naming the keys of the judge's endpoints that are not set."""
    assert recipe.refine
    if recipe.refine.judge:
        from pipelines.llm.dispatch import read_keys  # asking is an extra
        from pipelines.refine.judge import SECTION_KEY

        read_keys(recipe.refine.judge, SECTION_KEY)


def refine(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Hold every answer of the stage before to the rules, then drop repetitions, and what judge and person leave out.

    DataError for rows that have no cell, and for an edited file that does not fit; StageError where the judge is
    stopped.
    """
    section = recipe.refine
    assert section
    (source,) = place.inputs.values()
    shards = [{"index": number, "path": path} for number, path in enumerate(source.outputs("rows"))]
    judge = _judge(place.workspace, section, _styles(recipe), _dimensions(recipe))
    judged = run_shards(place, "judged", lambda: shards, judge, concurrency=None, title="refine: rules")
    began = time.monotonic()
    verdicts = _verdicts(place.workspace, section, judged)
    seconds = time.monotonic() - began
    left = [{"index": c["index"], "path": c["files"]["rows"]} for c in judged]
    work = _apply(place.workspace, verdicts)
    commits = run_shards(place, "rows", lambda: left, work, concurrency=None, title="refine: what is left")
    return _report(place, judged, commits, verdicts, seconds)


def _styles(recipe: Recipe) -> dict[str, Style]:
    if recipe.synthesize:
        return dict(recipe.synthesize.styles)
    assert recipe.refine
    return {name: demands.as_style() for name, demands in recipe.refine.styles.items()}


def _dimensions(recipe: Recipe) -> dict[str, list[str]]:
    if recipe.synthesize:
        return dict(recipe.synthesize.dimensions)
    assert recipe.refine
    return dict(recipe.refine.dimensions)


def cell_of(row: Mapping[str, Any], dimensions: Mapping[str, list[str]], styles: Mapping[str, Style]) -> dict[str, str]:
    """A row's cell: its own columns, or for rows from elsewhere the longest value that its query holds.

    DataError where the query holds none of a dimension's values.
    """
    if "style" in row:
        return {name: str(row[name]) for name in [*dimensions, "style"]}
    query = str(row["query"])
    style = max((name for name in styles if name in query), key=len, default=([*styles] or [""])[-1])
    cell = {"style": style}
    for name, values in dimensions.items():
        found = [value for value in values if value in query]
        if not found:
            raise DataError(f"row {row['row_id']}: no value of refine.dimensions.{name} is in its query {query!r}")
        cell[name] = max(found, key=len)
    return cell


def judge_text(text: str, asked: Asked, rules: Sequence[str], fix: Sequence[str]) -> tuple[str, str | None, list[str]]:
    """The answer as mended, the defect it is dropped for if any, and the defects that were mended."""
    mended: list[str] = []
    text = text.strip()
    for name in rules:
        if not RULES[name](text, asked):
            continue
        if name not in fix:
            return text, name, mended
        text = FIXES[name](text).strip()
        mended.append(name)
    return text, None, mended


def _judge(
    workspace: Workspace, section: Refine, styles: dict[str, Style], dimensions: dict[str, list[str]]
) -> Callable[[Shard, Attempt], dict[str, Any]]:
    rules = [name for name in RULES if not section.rules or name in section.rules]
    rules.sort(key=lambda name: name not in section.fix)  # mend first, so that lengths are those of what stays

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        with workspace.parquet_file(shard["path"]) as file:
            schema = file.schema_arrow
        rows = [row for table in read_tables(workspace, [shard["path"]]) for row in table.to_pylist()]
        kept, dropped, examples = [], [], []
        mended: Counter[str] = Counter()
        for row in rows:
            cell = cell_of(row, dimensions, styles)
            asked = Asked(cell, styles.get(cell["style"], _ANY), dimensions, section.aliases)
            text, reason, changes = judge_text(row["response"], asked, rules, section.fix)
            mended.update(changes)
            examples += [[name, row["row_id"], row["response"], text, ""] for name in changes]
            if reason is None:
                kept.append(with_same_messages({**row, "response": text}, row))
                continue
            dropped.append(_dropped(row, reason, reason))
            examples.append([reason, row["row_id"], row["response"], None, ""])
        _write(attempt, kept, schema, dropped)
        counts = Counter(row["operator"] for row in dropped)
        shown = _first_of_each(examples)
        return {"rows": len(rows), "dropped": dict(counts), "mended": dict(mended), "examples": shown, "rules": rules}

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
        if seen[example[0]] <= SHOWN:
            shown.append(example)
    return shown


def _write(attempt: Attempt, kept: list[dict[str, Any]], schema: pa.Schema, dropped: list[dict[str, Any]]) -> RowDigest:
    table = pa.Table.from_pylist(kept, schema=schema)
    with attempt.writer("rows", schema) as writer:
        writer.write_table(table)
    with attempt.writer("dropped", DROPPED) as writer:
        writer.write_table(pa.Table.from_pylist(dropped, schema=DROPPED))
    digest = RowDigest()
    digest.update(table)
    return digest


@dataclass
class _Verdicts:
    """What is decided over all rows: by position, the operator and the reason of a drop; by name, what was edited."""

    operators: list[str]
    dropped: dict[int, tuple[str, str]]
    edits: dict[str, Line]
    unjudged: Counter[str]


def _verdicts(workspace: Workspace, section: Refine, judged: list[Commit]) -> _Verdicts:
    paths = [commit["files"]["rows"] for commit in judged]
    columns = ["pos", "row_id", "system", "query", "response", "messages"]
    tables = [
        table.select([name for name in columns if name in table.column_names])
        for table in read_tables(workspace, paths)
    ]
    rows = sorted((row for table in tables for row in table.to_pylist()), key=lambda row: int(row["pos"]))
    found = _Verdicts(["near_duplicate"], {}, {}, Counter())
    if section.near_duplicates is not None:
        repeats = near_duplicates([row["response"] for row in rows], section.near_duplicates)
        for number, earlier in repeats.items():
            found.dropped[rows[number]["pos"]] = "near_duplicate", f"repeats {rows[earlier]['row_id']}"
    if section.judge is not None:
        found.operators.append("judge")
        _judge_what_is_left(workspace, section.judge, rows, found)
    if section.edited is not None:
        _by_hand(section.edited, rows, found)
    return found


def _by_hand(path: str, rows: list[dict[str, Any]], found: _Verdicts) -> None:
    """Take back what a person changed in the rows that are left: by the file's lines, and its gaps."""
    found.operators.append("by_hand")
    left = [row for row in rows if row["pos"] not in found.dropped]
    known = {row["row_id"] for row in left}
    edits = read_edited("refine.edited", path, needs_kept=False)
    for row_id, line in edits.items():
        if row_id not in known and line.get("kept", True):
            raise DataError(
                f"refine.edited {path}: no row {row_id} is left by the rules before; delete the line, or export again"
            )
    found.edits = {row_id: {name: line[name] for name in EDITABLE if name in line} for row_id, line in edits.items()}
    lists_changes = any("kept" in line for line in edits.values())
    for row in left:
        if row["row_id"] not in edits and not lists_changes:
            found.dropped[row["pos"]] = "by_hand", f"not in {path}"
        elif not edits.get(row["row_id"], {}).get("kept", True):
            found.dropped[row["pos"]] = "by_hand", f"kept is false in {path}"


def _judge_what_is_left(workspace: Workspace, section: Judge, rows: list[dict[str, Any]], found: _Verdicts) -> None:
    from pipelines.refine.judge import judge_rows  # asking is an extra

    left = [row for row in rows if row["pos"] not in found.dropped]
    for pos, judgement in judge_rows(workspace, section, left).items():
        if judgement.score is None:
            found.unjudged[judgement.reason] += 1
        elif judgement.score < section.min_score:
            found.dropped[pos] = "judge", f"score {judgement.score:g}: {judgement.reason}"


def _apply(workspace: Workspace, verdicts: _Verdicts) -> Callable[[Shard, Attempt], dict[str, Any]]:
    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        with workspace.parquet_file(shard["path"]) as file:
            schema = file.schema_arrow
        kept, dropped, edits = [], [], []
        for row in (row for table in read_tables(workspace, [shard["path"]]) for row in table.to_pylist()):
            if row["pos"] in verdicts.dropped:
                dropped.append(_dropped(row, *verdicts.dropped[row["pos"]]))
                continue
            line = verdicts.edits.get(row["row_id"], {})
            changed = with_edits("refine.edited", row, line, schema, [name for name in EDITABLE if name in row])
            if changed is not row:
                edits.append(["by_hand", row["row_id"], row["response"], changed["response"], ""])
            kept.append(changed)
        digest = _write(attempt, kept, schema, dropped)
        counts = Counter(row["operator"] for row in dropped)
        shown = [[d["operator"], d["row_id"], d["text"], None, d["reason"]] for d in dropped]
        return {
            "rows": digest.rows,
            "digest": digest.hexdigest(),
            "dropped": dict(counts),
            "edited": len(edits),
            "examples": _first_of_each([*shown, *edits]),
        }

    return work


def _report(
    place: Place, judged: list[Commit], commits: list[Commit], verdicts: _Verdicts, seconds: float
) -> dict[str, Any]:
    digest = RowDigest()
    dropped, mended = Counter[str](), Counter[str]()
    for commit in judged:
        dropped.update(commit["result"]["dropped"])
        mended.update(commit["result"]["mended"])
    for commit in commits:
        digest.add(commit["result"]["digest"], commit["result"]["rows"])
        dropped.update(commit["result"]["dropped"])
        mended["by_hand"] += commit["result"]["edited"]
    rows = sum(commit["result"]["rows"] for commit in judged)
    operators = []
    for name in [*judged[0]["result"]["rules"], *verdicts.operators]:
        left = rows - dropped[name]
        operators.append({"operator": name, "rows_in": rows, "rows_out": left, "changed": mended[name]})
        rows = left
    reasons = [f"{o['operator']} {o['rows_in'] - o['rows_out']}" for o in operators if o["rows_in"] != o["rows_out"]]
    if verdicts.unjudged:
        reasons.append(f"kept without a judgement {verdicts.unjudged.total()}")
    return {
        "summary": f"{digest.rows} of {operators[0]['rows_in']} rows kept"
        + (f"; {', '.join(reasons)}" if reasons else ""),
        "digest": digest.hexdigest(),
        "rows": digest.rows,
        "operators": operators,
        "unjudged": dict(verdicts.unjudged),
        "examples": _examples([*judged, *commits]),
        "seconds_for_verdicts": seconds,
        "outputs": {
            "rows": place.relative(commit["files"]["rows"] for commit in commits),
            "dropped": place.relative(commit["files"]["dropped"] for commit in [*judged, *commits]),
        },
    }


def _examples(commits: list[Commit]) -> dict[str, list[dict[str, Any]]]:
    """A few answers per defect, before and, where it was mended, after."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for commit in commits:
        for name, row_id, before, after, why in commit["result"]["examples"]:
            if len(shown.setdefault(name, [])) < SHOWN:
                shown[name].append({"row_id": row_id, "before": before, "after": after, "why": why})
    return shown
