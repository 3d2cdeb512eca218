"""Filters on lengths, in code points."""

import numpy as np

from pipelines.clean.column import Column
from pipelines.clean.operators.registry import CLOSED, NO_LIMIT, Count, Interval, Verdict, operator, within


@operator("filter")
def text_length_filter(
    column: Column, *, min_len: Count = 10, max_len: Count = NO_LIMIT, interval: Interval = CLOSED
) -> Verdict:
    """Keep texts of `min_len` to `max_len` code points, both included."""
    return within("text_len", column.lengths, {"min_len": min_len, "max_len": max_len}, interval)


@operator("filter")
def maximum_line_length_filter(
    column: Column, *, min_len: Count = 10, max_len: Count = NO_LIMIT, interval: Interval = CLOSED
) -> Verdict:
    """Keep texts whose longest line, by `str.splitlines`, has `min_len` to `max_len` code points."""
    longest = np.fromiter(
        (max(map(len, text.splitlines()), default=0) for text in column.texts()), dtype=np.int64, count=len(column)
    )
    return within("max_line_length", longest, {"min_len": min_len, "max_len": max_len}, interval)
