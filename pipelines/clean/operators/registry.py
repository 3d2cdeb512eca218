"""What an operator is, and the dictionary they are registered in.

An operator is one plain function. Its keyword-only arguments, with their annotations and defaults, are its
parameters in a recipe. Four names are not parameters but are filled in by the plan: `dialect`, `assets`,
`interval` (for data-juicer's `min_closed_interval`, `max_closed_interval` and `reversed_range`) and, for
`reads="field"`, the column named by `field_key`.

    filter        (column, **parameters) -> Verdict, or (keep, {statistic: values})
    mapper        (column, **parameters) -> Arrow string array, or (array, {statistic: counts})
    deduplicator  (column, **parameters) -> Arrow array of keys; with a function `cluster`
    selector      (values, **parameters) -> indices of the rows that stay, in their new order
"""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pydantic import AfterValidator, Field

from pipelines.clean.column import Indices, Mask

Dialect = Literal["zh", "data_juicer"]
Kind = Literal["filter", "mapper", "deduplicator", "selector"]
Parameters = Mapping[str, Any]
Assets = Mapping[str, str]
"""Model files that an operator needs: path by name."""

NO_LIMIT = sys.maxsize
"""data-juicer's upper bound where there is none."""


def _ratio(value: float) -> float:
    if value != NO_LIMIT and not 0 <= value <= 1:
        raise ValueError("a ratio lies between 0 and 1")
    return value


def _regex(value: str | None) -> str | None:
    import regex

    if value is not None:
        try:
            regex.compile(value)
        except regex.error as error:
            raise ValueError(f"not a valid regular expression: {error}") from None
    return value


Ratio = Annotated[float, AfterValidator(_ratio)]
Count = Annotated[int, Field(ge=0)]
PositiveCount = Annotated[int, Field(ge=1, le=2**31 - 1)]
Regex = Annotated[str, AfterValidator(_regex)]


@dataclass(frozen=True)
class Interval:
    """Whether a filter's bounds belong to its range, and whether the range is what is dropped."""

    min_closed_interval: bool = True
    max_closed_interval: bool = True
    reversed_range: bool = False

    def keeps(self, values: npt.NDArray[Any], low: float, high: float) -> Mask:
        """Which values stay."""
        min_closed = self.min_closed_interval != self.reversed_range
        max_closed = self.max_closed_interval != self.reversed_range
        inside = (values >= low if min_closed else values > low) & (values <= high if max_closed else values < high)
        return np.asarray(~inside if self.reversed_range else inside)


CLOSED = Interval()


@dataclass(frozen=True)
class Verdict:
    """A filter's answer: what stays, the statistics it went by, and why a dropped row was dropped."""

    keep: Mask
    stats: Mapping[str, npt.NDArray[Any]]
    reasons: Callable[[Indices], list[str]]
    """The reasons for the given rows."""


def within(stat: str, values: npt.NDArray[Any], bounds: Mapping[str, float], interval: Interval = CLOSED) -> Verdict:
    """The verdict of a range filter; `bounds` names and gives its lower and upper limit, in that order."""
    (low_name, low), (high_name, high) = bounds.items()

    def reason(value: float) -> str:
        shown = f"{stat} {value:.6g}"
        if interval.reversed_range:
            return f"{shown} is within {low_name} {low:g} and {high_name} {high:g}"
        return f"{shown} is below {low_name} {low:g}" if value <= low else f"{shown} is above {high_name} {high:g}"

    return Verdict(interval.keeps(values, low, high), {stat: values}, lambda rows: [reason(v) for v in values[rows]])


def verdict(answer: "Verdict | tuple[Mask, Mapping[str, npt.NDArray[Any]]]") -> Verdict:
    """A filter's answer in full: a bare (keep, stats) gets its statistics as the reason."""
    if isinstance(answer, Verdict):
        return answer
    keep, stats = answer
    return Verdict(keep, stats, lambda rows: [", ".join(f"{k} {v[row]}" for k, v in stats.items()) for row in rows])


def mapped(answer: "pa.Array | tuple[pa.Array, Mapping[str, Indices]]") -> tuple[pa.Array, Mapping[str, Indices]]:
    """A mapper's answer in full: a bare array counts nothing."""
    return answer if isinstance(answer, tuple) else (answer, {})


Check = Callable[[Parameters, Dialect], Iterable[tuple[str, str]]]
"""Extra conditions on parameters: yields (parameter, what is wrong)."""


def _nothing(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    yield from ()


def _no_assets(parameters: Parameters, dialect: Dialect) -> list[str]:
    return []


@dataclass(frozen=True)
class Operator:
    """One registered operator."""

    name: str
    kind: Kind
    function: Callable[..., Any]
    version: int = 1
    """Raised when its answers change, so that finished work is not mistaken for current."""
    reads: Literal["text", "field"] = "text"
    packages: tuple[str, ...] = ()
    """Importable modules it needs beyond the core dependencies."""
    assets: Callable[[Parameters, Dialect], list[str]] = _no_assets
    """Names of the model files it needs."""
    check: Check = _nothing
    cluster: Callable[..., Indices] | None = field(default=None)
    """For deduplicators: (keys in data-set order, parameters, how near signatures are found) -> for each row the first
    row of its cluster."""

    overlap: Callable[..., npt.NDArray[np.float64] | None] | None = field(default=None)
    """For deduplicators whose keys tell it: (keys, parameters, rows, the rows that they repeat) -> how like they are, 0
    to 1."""

    def missing_packages(self) -> list[str]:
        """Modules it needs that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]


OPERATORS: dict[str, Operator] = {}
"""All operators by name."""

F = TypeVar("F", bound=Callable[..., Any])


def operator(kind: Kind, **options: Any) -> Callable[[F], F]:
    """Register a function as an operator under its own name; the function stays as it is.

    Options are the fields of `Operator`, such as `reads="field"` or `version=2`.
    """

    def register(function: F) -> F:
        name = function.__name__
        if kind not in get_args(Kind):
            raise ValueError(f"operator {name}: {kind!r} is no kind; it is one of {', '.join(get_args(Kind))}")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise ValueError(f"operator {name}: a name is lower case with underscores")
        OPERATORS[name] = Operator(name, kind, function, **options)
        return function

    return register
