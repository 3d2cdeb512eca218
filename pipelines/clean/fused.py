"""Filters and mappers run one after the other over one table, each on the rows that are still in.

`apply` is a pure function. The text of a row with several turns is its assistant's turns: filters read them joined
by newlines, mappers change each by itself.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.reports.clean import ChangedRow, OperatorStats
from pipelines.artifacts.rows import DROPPED, field_of, has_turns
from pipelines.clean.answers import checked
from pipelines.clean.column import Column, Indices, Mask
from pipelines.clean.operators.registry import Verdict, mapped, verdict
from pipelines.clean.plan import Step
from pipelines.clean.texts import Texts, read_texts, write_texts
from pipelines.errors import DanluError, DataError, nearest

SAMPLES = 5
"""Rows per mapper that are kept before and after, for people to look at."""
SAMPLE_LENGTH = 500
"""Characters of a sample that are kept."""


@dataclass
class Outcome:
    """What became of a table: rows that stay, rows that go (`rows.DROPPED`), statistics, counts."""

    kept: pa.Table
    dropped: pa.Table
    stats: pa.Table
    """`row_id`, `pos` and one column per statistic for every row; null where the row was out before."""
    operators: list[OperatorStats]
    samples: list[ChangedRow]
    keys: pa.Table
    """`row_id`, `pos` and, for each operator over the whole data set, its key and whether the row has one."""


@dataclass
class _State:
    """The table, the rows that are still in, and what was found so far."""

    table: pa.Table
    text_key: str
    alive: Indices
    texts: dict[str, Texts | None] = field(default_factory=dict)
    stats: dict[str, tuple[npt.NDArray[Any], Mask]] = field(default_factory=dict)
    dropped: list[pa.Table] = field(default_factory=list)
    samples: list[ChangedRow] = field(default_factory=list)

    def text(self, key: str) -> Texts | None:
        if key not in self.texts:
            self.texts[key] = read_texts(self.rows(), key)
        return self.texts[key]

    def rows(self) -> pa.Table:
        whole = len(self.alive) == self.table.num_rows
        return self.table if whole else self.table.take(pa.array(self.alive))

    def name(self, row: int) -> str:
        """A row still in, as messages call it."""
        given = self.table.slice(int(self.alive[row]), 1)
        return f"row {given['row_id'][0].as_py()} (pos {given['pos'][0].as_py()})"


def kept_name(step: Step) -> str:
    """The column of `Measured.stats` that tells which rows a filter alone would keep."""
    return f"kept by {step.index}"


def key_names(step: Step) -> tuple[str, str]:
    """The columns of `Outcome.keys` that belong to a step: its keys, and which rows have one."""
    return f"key_{step.index}", f"present_{step.index}"


def apply(steps: Sequence[Step], table: pa.Table, text_key: str, dataset_ops: Sequence[Step] = ()) -> Outcome:
    """Run `steps` over `table`, which has `row_id` and `pos`; DataError names the row an operator fails on.

    `text_key` is the column whose text a dropped row is recorded with where the operator itself reads no text.
    `dataset_ops` are the operators over the whole data set that come next: each row that stays gets their keys.
    """
    several = has_turns(table)
    if several is not None and not pc.all(several).as_py():
        parts = [apply(steps, table.filter(mask), text_key, dataset_ops) for mask in (pc.invert(several), several)]
        return _joined(parts)
    state = _State(table, text_key, np.arange(table.num_rows))
    operators = [_timed(step, state) for step in steps]
    found = [_timed_key(step, state) for step in dataset_ops]
    kept = state.rows()
    changed = {step.text_key for step in steps if step.operator.kind == "mapper"}
    for key, texts in state.texts.items():
        if texts is not None and key in changed:
            kept = write_texts(kept, key, texts)
    dropped = pa.concat_tables([DROPPED.empty_table(), *state.dropped]).sort_by("pos")
    operators += [stats for stats, _ in found]
    keys = _keys_table(kept, state, dataset_ops, [key for _, key in found])
    return Outcome(kept, dropped, _stats_table(state), operators, state.samples, keys)


@dataclass
class Measured:
    """What filters say of all rows of a table, none of which goes."""

    stats: pa.Table
    """As in `Outcome`, and for each filter whether it alone would keep the row (`kept_name`)."""
    names: list[list[str]]
    """The columns of `stats` that belong to each step."""
    cuts: Indices
    """How many rows each step alone would drop."""


def measure(steps: Sequence[Step], table: pa.Table) -> Measured:
    """Ask filters about every row; a row without the column, or set aside by `if_error`, has no statistic."""
    several = has_turns(table)
    if several is not None and not pc.all(several).as_py():
        one, other = (measure(steps, table.filter(mask)) for mask in (pc.invert(several), several))
        return Measured(pa.concat_tables([one.stats, other.stats]).sort_by("pos"), one.names, one.cuts + other.cuts)
    state = _State(table, "", np.arange(table.num_rows))
    names, cuts = [], np.zeros(len(steps), dtype=np.int64)
    kept: dict[str, Mask] = {}
    for number, step in enumerate(steps):
        if len(state.alive) < table.num_rows:
            state.alive, state.texts = np.arange(table.num_rows), {}
        known = set(state.stats)
        found = verdict(_output(step, state))
        _, present = _present(step, state)
        _record(step, state, found, present)
        names.append([name for name in state.stats if name not in known])
        cuts[number] = int((~found.keep & present).sum())
        kept[kept_name(step)] = np.ones(table.num_rows, dtype=np.bool_)
        kept[kept_name(step)][state.alive] = found.keep | ~present
    stats = _stats_table(state)
    for name, mask in kept.items():
        stats = stats.append_column(name, pa.array(mask))
    return Measured(stats, names, cuts)


def _joined(parts: list[Outcome]) -> Outcome:
    """The outcomes of two parts of a table as one."""
    first, second = parts
    operators = [a + b for a, b in zip(first.operators, second.operators, strict=True)]
    kept, dropped, stats, keys = (
        pa.concat_tables([getattr(first, name), getattr(second, name)]).sort_by("pos")
        for name in ("kept", "dropped", "stats", "keys")
    )
    return Outcome(kept, dropped, stats, operators, first.samples + second.samples, keys)


def _timed(step: Step, state: _State) -> OperatorStats:
    began, rows_in = time.thread_time(), len(state.alive)
    changed, missing = _run(step, state)
    return OperatorStats(
        index=step.index,
        operator=step.operator.name,
        kind=step.operator.kind,
        rows_in=rows_in,
        rows_out=len(state.alive),
        changed=changed,
        missing=missing,
        seconds=time.thread_time() - began,
    )


@dataclass
class _Key:
    """One step's keys for the rows that were in when it was asked."""

    alive: Indices
    values: pa.Array
    present: Mask


