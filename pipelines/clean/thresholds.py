"""What a filter's limits do: the rows just kept and just dropped, and what another limit would do.

Both come from the statistics that analyze keeps, one row for each row of the data.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.reports.clean import AnalyzeReport, Move, NearRow, Threshold
from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.stage import Output
from pipelines.clean.column import Mask
from pipelines.clean.fused import kept_name
from pipelines.clean.operators.registry import CLOSED, NO_LIMIT, Interval
from pipelines.clean.plan import Step
from pipelines.clean.statistics import Floats
from pipelines.clean.texts import read_texts
from pipelines.errors import InputError, nearest

SHOWN_ROWS, SHOWN_CHARACTERS = 10, 160
SIGMAS = (-3, -2, -1, 1, 2, 3)


@dataclass(frozen=True)
class Limit:
    """One bound of one filter, as it compares with a statistic."""

    step: int
    """The filter's place among the filters."""
    operator: str
    statistic: str
    bound: str
    value: float
    is_lower: bool
    is_closed: bool

    def keeps(self, values: Floats) -> Mask:
        """Which values are on the side that stays."""
        if self.is_lower:
            return np.asarray(values >= self.value if self.is_closed else values > self.value)
        return np.asarray(values <= self.value if self.is_closed else values < self.value)


def limits_of(number: int, step: Step, names: Sequence[str], schema: pa.Schema) -> list[Limit]:
    """The bounds of a filter that can drop rows, on the first number that it measures."""
    measured = [name for name in names if pa.types.is_floating(schema.field(name).type)]
    interval: Interval = step.filled_in.get("interval", CLOSED)
    if not measured or interval.reversed_range:
        return []
    found = []
    for bound, value in step.parameters.items():
        is_lower = bound.startswith("min_")
        if not (is_lower or bound.startswith("max_")) or not isinstance(value, int | float) or abs(value) >= NO_LIMIT:
            continue
        if is_lower and value == 0:
            continue
        closed = interval.min_closed_interval if is_lower else interval.max_closed_interval
        found.append(Limit(number, step.operator.name, measured[0], bound, float(value), is_lower, closed))
    return found


def near_rows(limits: Sequence[Limit], steps: Sequence[Step], table: pa.Table, stats: pa.Table) -> list[Threshold]:
    """The rows of a table on both sides of each limit that are nearest to it."""
    found = []
    for limit in limits:
        values = stats[limit.statistic].to_numpy()
        keeps = limit.keeps(values)
        texts = read_texts(table, steps[limit.step].text_key) or read_texts(table, "response")
        sides = {}
        for side, mask in (("kept", keeps), ("dropped", ~keeps)):
            rows = np.flatnonzero(mask & np.isfinite(values))
            rows = rows[np.argsort(np.abs(values[rows] - limit.value), kind="stable")][:SHOWN_ROWS]
            shown = texts.joined.array.take(pa.array(rows)).to_pylist() if texts else [""] * len(rows)
            names = stats["row_id"].take(pa.array(rows)).to_pylist()
            sides[side] = [
                NearRow(row_id=name, value=float(value), text=text[:SHOWN_CHARACTERS])
                for name, value, text in zip(names, values[rows], shown, strict=True)
            ]
        found.append(
            Threshold(operator=limit.operator, statistic=limit.statistic, bound=limit.bound, value=limit.value, **sides)
        )
    return found


def nearest_of(parts: Sequence[Threshold]) -> Threshold:
    """One limit's rows of all shards: the nearest of each side."""

    def chosen(side: str) -> list[NearRow]:
        rows: list[NearRow] = [row for part in parts for row in getattr(part, side)]
        return sorted(rows, key=lambda row: (abs(row.value - parts[0].value), row.row_id))[:SHOWN_ROWS]

    return parts[0].model_copy(update={"kept": chosen("kept"), "dropped": chosen("dropped")})


def moves(limit: Limit, std: float, parts: Iterator[Floats]) -> list[Move]:
    """How many rows change sides where the limit is moved by so many standard deviations."""
    if not std:
        return []
    moved = [replace(limit, value=limit.value + sigmas * std) for sigmas in SIGMAS]
    rows = [0] * len(SIGMAS)
    for values in parts:
        known = values[np.isfinite(values)]
        before = limit.keeps(known)
        rows = [count + int((other.keeps(known) != before).sum()) for count, other in zip(rows, moved, strict=True)]
    return [
        Move(sigmas=sigmas, value=other.value, rows=count)
        for sigmas, other, count in zip(SIGMAS, moved, rows, strict=True)
    ]


_CHANGE = re.compile(r"(?:process\[(?P<index>\d+)\]\.)?(?P<operator>\w+)\.(?P<parameter>\w+)=(?P<value>.+)")


