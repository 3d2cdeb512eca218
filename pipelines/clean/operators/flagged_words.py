"""Share of flagged words."""

import json
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pipelines.clean.column import Column
from pipelines.clean.kernels.trie import build_trie, flagged_characters
from pipelines.clean.operators.registry import (
    CLOSED,
    Assets,
    Dialect,
    Interval,
    Parameters,
    PositiveCount,
    Ratio,
    Verdict,
    operator,
    within,
)
from pipelines.clean.operators.words import pieces, refined, runs, sentencepiece_of
from pipelines.clean.operators.words import words as split_words
from pipelines.errors import DataError

WORDS_FILE = "flagged_words.json"


def _files(parameters: Parameters, dialect: Dialect) -> list[str]:
    given = parameters["flagged_words"] is not None or parameters["flagged_words_dir"] is not None
    words = [] if given else [WORDS_FILE]
    return words + ([sentencepiece_of(parameters["lang"])] if parameters["tokenization"] else [])


def _check(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    folder = parameters["flagged_words_dir"]
    if folder is not None and not list(Path(folder).glob("*flagged_words*.json")):
        yield "flagged_words_dir", f"no file like {WORDS_FILE} in {folder}"


@cache
def _listed(paths: tuple[str, ...], lang: str) -> tuple[str, ...]:
    """The words of a language, or of all, from JSON files that map a language to its words."""
    by_language: dict[str, list[str]] = {}
    for path in paths:
        for name, words in json.loads(Path(path).read_text(encoding="utf-8")).items():
            by_language.setdefault(name, []).extend(words)
    by_language.setdefault("all", [word for words in by_language.values() for word in words])
    if lang not in by_language:
        raise DataError(
            f"{paths[0]}: holds no flagged words for lang {lang!r}; it has {', '.join(sorted(by_language))}"
        )
    return tuple(sorted(set(by_language[lang])))


def _share_of_characters(column: Column, words: tuple[str, ...]) -> npt.NDArray[np.float64]:
    """The share of code points that belong to a flagged word, found in unsegmented text."""
    found, _ = flagged_characters(build_trie(words, bounded=True), *column.utf8)
    shares: npt.NDArray[np.float64] = np.zeros(len(column))
    np.divide(found, column.lengths, out=shares, where=column.lengths > 0)
    return shares


def _may_hold(column: Column, words: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Rows in which a flagged word may stand as a word of its own."""
    found, certain = flagged_characters(build_trie(words, bounded=False), *column.utf8)
    return np.flatnonzero((found > 0) | ~certain)


def _share_of_words(given: list[str], flagged: frozenset[str], sizes: Sequence[int], join: str) -> float:
    kept = refined(given)
    kept += [run for size in sizes for run in runs(kept, size, join)]
    return min(1.0, sum(word in flagged for word in kept) / len(kept)) if kept else 0.0


@operator("filter", assets=_files, check=_check)
def flagged_words_filter(
    column: Column,
    *,
    lang: str = "en",
    tokenization: bool = False,
    min_ratio: Ratio = 0.0,
    max_ratio: Ratio = 0.045,
    flagged_words_dir: str | None = None,
    flagged_words: list[str] | None = None,
    use_words_aug: bool = False,
    words_aug_group_sizes: list[PositiveCount] = [2],  # noqa: B006 - data-juicer's default, never changed
    words_aug_join_char: str = "",
    dialect: Dialect = "zh",
    assets: Assets,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts by their share of flagged words, from a JSON file by language or listed as `flagged_words`.

    data-juicer's dialect compares whitespace-separated words, stripped of special characters, and gives the share of
    words. `zh` finds words inside unsegmented text too and gives the share of characters. With `tokenization`,
    both compare sentencepiece's pieces.
    """
    paths = sorted(str(p) for p in Path(flagged_words_dir).glob("*flagged_words*.json")) if flagged_words_dir else []
    words = tuple(sorted(set(flagged_words))) if flagged_words is not None else ()
    if flagged_words is None:
        words = _listed(tuple(paths) or (assets[WORDS_FILE],), lang)
    exact = tokenization or use_words_aug  # words that are not substrings of the text: every row is looked at
    if dialect == "zh" and not exact:
        ratios = _share_of_characters(column, words)
    else:
        rows = np.arange(len(column)) if exact else _may_hold(column, words)
        texts = column.array.take(rows).to_pylist()
        split = pieces(texts, assets[sentencepiece_of(lang)]) if tokenization else [split_words(text) for text in texts]
        sizes = words_aug_group_sizes if use_words_aug else ()
        ratios = np.zeros(len(column))
        ratios[rows] = [_share_of_words(s, frozenset(words), sizes, words_aug_join_char) for s in split]
    return within("flagged_words_ratio", ratios, {"min_ratio": min_ratio, "max_ratio": max_ratio}, interval)
