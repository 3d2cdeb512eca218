"""Refine: the second cleaning, of what a model answered.

Each row is judged by the rules in their order; the first defect it has and that is not mended names the reason it is
dropped for. Then answers that repeat an earlier one, in the same cell or anywhere in the grid, are dropped.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.errors import DataError
from pipelines.recipe import Recipe
from pipelines.records import DROPPED, RowDigest
from pipelines.shards import Attempt, Commit, Shard, read_tables, run_shards
from pipelines.synthesize.refine_section import Refine
from pipelines.synthesize.rules import FIXES, RULES, Asked
from pipelines.synthesize.section import Style
from pipelines.synthesize.similar import near_duplicates
from pipelines.workspace import Place, Workspace

VERSION = 1
SHOWN = 3
"""Examples of each defect that the report shows."""


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section, and what the grid demands of its answers."""
    assert recipe.refine
    styles = {name: style.model_dump(mode="json") for name, style in _styles(recipe).items()}
    return {"section": recipe.refine.model_dump(mode="json"), "styles": styles, "dimensions": _dimensions(recipe)}


def refine(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Judge every answer of the stage before, then drop repetitions; DataError for rows that have no cell."""
    section = recipe.refine
    assert section
    (source,) = place.inputs.values()
    shards = [{"index": number, "path": path} for number, path in enumerate(source.outputs("rows"))]
    judge = _judge(place.workspace, section, _styles(recipe), _dimensions(recipe))
    judged = run_shards(place, "judged", lambda: shards, judge, concurrency=None, title="refine: rules")
    began = time.monotonic()
    repeats = _repeats(place.workspace, judged, section.near_duplicates)
    seconds = time.monotonic() - began
    unique = [{"index": c["index"], "path": c["files"]["rows"]} for c in judged]
    commits = run_shards(
        place, "rows", lambda: unique, _without(place.workspace, repeats), concurrency=None, title="refine: repetitions"
    )
    return _report(place, judged, commits, seconds)


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
            examples += [[name, row["row_id"], row["response"], text] for name in changes]
            if reason is None:
                kept.append({**row, "response": text})
                continue
            dropped.append(_dropped(row, reason, row["response"]))
            examples.append([reason, row["row_id"], row["response"], None])
        _write(attempt, kept, schema, dropped)
        counts = Counter(row["operator"] for row in dropped)
        shown = [example for name in rules for example in [e for e in examples if e[0] == name][:SHOWN]]
        return {"rows": len(rows), "dropped": dict(counts), "mended": dict(mended), "examples": shown, "rules": rules}

    return work


_ANY = Style(template="")
"""The demands on rows without a style."""


def _dropped(row: Mapping[str, Any], operator: str, text: str, reason: str = "") -> dict[str, Any]:
    place = {"row_id": row["row_id"], "pos": row["pos"], "stage": "refine", "operator": operator}
    return {**place, "reason": reason or operator, "text": text}


def _write(attempt: Attempt, kept: list[dict[str, Any]], schema: pa.Schema, dropped: list[dict[str, Any]]) -> RowDigest:
    table = pa.Table.from_pylist(kept, schema=schema)
    with attempt.writer("rows", schema) as writer:
        writer.write_table(table)
    with attempt.writer("dropped", DROPPED) as writer:
        writer.write_table(pa.Table.from_pylist(dropped, schema=DROPPED))
    digest = RowDigest()
    digest.update(table)
    return digest


def _repeats(workspace: Workspace, judged: list[Commit], threshold: float | None) -> dict[int, str]:
    """Positions of answers that repeat an earlier one, with the name of the row they repeat."""
    if threshold is None:
        return {}
    paths = [commit["files"]["rows"] for commit in judged]
    columns = ["pos", "row_id", "response"]
    tables = [table for table in read_tables(workspace, paths, columns) if table.num_rows]
    rows = pa.concat_tables(tables).sort_by("pos").to_pydict() if tables else {"pos": [], "row_id": [], "response": []}
    repeats = near_duplicates(rows["response"], threshold)
    return {rows["pos"][number]: rows["row_id"][earlier] for number, earlier in repeats.items()}


def _without(workspace: Workspace, repeats: dict[int, str]) -> Callable[[Shard, Attempt], dict[str, Any]]:
    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        with workspace.parquet_file(shard["path"]) as file:
            schema = file.schema_arrow
        table = pa.concat_tables([schema.empty_table(), *read_tables(workspace, [shard["path"]])])
        repeated = pc.is_in(table["pos"], value_set=pa.array(list(repeats), pa.int64()))
        dropped = [
            _dropped(row, "near_duplicate", row["response"], f"repeats {repeats[row['pos']]}")
            for row in table.filter(repeated).to_pylist()
        ]
        digest = _write(attempt, table.filter(pc.invert(repeated)).to_pylist(), schema, dropped)
        return {"rows": digest.rows, "digest": digest.hexdigest(), "dropped": len(dropped)}

    return work


def _report(place: Place, judged: list[Commit], commits: list[Commit], seconds: float) -> dict[str, Any]:
    digest = RowDigest()
    for commit in commits:
        digest.add(commit["result"]["digest"], commit["result"]["rows"])
    dropped, mended = Counter[str](), Counter[str]()
    for commit in judged:
        dropped.update(commit["result"]["dropped"])
        mended.update(commit["result"]["mended"])
    rows = sum(commit["result"]["rows"] for commit in judged)
    operators = []
    for name in judged[0]["result"]["rules"]:
        left = rows - dropped[name]
        operators.append({"operator": name, "rows_in": rows, "rows_out": left, "changed": mended[name]})
        rows = left
    operators.append({"operator": "near_duplicate", "rows_in": rows, "rows_out": digest.rows, "changed": 0})
    reasons = [f"{o['operator']} {o['rows_in'] - o['rows_out']}" for o in operators if o["rows_in"] != o["rows_out"]]
    return {
        "summary": f"{digest.rows} of {operators[0]['rows_in']} rows kept"
        + (f"; {', '.join(reasons)}" if reasons else ""),
        "digest": digest.hexdigest(),
        "rows": digest.rows,
        "operators": operators,
        "examples": _examples(judged),
        "seconds_for_repetitions": seconds,
        "outputs": {
            "rows": place.relative(commit["files"]["rows"] for commit in commits),
            "dropped": place.relative(commit["files"]["dropped"] for commit in [*judged, *commits]),
        },
    }


def _examples(judged: list[Commit]) -> dict[str, list[dict[str, Any]]]:
    """A few answers per defect, before and, where it was mended, after."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for commit in judged:
        for name, row_id, before, after in commit["result"]["examples"]:
            if len(shown.setdefault(name, [])) < SHOWN:
                shown[name].append({"row_id": row_id, "before": before, "after": after})
    return shown