def _timed_key(step: Step, state: _State) -> tuple[OperatorStats, _Key]:
    """The keys of an operator over the whole data set; here it counts only rows that go for want of a key."""
    began, rows_in = time.thread_time(), len(state.alive)
    present = _handle_missing(step, state)
    missing = int((~present).sum())
    values = _output(step, state) if step.operator.kind == "deduplicator" else _argument(step, state)
    if len(values) != len(present):  # rows it failed on were set aside
        present = np.ones(len(values), dtype=np.bool_)
    stats = OperatorStats(
        index=step.index,
        operator=step.operator.name,
        kind=step.operator.kind,
        rows_in=rows_in - len(state.alive),
        rows_out=0,
        missing=missing,
        seconds=time.thread_time() - began,
    )
    return stats, _Key(state.alive, values, present)


def _keys_table(kept: pa.Table, state: _State, dataset_ops: Sequence[Step], found: list[_Key]) -> pa.Table:
    columns = {"row_id": kept["row_id"], "pos": kept["pos"]}
    for step, key in zip(dataset_ops, found, strict=True):
        rows = np.searchsorted(key.alive, state.alive)
        name, present = key_names(step)
        columns |= {name: key.values.take(pa.array(rows)), present: pa.array(key.present[rows])}
    return pa.table(columns)


