"""Filters on the share of a class of characters."""

from typing import Literal

from pipelines.clean.column import Column
from pipelines.clean.kernels.characters import ALNUM, SPECIAL, SPECIAL_NOT_LETTER
from pipelines.clean.operators.registry import CLOSED, NO_LIMIT, Dialect, Interval, Ratio, Verdict, operator, within


@operator("filter")
def alphanumeric_filter(
    column: Column,
    *,
    tokenization: Literal[False] = False,
    min_ratio: Ratio = 0.25,
    max_ratio: Ratio = NO_LIMIT,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts by the share of code points that are letters (Chinese ones too) or digits; empty texts have 0."""
    return within("alnum_ratio", column.share(ALNUM), {"min_ratio": min_ratio, "max_ratio": max_ratio}, interval)


@operator("filter")
def special_characters_filter(
    column: Column,
    *,
    min_ratio: Ratio = 0.0,
    max_ratio: Ratio = 0.25,
    dialect: Dialect = "zh",
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts by the share of punctuation, digits, whitespace, symbols and emoji; letters such as 一 count in
    data-juicer's dialect only."""
    share = column.share(SPECIAL if dialect == "data_juicer" else SPECIAL_NOT_LETTER)
    return within("special_char_ratio", share, {"min_ratio": min_ratio, "max_ratio": max_ratio}, interval)
