"""Operators over the whole data set: which rows go as duplicates or below the top, and the order of the rest.

They see one key per row (a signature, a field's value), never the rows themselves.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.reports.clean import OperatorStats
from pipelines.artifacts.rows import DROPPED
from pipelines.clean.answers import checked
from pipelines.clean.column import Indices, Mask
from pipelines.clean.fused import key_names
from pipelines.clean.plan import Step
from pipelines.similarity.hamming import Finder

DECISION = pa.schema(
    [
        pa.field("pos", pa.int64(), nullable=False),
        pa.field("operator", pa.string()),  # null: the row stays
        pa.field("reason", pa.string()),
        pa.field("stats", pa.map_(pa.string(), pa.float64())),
        pa.field("new_pos", pa.int64()),  # null where the order does not change
    ]
)
"""What becomes of one row; rows that are not listed stay as they are."""

CLUSTER = pa.schema(
    [
        pa.field("row_id", pa.string(), nullable=False),
        pa.field("pos", pa.int64(), nullable=False),
        pa.field("operator", pa.string(), nullable=False),
        pa.field("cluster", pa.int64(), nullable=False),  # `pos` of the row that stays
    ]
)
"""Every row of a cluster of two or more, the one that stays included."""


@dataclass
class Decisions:
    """What operators decided over a whole data set."""

    rows: pa.Table
    """Schema `DECISION`, in the order of the keys."""
    listed: Mask
    """Which rows of the keys `rows` lists."""
    clusters: pa.Table
    """Schema `CLUSTER`."""
    stats: list[OperatorStats]


@dataclass
class _State:
    keys: pa.Table
    order: Indices
    """The rows still in, in their present order."""
    operator: npt.NDArray[Any]
    reason: npt.NDArray[Any]
    stat: npt.NDArray[Any]
    """What `value` is of a row that goes: `cluster` (the `pos` of the row that stays) or a selector's `value`."""
    value: npt.NDArray[np.float64]
    clusters: list[pa.Table]


def decide(steps: Sequence[Step], keys: pa.Table, reorder: bool, find: Finder) -> Decisions:
    """Run whole-data-set operators one after the other.

    `keys` has `row_id`, `pos` and the columns of `key_names` for each step, in data-set order. With `reorder` a
    selector's order becomes the order of the rows, as in data-juicer, and every row is listed; otherwise rows stay in
    `pos` order, and only those that go are listed.
    """
    rows = keys.num_rows
    state = _State(
        keys,
        np.arange(rows),
        np.full(rows, None, dtype=object),
        np.full(rows, None, dtype=object),
        np.full(rows, None, dtype=object),
        np.full(rows, np.nan),
        [],
    )
    stats = []
    for step in steps:
        began, rows_in = time.perf_counter(), len(state.order)
        if step.operator.kind == "deduplicator":
            _deduplicate(step, state, find)
        else:
            _select(step, state, reorder)
        stats.append(
            OperatorStats(
                index=step.index,
                operator=step.operator.name,
                kind=step.operator.kind,
                rows_in=rows_in,
                rows_out=len(state.order),
                seconds=time.perf_counter() - began,
            )
        )
    listed = np.ones(rows, dtype=np.bool_) if reorder else _gone(state)
    clusters = pa.concat_tables([CLUSTER.empty_table(), *state.clusters])
    return Decisions(_rows(state, listed, reorder), listed, clusters, stats)


def _gone(state: _State) -> Mask:
    gone = np.ones(state.keys.num_rows, dtype=np.bool_)
    gone[state.order] = False
    return gone


def _present(step: Step, state: _State) -> Mask:
    present = state.keys[key_names(step)[1]].to_numpy()
    return np.asarray(present[state.order])


def _values(step: Step, state: _State, rows: Indices) -> pa.Array:
    return state.keys[key_names(step)[0]].take(pa.array(rows)).combine_chunks()