def _run(step: Step, state: _State) -> tuple[int, int]:
    """Run one step; returns how many rows a mapper changed, and how many have no column for it."""
    present = _handle_missing(step, state)
    missing = int((~present).sum())
    if step.operator.kind == "mapper":
        return _map(step, state), missing
    found = verdict(_output(step, state))
    _record(step, state, found, present)
    dropped = np.flatnonzero(~found.keep & present)
    reasons = found.reasons(dropped)
    if len(reasons) != len(dropped):
        raise DataError(f"{step.key}: its Verdict gives {len(reasons)} reasons for {len(dropped)} dropped rows")
    _drop(step, state, dropped, reasons)
    return 0, missing


def _argument(step: Step, state: _State) -> Column | pa.Array:
    """What the operator reads, for the rows still in."""
    if step.operator.reads == "field":
        values = field_of(state.table, step.column)
        return pa.nulls(len(state.alive), pa.int64()) if values is None else values.take(pa.array(state.alive))
    texts = state.text(step.text_key)
    if texts is None:
        return Column(pa.array([""] * len(state.alive), pa.large_string()))
    if step.question_key:
        return _with_questions(step, state, texts.joined)
    return texts.turns if step.operator.kind == "mapper" else texts.joined


SHORT_ANSWER = 100
"""Code points below which an answer says little without its question."""


def _with_questions(step: Step, state: _State, answers: Column) -> Column:
    """Short answers with their questions; long ones alone."""
    questions = state.text(str(step.question_key))
    if questions is None:
        raise DataError(
            f"{step.key}.question_key: the rows have no column {step.question_key} "
            f"({nearest(str(step.question_key), state.table.column_names)})"
        )
    asked = questions.joined.array.cast(pa.large_string())
    none = pa.scalar("", pa.large_string())
    return Column(answers.array, pc.if_else(pa.array(answers.lengths < SHORT_ANSWER), asked, none))


def _handle_missing(step: Step, state: _State) -> Mask:
    """Which rows have the column, after those without were dropped or refused as the recipe says."""
    exists, present = _present(step, state)
    if present.all() or step.if_missing == "keep":
        return present
    if step.if_missing == "drop":
        missing = np.flatnonzero(~present)
        _drop(step, state, missing, [f"no {step.column}"] * len(missing))
        return np.ones(len(state.alive), dtype=np.bool_)
    if exists and step.operator.reads == "field":
        return np.ones(len(present), dtype=np.bool_)  # the operator itself says what becomes of null
    if exists:
        where = f"{state.name(int(np.flatnonzero(~present)[0]))} has no {step.column}"
    else:
        where = f"the rows have no column {step.column} ({nearest(step.column, state.table.column_names)})"
    raise DataError(f"{step.key}: {where}; name another, or say if_missing: keep or drop")


def _present(step: Step, state: _State) -> tuple[bool, Mask]:
    """Whether the column exists, and in which rows."""
    if step.operator.reads == "text":
        texts = state.text(step.text_key)
        return texts is not None, texts.present if texts else np.zeros(len(state.alive), dtype=np.bool_)
    values = field_of(state.table, step.column)
    if values is None:
        return False, np.zeros(len(state.alive), dtype=np.bool_)
    return True, pc.is_valid(values.take(pa.array(state.alive))).to_numpy(zero_copy_only=False)


def _output(step: Step, state: _State) -> Any:
    """What the operator returns; where it fails, the row is named, or set aside if the recipe says so."""
    argument = _argument(step, state)
    try:
        return checked(step.run(argument), step.operator.kind, len(argument), step.key)
    except DanluError:
        raise
    except Exception as error:
        failures = _failures(step, argument, 0, len(argument))
        if not failures:
            raise DataError(
                f"{step.key}: {_message(error)}, on {len(argument)} rows together but on none alone"
            ) from error
        texts = state.text(step.text_key) if step.operator.kind == "mapper" else None
        rows = {texts.row_of_turn(i) if texts else i: failure for i, failure in failures.items()}
        if step.if_error == "stop":
            row, failure = min(rows.items(), key=lambda item: item[0])
            raise DataError(f"{step.key}: {state.name(row)} fails with {_message(failure)}") from failure
        _drop(step, state, np.array(sorted(rows)), [f"error {_message(rows[row])}" for row in sorted(rows)])
        rest = _argument(step, state)
        return checked(step.run(rest), step.operator.kind, len(rest), step.key)


