"""Filters on the share of a class of characters."""

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from pydantic import Field

from pipelines.clean.column import Column
from pipelines.clean.kernels.characters import ALNUM, MARK, SPECIAL
from pipelines.clean.operators.registry import (
    CLOSED,
    NO_LIMIT,
    Assets,
    Dialect,
    Interval,
    Parameters,
    Ratio,
    Verdict,
    operator,
    within,
)
from pipelines.clean.operators.words import PYTHIA, token_counts, tokenizer_of

NotNegative = Annotated[float, Field(ge=0)]


def _check(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    for name in ("min_ratio", "max_ratio"):
        if not parameters["tokenization"] and 1 < parameters[name] < NO_LIMIT:
            yield name, f"a ratio lies between 0 and 1, not {parameters[name]}"


def _files(parameters: Parameters, dialect: Dialect) -> list[str]:
    return [tokenizer_of(PYTHIA)] if parameters["tokenization"] else []


@operator("filter", version=2, assets=_files, check=_check)
def alphanumeric_filter(
    column: Column,
    *,
    tokenization: bool = False,
    min_ratio: NotNegative = 0.25,
    max_ratio: NotNegative = NO_LIMIT,
    dialect: Dialect = "zh",
    assets: Assets,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts by the share of code points that are letters (Chinese ones too) or digits; empty texts have 0.

    In `zh` blanks do not count: indented code and columns are not noise. Filled tables and short dialogues lie above
    0.2. With `tokenization`, letters are counted for each token of data-juicer's tokenizer, which may be several.
    """
    if tokenization:
        letters = [sum(map(str.isalpha, text)) for text in column.texts()]
        tokens = token_counts(column.texts(), assets[tokenizer_of(PYTHIA)])
        each = np.divide(letters, tokens, out=np.zeros(len(column)), where=tokens > 0)
        return within("alpha_token_ratio", each, {"min_ratio": min_ratio, "max_ratio": max_ratio}, interval)
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
