"""Operators on a field other than the text."""

import math
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipelines.clean.column import Indices
from pipelines.clean.operators.registry import (
    CLOSED,
    Dialect,
    Interval,
    Parameters,
    PositiveCount,
    Ratio,
    Verdict,
    operator,
    within,
)


def _needs_field(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    if not parameters["field_key"]:
        yield "field_key", "names no column, so the operator would do nothing"


def _needs_amount(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    yield from _needs_field(parameters, dialect)
    if not parameters["topk"] and not parameters["top_ratio"]:
        yield "topk", "give topk or top_ratio, otherwise the operator would do nothing"


def _number(value: Any, dialect: Dialect) -> float:
    """The value as a number, NaN where it is none; data-juicer takes every falsy value for no number."""
    if value is None or (not value and (dialect == "data_juicer" or value in ("", []))):
        return math.nan
    try:
        return float(value)
    except ValueError:
        return math.nan


@operator("filter", version=2, reads="field", check=_needs_field)
def specified_numeric_field_filter(
    values: pa.Array,
    *,
    field_key: str = "",
    min_value: float = -sys.maxsize,
    max_value: float = sys.maxsize,
    dialect: Dialect = "zh",
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep rows whose field is a number, or a string that is one, from `min_value` to `max_value`.

    In data-juicer's dialect the number 0 is no number (its string "0" is), though its statistic is 0. Raises TypeError
    for a list or a mapping.
    """
    plain = pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
    numbers: npt.NDArray[np.float64]
    if plain:
        numbers = values.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    else:
        numbers = np.fromiter((_number(v, dialect) for v in values.to_pylist()), dtype=np.float64, count=len(values))
    ranged = within(field_key, numbers, {"min_value": min_value, "max_value": max_value}, interval)
    counts = ~np.isnan(numbers) & ((numbers != 0) | (dialect == "zh") | (not plain))

    def reasons(rows: Indices) -> list[str]:
        given = values.take(pa.array(rows)).to_pylist()
        by_range = ranged.reasons(rows)
        return [
            reason if counts[row] else f"{field_key} {value!r} is not a number"
            for row, value, reason in zip(rows, given, by_range, strict=True)
        ]

    return Verdict(ranged.keep & counts, {field_key: numbers}, reasons)


def _sort_key(value: Any, reverse: bool) -> float:
    """data-juicer's `stats_to_number`: what cannot be ordered goes last."""
    try:
        if isinstance(value, str):
            return float(value)
        if value is None or value == []:
            raise ValueError("empty")
        return float(np.asarray(value).mean())
    except (TypeError, ValueError):
        return float(-sys.maxsize if reverse else sys.maxsize)


@operator("selector", reads="field", check=_needs_amount)
def topk_specified_field_selector(
    values: pa.Array,
    *,
    field_key: str = "",
    top_ratio: Ratio | None = None,
    topk: PositiveCount | None = None,
    reverse: bool = True,
) -> Indices:
    """The indices of the rows with the highest values (lowest where not `reverse`), best first, ties in data-set
    order. With both `topk` and `top_ratio` the smaller number counts. What is not a number is taken last.
    """
    amount = min(topk or len(values), int(top_ratio * len(values)) if top_ratio else len(values))
    if pa.types.is_integer(values.type) and not values.null_count:
        keys = values.to_numpy(zero_copy_only=False).astype(np.int64)
    else:
        keys = np.fromiter((_sort_key(v, reverse) for v in values.to_pylist()), dtype=np.float64, count=len(values))
    return np.argsort(-keys if reverse else keys, kind="stable")[:amount]