def _failures(step: Step, argument: Column | pa.Array, low: int, high: int) -> dict[int, Exception]:
    """The entries on which the operator fails alone, found by halving."""
    try:
        step.run(argument.slice(low, high - low))
    except Exception as error:
        if high - low == 1:
            return {low: error}
        middle = (low + high) // 2
        return _failures(step, argument, low, middle) | _failures(step, argument, middle, high)
    return {}


def _message(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _map(step: Step, state: _State) -> int:
    array, counts = mapped(_output(step, state))
    before = state.text(step.text_key)
    if before is None:
        return 0
    for name, values in counts.items():
        per_row = before.sum_per_row(values)
        _record(step, state, Verdict(before.present, {name: per_row}, list), before.present)
    if array is before.turns.array:
        return 0
    after = before.with_turns(array)
    changed = np.flatnonzero(after.changed_from(before) & before.present)
    state.texts[step.text_key] = after
    for row in changed[:SAMPLES]:
        old, new = (texts.joined.array[int(row)].as_py()[:SAMPLE_LENGTH] for texts in (before, after))
        row_id = state.table["row_id"][int(state.alive[row])].as_py()
        sample = ChangedRow(index=step.index, operator=step.operator.name, row_id=row_id, before=old, after=new)
        state.samples.append(sample)
    return len(changed)


def _record(step: Step, state: _State, found: Verdict, present: Mask) -> None:
    """Keep the statistics of the rows that were looked at."""
    rows = state.alive[present]
    for name, values in found.stats.items():
        unique = name if name not in state.stats else f"{name}.{step.index}"
        full = np.zeros(state.table.num_rows, dtype=values.dtype)
        full[rows] = values[present]
        known = np.zeros(state.table.num_rows, dtype=np.bool_)
        known[rows] = True
        state.stats[unique] = (full, known)


def _drop(step: Step, state: _State, rows: Indices, reasons: list[str]) -> None:
    """Take rows, numbered among those still in, out of the data set."""
    if not len(rows):
        return
    out = state.alive[rows]
    texts = state.text(step.text_key if step.operator.reads == "text" else state.text_key)
    seen = None if texts is None else texts.joined.array.take(pa.array(rows)).cast(pa.string())
    columns = {
        "row_id": state.table["row_id"].take(pa.array(out)),
        "pos": state.table["pos"].take(pa.array(out)),
        "stage": pa.array(["clean"] * len(out)),
        "operator": pa.array([step.operator.name] * len(out)),
        "reason": pa.array(reasons, type=pa.string()),
        "stats": _stats_map(state, out),
        "text": pa.nulls(len(out), pa.string()) if seen is None else seen,
    }
    state.dropped.append(pa.table(columns, schema=DROPPED))
    keep = np.ones(len(state.alive), dtype=np.bool_)
    keep[rows] = False
    state.alive = state.alive[keep]
    state.texts = {key: texts and texts.filter(keep) for key, texts in state.texts.items()}


def _stats_map(state: _State, rows: Indices) -> pa.Array:
    """The numbers known of each row, by name."""
    numbers = {name: pair for name, pair in state.stats.items() if pair[0].dtype.kind in "iuf"}
    names = np.array(list(numbers), dtype=object)
    known = np.array([known[rows] for _, known in numbers.values()], dtype=np.bool_).reshape(len(numbers), len(rows)).T
    values = np.array([values[rows] for values, _ in numbers.values()], dtype=np.float64)
    values = values.reshape(len(numbers), len(rows)).T
    offsets = pa.array(np.append(0, np.cumsum(known.sum(axis=1))), type=pa.int32())
    keys = np.broadcast_to(names, known.shape)[known]
    return pa.MapArray.from_arrays(offsets, pa.array(keys, pa.string()), pa.array(values[known], pa.float64()))


def _stats_table(state: _State) -> pa.Table:
    columns = {"row_id": state.table["row_id"], "pos": state.table["pos"]}
    for name, (values, known) in state.stats.items():
        kind = pa.string() if values.dtype.kind == "O" else pa.float64()
        given = values if values.dtype.kind == "O" else values.astype(np.float64)
        columns[name] = pa.array(given, type=kind, mask=~known)
    return pa.table(columns)