def _deduplicate(step: Step, state: _State, find: Finder) -> None:
    assert step.operator.cluster is not None
    rows = state.order[_present(step, state)]
    keys = _values(step, state, rows)
    repeated = step.operator.cluster(keys, step.parameters, find)
    repeats = np.flatnonzero(repeated != np.arange(len(rows)))
    gone, kept = rows[repeats], rows[repeated[repeats]]
    if not len(gone):
        return
    told = step.operator.overlap
    overlaps = told(keys, step.parameters, repeats, repeated[repeats]) if told else None
    ids, pos = state.keys["row_id"], state.keys["pos"].to_numpy()
    state.operator[gone] = step.operator.name
    names = ids.take(pa.array(kept)).to_pylist()
    state.reason[gone] = [f"duplicate of row {name}" for name in names]
    if overlaps is not None:
        state.reason[gone] += [f" (overlap {overlap:.2f})" for overlap in overlaps]
    state.stat[gone] = "cluster"
    state.value[gone] = pos[kept]
    members = np.concatenate([np.unique(kept), gone])
    clusters = np.concatenate([np.unique(kept), kept])
    columns = [
        ids.take(pa.array(members)).combine_chunks(),
        pa.array(pos[members]),
        pa.array([step.operator.name] * len(members)),
        pa.array(pos[clusters]),
    ]
    state.clusters.append(pa.table(columns, schema=CLUSTER).sort_by([("cluster", "ascending"), ("pos", "ascending")]))
    state.order = state.order[~np.isin(state.order, gone)]


def _select(step: Step, state: _State, reorder: bool) -> None:
    present = _present(step, state)
    rows = state.order[present]
    values = _values(step, state, rows)
    chosen = rows[checked(step.run(values), step.operator.kind, len(values), step.key)]
    gone = rows[~np.isin(rows, chosen)]
    state.operator[gone] = step.operator.name
    left_out = state.keys[key_names(step)[0]].take(pa.array(gone)).to_pylist()
    state.reason[gone] = [f"{step.column} {value} is not among the {len(chosen)} selected" for value in left_out]
    state.stat[gone] = "value"
    state.value[gone] = [float(v) if isinstance(v, int | float) else np.nan for v in left_out]
    staying = np.concatenate([chosen, state.order[~present]])
    if not reorder:
        staying = state.order[np.isin(state.order, staying)]
    state.order = staying


def _rows(state: _State, listed: Mask, reordered: bool) -> pa.Table:
    new_pos = np.full(state.keys.num_rows, -1, dtype=np.int64)
    new_pos[state.order] = np.arange(len(state.order))
    stays = new_pos[listed] >= 0
    columns = [
        state.keys["pos"].filter(pa.array(listed)).combine_chunks(),
        pa.array(state.operator[listed], pa.string()),
        pa.array(state.reason[listed], pa.string()),
        _stats(state, listed),
        pa.array(new_pos[listed], mask=~(stays & reordered)),
    ]
    return pa.table(columns, schema=DECISION)


def _stats(state: _State, listed: Mask) -> pa.Array:
    """What each listed row is recorded with; empty where it stays, or where its value is no number."""
    values = state.value[listed]
    known = ~np.isnan(values)
    offsets = pa.array(np.append(0, np.cumsum(known)), type=pa.int32())
    return pa.MapArray.from_arrays(offsets, pa.array(state.stat[listed][known], pa.string()), pa.array(values[known]))


def apply_decisions(table: pa.Table, decisions: pa.Table, text: pa.Array | None) -> tuple[pa.Table, pa.Table]:
    """The rows of `table` that stay, with their new `pos` where there is one, and those that go (`rows.DROPPED`).

    Both tables are in `pos` order. `text` is what a dropped row is recorded with, row by row of `table`.
    """
    listed = pc.index_in(table["pos"].combine_chunks(), decisions["pos"].combine_chunks())
    mine = decisions.take(listed)
    goes = pc.is_valid(mine["operator"]).combine_chunks()
    gone, why = table.filter(goes), mine.filter(goes)
    texts = pa.nulls(gone.num_rows, pa.string()) if text is None else text.filter(goes)
    stage = pa.array(["clean"] * gone.num_rows, pa.string())
    columns = [gone["row_id"], gone["pos"], stage, why["operator"], why["reason"], why["stats"], texts]
    dropped = pa.table([pa.chunked_array([c]) if isinstance(c, pa.Array) else c for c in columns], schema=DROPPED)
    stays = pc.invert(goes)
    kept, new_pos = table.filter(stays), mine["new_pos"].filter(stays)
    index = kept.column_names.index("pos")
    return kept.set_column(index, kept.schema.field(index), pc.coalesce(new_pos, kept["pos"])), dropped
