"""Filters on lengths, in code points or words."""

import numpy as np

from pipelines.clean.column import Column
from pipelines.clean.operators.registry import (
    CLOSED,
    NO_LIMIT,
    Assets,
    Count,
    Dialect,
    Interval,
    Parameters,
    Verdict,
    operator,
    within,
)
from pipelines.clean.operators.words import PYTHIA, pieces, refined, sentencepiece_of, token_counts, tokenizer_of
from pipelines.clean.operators.words import words as split_words


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


@operator("filter")
def average_line_length_filter(
    column: Column, *, min_len: Count = 10, max_len: Count = NO_LIMIT, interval: Interval = CLOSED
) -> Verdict:
    """Keep texts with `min_len` to `max_len` code points, breaks included, for each of their `str.splitlines`."""
    lines = np.fromiter((len(text.splitlines()) for text in column.texts()), dtype=np.int64, count=len(column))
    means = np.zeros(len(column))
    np.divide(column.lengths, lines, out=means, where=lines > 0)
    return within("avg_line_length", means, {"min_len": min_len, "max_len": max_len}, interval)


def _needs_model(parameters: Parameters, dialect: Dialect) -> list[str]:
    return [sentencepiece_of(parameters["lang"])] if parameters["tokenization"] else []


@operator("filter", assets=_needs_model)
def words_num_filter(
    column: Column,
    *,
    lang: str = "en",
    tokenization: bool = False,
    min_num: Count = 10,
    max_num: Count = NO_LIMIT,
    assets: Assets,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts of `min_num` to `max_num` words: what whitespace separates, or with `tokenization`, which Chinese
    needs, sentencepiece's pieces. What is nothing but special characters is no word."""
    texts = column.texts()
    split = pieces(texts, assets[sentencepiece_of(lang)]) if tokenization else [split_words(text) for text in texts]
    counts = np.array([len(refined(row)) for row in split], dtype=np.int64)
    return within("num_words", counts, {"min_num": min_num, "max_num": max_num}, interval)


@operator("filter", assets=lambda parameters, dialect: [tokenizer_of(parameters["hf_tokenizer"])])
def token_num_filter(
    column: Column,
    *,
    hf_tokenizer: str = PYTHIA,
    min_num: Count = 10,
    max_num: Count = NO_LIMIT,
    assets: Assets,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts of `min_num` to `max_num` tokens of a Hugging Face tokenizer, without special tokens around them."""
    counts = token_counts(column.texts(), assets[tokenizer_of(hf_tokenizer)])
    return within("num_token", counts, {"min_num": min_num, "max_num": max_num}, interval)
