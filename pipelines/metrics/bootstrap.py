"""How sure a difference between two models over the same rows is."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, AT_ONCE = 2000, 100

FEW_ROWS = 10
"""Below so many rows a percentile interval is too narrow to judge by."""


@dataclass(frozen=True)
class Interval:
    """A difference of means and the 95 % interval that resampling the rows gives it."""

    value: float
    low: float
    high: float
    rows: int
    """How many differences it was resampled from."""


def bootstrap(differences: Sequence[float], seed: int, weights: Sequence[float] | None = None) -> Interval:
    """The mean of per-row differences with its percentile bootstrap interval (Efron 1979; Koehn 2004 for text).

    `weights`: how much each row counts, such as its tokens where the differences are means over tokens.
    """
    values = np.asarray(differences, dtype=np.float64)
    counts = np.ones(len(values)) if weights is None else np.asarray(weights, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(RESAMPLES // AT_ONCE):
        drawn = rng.integers(0, len(values), (AT_ONCE, len(values)))
        means.append((values * counts)[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(np.average(values, weights=counts)), float(low), float(high), len(values))
