"""Filters on the share of a class of characters."""

from typing import Literal

from pipelines.clean.column import Column
from pipelines.clean.kernels.characters import ALNUM, MARK, SPECIAL
from pipelines.clean.operators.registry import CLOSED, NO_LIMIT, Dialect, Interval, Ratio, Verdict, operator, within


@operator("filter", version=2)
def alphanumeric_filter(
    column: Column,
    *,
    tokenization: Literal[False] = False,
    min_ratio: Ratio = 0.25,
    max_ratio: Ratio = NO_LIMIT,
    dialect: Dialect = "zh",
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts by the share of code points that are letters (Chinese ones too) or digits; empty texts have 0.

    In `zh` blanks do not count: indented code and columns are not noise. Filled tables and short dialogues lie above
    0.2.
    """
    share = column.share(ALNUM) if dialect == "data_juicer" else column.share_of_visible(ALNUM)
    return within("alnum_ratio", share, {"min_ratio": min_ratio, "max_ratio": max_ratio}, interval)


@operator("filter", version=2)
def special_characters_filter(
    column: Column,
    *,
    min_ratio: Ratio = 0.0,
    max_ratio: Ratio = 0.25,
    dialect: Dialect = "zh",
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts by the share of punctuation, symbols and emoji.

    In data-juicer's dialect digits, white space and letters such as 一 count too; in `zh` they do not, and blanks are
    no part of the text.
    """
    share = column.share(SPECIAL) if dialect == "data_juicer" else column.share_of_visible(MARK)
    return within("special_char_ratio", share, {"min_ratio": min_ratio, "max_ratio": max_ratio}, interval)