def what_if(analyzed: Output[AnalyzeReport], steps: Sequence[Step], changes: Sequence[str]) -> list[str]:
    """What other limits would do, from the kept statistics: `text_length_filter.min_len=50`, in words.

    InputError where a change names no filter or limit, or nothing is kept.
    """
    report = analyzed.report
    if not report.files or len(report.filters) != len(steps):
        raise InputError("analyze kept no statistics of these filters; run danlu analyze first")
    changed = dict(_change(steps, change) for change in changes)
    paths = analyzed.paths(report.files)
    allowed = _strings_kept(analyzed, steps, changed, paths)
    alone = {number: np.zeros(2, dtype=np.int64) for number in changed}
    together = np.zeros(2, dtype=np.int64)
    rows = 0
    for table in read_tables(analyzed.folder.workspace, paths):
        kept = [table[kept_name(step)].to_numpy() for step in steps]
        after = list(kept)
        for number, parameters in changed.items():
            names = report.filters[number].names
            after[number] = _kept_after(table, steps[number], names, parameters, allowed[number])
            alone[number] += [(~kept[number]).sum(), (~after[number]).sum()]
        together += [np.all(kept, axis=0).sum(), np.all(after, axis=0).sum()]
        rows += table.num_rows
    lines = []
    for number, parameters in changed.items():
        step = steps[number]
        said = ", ".join(f"{key} {value:g}, not {step.parameters[key]:g}" for key, value in parameters.items())
        before, now = alone[number].tolist()
        lines.append(f"{step.operator.name} with {said}: alone it drops {now:,} of {rows:,} rows, not {before:,}")
    lines.append(f"all filters together leave {together[1]:,} of {rows:,} rows, not {together[0]:,}")
    return lines


def _change(steps: Sequence[Step], change: str) -> tuple[int, dict[str, float]]:
    match = _CHANGE.fullmatch(change)
    if match is None:
        raise InputError(f"--what-if {change}: is not like text_length_filter.min_len=50")
    index = match["index"]
    numbers = [
        number
        for number, step in enumerate(steps)
        if step.operator.name == match["operator"] and index in (None, str(step.index))
    ]
    if not numbers:
        names = [step.operator.name for step in steps]
        raise InputError(f"--what-if {change}: the recipe has no such filter; {nearest(match['operator'], names)}")
    if len(numbers) > 1:
        named = f"process[{steps[numbers[0]].index}].{match['operator']}"
        raise InputError(f"--what-if {change}: the recipe has it {len(numbers)} times; say which, such as {named}.…")
    step = steps[numbers[0]]
    bounds = [name for name in step.parameters if name.startswith(("min_", "max_"))]
    if match["parameter"] not in bounds:
        told = nearest(match["parameter"], bounds) if bounds else "it has none"
        raise InputError(f"--what-if {change}: {step.operator.name} has no such limit; {told}")
    try:
        value = float(match["value"])
    except ValueError:
        value = np.nan
    if np.isnan(value):
        raise InputError(f"--what-if {change}: {match['value']} is no number")
    return numbers[0], {match["parameter"]: value}


def _strings_kept(
    analyzed: Output[AnalyzeReport], steps: Sequence[Step], changed: dict[int, Any], paths: list[str]
) -> dict[int, dict[str, set[str]]]:
    """Of filters that also go by a text, such as the language: the texts that rows have which they keep."""
    found: dict[int, dict[str, set[str]]] = {number: {} for number in changed}
    for table in read_tables(analyzed.folder.workspace, paths):
        for number, strings in found.items():
            kept = table.filter(table[kept_name(steps[number])])
            for name in analyzed.report.filters[number].names:
                if pa.types.is_string(table.schema.field(name).type):
                    strings.setdefault(name, set()).update(pc.unique(kept[name]).to_pylist())
    return found


def _kept_after(
    table: pa.Table, step: Step, names: Sequence[str], parameters: dict[str, float], allowed: dict[str, set[str]]
) -> Mask:
    """Which rows a filter alone would keep with other limits."""
    kept: Mask = table[kept_name(step)].to_numpy()
    numbers = [name for name in names if pa.types.is_floating(table.schema.field(name).type)]
    if not numbers:
        raise InputError(f"--what-if: {step.operator.name} measures no number")
    values = table[numbers[0]].to_numpy()
    before, after = (_inside(step, values, {**step.parameters, **given}) for given in ({}, parameters))
    may_stay = np.ones(len(values), dtype=np.bool_)
    for name, texts in allowed.items():
        may_stay &= pc.is_in(table[name], pa.array(texts, pa.string())).to_numpy()
    return np.asarray(np.where(np.isnan(values), kept, after & (kept | (~before & may_stay))))


def _inside(step: Step, values: Floats, parameters: dict[str, Any]) -> Mask:
    low = next((value for name, value in parameters.items() if name.startswith("min_")), -np.inf)
    high = next((value for name, value in parameters.items() if name.startswith("max_")), np.inf)
    interval: Interval = step.filled_in.get("interval", CLOSED)
    return interval.keeps(values, low, high)
