"""Statistics of a column that need not fit into memory: what data-juicer's analyzer computes, and a histogram.

Up to `EXACT` values quantiles are exact. Above, they come from a sketch of counts in buckets whose bounds grow
geometrically (Masson, Rim, Lee 2019: DDSketch): sketches of parts add up in any order, and a quantile is within
`ERROR` of the value at its rank, relative to that value.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from pipelines.artifacts.reports.clean import Histogram, Numbers, SigmaBounds, Strings

Floats = npt.NDArray[np.float64]
Chunks = Callable[[], Iterator[Floats]]
"""The values part by part, as often as asked; what is not a number does not count."""

LARGEST = 1e150
"""Numbers from here on, infinite ones among them, do not count: their squares are no numbers."""
EXACT = 4_000_000
ERROR = 0.001
BINS = 40
QUANTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
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


def describe_numbers(chunks: Chunks, rows: int, edges: list[float] | None = None) -> Numbers | None:
    """Count, mean, std, min, quartiles, max, 3σ bounds and a histogram; None where there is no number below LARGEST.

    The histogram's first and last bin also hold what lies beyond. Without `edges` they go from the first
    percentile to the last.
    """
    exact = rows <= EXACT
    kept = [np.concatenate([*chunks(), np.zeros(0)])] if exact else None

    def numbers() -> Iterator[Floats]:
        return (part[np.abs(part) < LARGEST] for part in kept or chunks())

    count, mean, spread, low, high = _moments(numbers())
    if not count:
        return None
    std = math.sqrt(spread / (count - 1)) if count > 1 else 0.0
    p1, p25, p50, p75, p99 = _quantiles(numbers, exact)
    edges = edges or np.linspace(p1, max(p99, p1 + 1e-9), BINS + 1).tolist()
    below, above = mean - 3 * std, mean + 3 * std
    histogram: npt.NDArray[np.int64] = np.zeros(len(edges) - 1, dtype=np.int64)
    beyond = 0
    for part in numbers():
        histogram += np.histogram(np.clip(part, edges[0], edges[-1]), bins=np.array(edges))[0]
        beyond += int(((part < below) | (part > above)).sum())
    return Numbers(
        count=count,
        mean=mean,
        std=std,
        min=low,
        p1=p1,
        p25=p25,
        p50=p50,
        p75=p75,
        p99=p99,
        max=high,
        exact=exact,
        sigma=SigmaBounds(low=below, high=above, beyond=beyond),
        histogram=Histogram(edges=edges, counts=histogram.tolist()),
    )


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


def _quantiles(numbers: Chunks, exact: bool) -> list[float]:
    if exact:
        (values,) = numbers()
        return [float(np.quantile(values, share)) for share in QUANTILES]
    counts: Counter[int] = Counter()
    for part in numbers():
        counts.update(sketch(part))
    return [sketched_quantile(counts, share) for share in QUANTILES]


def describe_strings(parts: Iterable[Iterable[str | None]]) -> Strings:
    """Count, number of different values, and the most frequent ones."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts.update(value for value in part if value is not None)
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TOP]
    value, freq = top[0] if top else (None, None)
    return Strings(count=counts.total(), unique=len(counts), top=value, freq=freq, values=top)
