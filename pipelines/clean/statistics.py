"""Statistics of a column that need not fit into memory: what data-juicer's analyzer tells, and a histogram.

Up to `EXACT` values quantiles are exact. Above, they come from a sketch of counts in buckets whose bounds grow
geometrically (Masson, Rim, Lee 2019: DDSketch): sketches of parts add up in any order, and a quantile is within
`ERROR` of the value at its rank, relative to that value.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Chunks = Callable[[], Iterator[Floats]]
"""The values part by part, as often as asked; what is not a number does not count."""

EXACT = 4_000_000
ERROR = 0.001
BINS = 40
QUANTILES = {"1%": 0.01, "25%": 0.25, "50%": 0.5, "75%": 0.75, "99%": 0.99}
TOP = 10
"""Values of a string statistic that are listed."""

_LOG_GAMMA = math.log((1 + ERROR) / (1 - ERROR))
_TINY = 1e-12
_FIRST = math.floor(math.log(_TINY) / _LOG_GAMMA)


def sketch(values: Floats) -> Counter[int]:
    """How many values fall into each bucket; the buckets' numbers order as their values do, 0 holds zero."""
    sizes = np.abs(values)
    numbers = np.ceil(np.log(np.maximum(sizes, _TINY)) / _LOG_GAMMA).astype(np.int64) - _FIRST + 1
    numbers = np.where(sizes <= _TINY, 0, np.sign(values).astype(np.int64) * numbers)
    found, counts = np.unique(numbers, return_counts=True)
    return Counter(dict(zip(found.tolist(), counts.tolist(), strict=True)))


def sketched_quantile(counts: Counter[int], share: float) -> float:
    """The value below which that share of the sketched values lies."""
    numbers = np.array(sorted(counts))
    reached = np.cumsum([counts[number] for number in numbers.tolist()])
    number = int(numbers[np.searchsorted(reached, math.floor(share * (reached[-1] - 1)), side="right")])
    if number == 0:
        return 0.0
    upper = math.exp((abs(number) + _FIRST - 1) * _LOG_GAMMA)
    return math.copysign(2 * upper / (math.exp(_LOG_GAMMA) + 1), number)


def describe_numbers(chunks: Chunks, rows: int, edges: list[float] | None = None) -> dict[str, Any]:
    """Count, mean, std, min, quartiles, max, 3σ bounds and a histogram; `count` 0 alone where there is no number.

    The histogram's first and last bin also hold what lies beyond. Without `edges` they go from the first
    percentile to the last.
    """
    exact = rows <= EXACT
    kept = [np.concatenate([*chunks(), np.zeros(0)])] if exact else None

    def numbers() -> Iterator[Floats]:
        return (part[~np.isnan(part)] for part in kept or chunks())

    count, mean, spread, low, high = _moments(numbers())
    if not count:
        return {"count": 0}
    std = math.sqrt(spread / (count - 1)) if count > 1 else 0.0
    quantiles = _quantiles(numbers, exact)
    edges = edges or np.linspace(quantiles["1%"], max(quantiles["99%"], quantiles["1%"] + 1e-9), BINS + 1).tolist()
    below, above = mean - 3 * std, mean + 3 * std
    histogram: npt.NDArray[np.int64] = np.zeros(len(edges) - 1, dtype=np.int64)
    beyond = 0
    for part in numbers():
        histogram += np.histogram(np.clip(part, edges[0], edges[-1]), bins=np.array(edges))[0]
        beyond += int(((part < below) | (part > above)).sum())
    return {
        "count": count,
        "mean": mean,
        "std": std,
        "min": low,
        **quantiles,
        "max": high,
        "exact": exact,
        "sigma": {"low": below, "high": above, "beyond": beyond},
        "histogram": {"edges": edges, "counts": histogram.tolist()},
    }


def _moments(parts: Iterable[Floats]) -> tuple[int, float, float, float, float]:
    """Count, mean, sum of squared deviations, min and max (Chan, Golub, LeVeque 1979)."""
    count, mean, spread, low, high = 0, 0.0, 0.0, math.inf, -math.inf
    for part in parts:
        if not len(part):
            continue
        own, own_spread = float(part.mean()), float(((part - part.mean()) ** 2).sum())
        total, shift = count + len(part), own - mean
        spread += own_spread + shift**2 * count * len(part) / total
        mean += shift * len(part) / total
        count, low, high = total, min(low, float(part.min())), max(high, float(part.max()))
    return count, mean, spread, low, high


def _quantiles(numbers: Chunks, exact: bool) -> dict[str, float]:
    if exact:
        (values,) = numbers()
        return {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
    counts: Counter[int] = Counter()
    for part in numbers():
        counts.update(sketch(part))
    return {name: sketched_quantile(counts, share) for name, share in QUANTILES.items()}


def describe_strings(parts: Iterable[Iterable[str | None]]) -> dict[str, Any]:
    """Count, number of different values, and the most frequent ones."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(value for value in part if value is not None)
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TOP]
    freq = {"top": top[0][0], "freq": top[0][1]} if top else {}
    return {"count": counts.total(), "unique": len(counts), **freq, "values": top}
