"""How sure a difference is, as reports keep it; it is computed by metrics/bootstrap.py."""

from pipelines.artifacts.stage import Record


class Interval(Record):
    """A difference of means and its 95 % interval."""

    value: float
    low: float
    high: float
    rows: int | None = None
    """How many rows it was resampled from; None in reports that did not say."""
