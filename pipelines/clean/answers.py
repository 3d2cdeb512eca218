"""What an operator returned, checked before it is used: kind, length and type."""

from collections.abc import Mapping, Sized
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.clean.operators.registry import Kind, Verdict
from pipelines.errors import DataError

_FORM: dict[Kind, str] = {
    "filter": "a filter returns (keep, {{statistic: values}}) or a Verdict for {rows} texts",
    "mapper": "a mapper returns an Arrow array of {rows} texts",
    "deduplicator": "a deduplicator returns an Arrow array of {rows} keys",
    "selector": "a selector returns which of {rows} rows stay, as numbers",
}


def checked(answer: Any, kind: Kind, rows: int, where: str) -> Any:
    """The answer of an operator that was asked about `rows` texts or values; DataError where it is not one.

    `where` is the operator's place in the recipe.
    """
    problem = _problem(answer, kind, rows)
    if problem:
        raise DataError(f"{where}: {_FORM[kind].format(rows=rows)}, not {problem}")
    return answer


def _problem(answer: Any, kind: Kind, rows: int) -> str | None:
    if kind == "filter":
        if isinstance(answer, Verdict):
            answer = (answer.keep, answer.stats)
        if not _is_pair(answer):
            return _named(answer)
        keep, stats = answer
        return _array_problem("keep", keep, rows, "b") or _stats_problem(stats, rows)
    if kind == "mapper":
        stats = {}
        if isinstance(answer, tuple):
            if not _is_pair(answer):
                return _named(answer)
            answer, stats = answer
        return _texts_problem(answer, rows) or _stats_problem(stats, rows)
    if kind == "deduplicator":
        if not isinstance(answer, pa.Array):
            return _named(answer)
        return None if len(answer) == rows else f"of {len(answer)}"
    indices = np.asarray(answer)
    if indices.ndim != 1 or indices.dtype.kind not in "iu":
        return _named(answer)
    if len(indices) and (indices.min() < 0 or indices.max() >= rows):
        return f"row {int(indices.max())} which is none of them"
    return None if len(np.unique(indices)) == len(indices) else "one of them twice"


def _is_pair(answer: Any) -> bool:
    return isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[1], Mapping)


def _texts_problem(array: Any, rows: int) -> str | None:
    if not isinstance(array, pa.Array) or not (pa.types.is_string(array.type) or pa.types.is_large_string(array.type)):
        return _named(array)
    if len(array) != rows:
        return f"of {len(array)}"
    return f"with {array.null_count} nulls" if array.null_count else None


def _stats_problem(stats: Mapping[str, Any], rows: int) -> str | None:
    for name, values in stats.items():
        if problem := _array_problem(f"statistic {name}", values, rows, "biufO"):
            return problem
    return None


def _array_problem(name: str, values: Any, rows: int, kinds: str) -> str | None:
    if not isinstance(values, np.ndarray) or values.dtype.kind not in kinds or values.ndim != 1:
        return f"{name} as {_named(values)}" + (", which is no NumPy array of true and false" if kinds == "b" else "")
    return None if len(values) == rows else f"{name} of {len(values)} values"


def _named(value: Any) -> str:
    if isinstance(value, np.ndarray | pa.Array):
        kind = value.dtype if isinstance(value, np.ndarray) else value.type
        return f"{type(value).__name__} of {kind}"
    size = f" of {len(value)}" if isinstance(value, Sized) and not isinstance(value, str) else ""
    return f"{type(value).__name__}{size}"
