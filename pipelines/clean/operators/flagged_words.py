"""Share of flagged words."""

import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import regex

from pipelines.clean.column import Column, Indices
from pipelines.clean.kernels.trie import build_trie, flagged_characters
from pipelines.clean.operators.flagged_senses import (
    INSULTS_AS_WORDS,
    MILD,
    OATH_WORDS,
    OATHS,
    QUOTED,
    SERIOUS,
    weight_of,
)
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
from pipelines.metrics.segmenter import segmenter

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
        raise DataError(f"{paths[0]}: holds no words for lang {lang!r}; it has {', '.join(sorted(by_language))}")
    return tuple(sorted(set(by_language[lang])))


@cache
def _segmenter() -> Any:
    """jieba with the insults that it lacks, loaded once in a process; it takes most of a second."""
    made = segmenter()
    for word in INSULTS_AS_WORDS:
        made.add_word(word)
    return made


@cache
def _pattern(words: tuple[str, ...]) -> regex.Pattern[str]:
    """Finds the words, the longest first; Latin ones between other characters."""
    parts = []
    for word in sorted(words, key=len, reverse=True):
        before = r"(?<![A-Za-z0-9])" if word[0].isascii() and word[0].isalnum() else ""
        after = r"(?![A-Za-z0-9])" if word[-1].isascii() and word[-1].isalnum() else ""
        parts.append(before + regex.escape(word) + after)
    return regex.compile("|".join(parts), regex.IGNORECASE)


def _boundaries(tokens: Iterable[str]) -> frozenset[int]:
    return frozenset(accumulate(map(len, tokens), initial=0))


_SPACED_OUT = regex.compile(r"(?<!\p{Han})\p{Han}(?: \p{Han}){2,}(?!\p{Han})")
"""Single characters with blanks between them, as words are disguised."""


def _hits(text: str, words: tuple[str, ...], is_weighted: bool) -> tuple[list[tuple[str, float]], int]:
    """The flagged words that stand in the text as words, each with its weight, and how many words it has.

    A word counts where no longer word of the dictionary overlaps its ends. With `is_weighted`, one in a short quotation
    does not count, plain ones count once each, and nothing counts until the weights make up one word.
    """
    text = _SPACED_OUT.sub(lambda match: match.group().replace(" ", ""), text)
    spans = [(m.start(), m.end(), m.group().lower()) for m in _pattern(words).finditer(text)]
    oaths = OATHS.findall(text) if is_weighted and any(word in MILD for word in words) else []
    quoted = [m.span() for m in QUOTED.finditer(text)] if is_weighted and len(text) > 30 else []
    spans = [(start, end, word) for start, end, word in spans if not any(a <= start and end <= b for a, b in quoted)]
    if is_weighted and sum(_weights(spans, oaths, text).values()) < 1:
        return [], 0  # not even if all of them stand as words, which takes longer to find out
    tokens = list(_segmenter().cut(text, HMM=False))
    total = sum(any(character.isalnum() for character in token) for token in tokens)
    meeting = {start for start, _, _ in spans} & {end for _, end, _ in spans}  # inside 卖淫嫖娼, a word of its own
    edges = _boundaries(tokens) | meeting
    found = [(start, end, word) for start, end, word in spans if start in edges and end in edges]
    if not is_weighted:
        return [(word, 1.0) for _, _, word in found], total
    hits = [(word, weight) for word, weight in _weights(found, oaths, text).items() if weight]
    return (hits if sum(weight for _, weight in hits) >= 1 else []), total


def _weights(spans: Sequence[tuple[int, int, str]], oaths: Sequence[str], text: str) -> dict[str, float]:
    """What the words that stand in a text count for together."""
    is_serious = SERIOUS.search(text) is not None
    weights: dict[str, float] = {}
    for _, _, word in spans:
        weight = weight_of(word, is_serious)
        weights[word] = max(weights.get(word, 0.0), weight) if weight < 1 else weights.get(word, 0.0) + weight
    if oaths:
        weights[oaths[0]] = float(len(oaths))
    return weights


def _share_in_unsegmented(
    column: Column, words: tuple[str, ...], is_weighted: bool
) -> tuple[npt.NDArray[np.float64], dict[int, str]]:
    """The weight of each text's flagged words over its number of words, and what was found, by row."""
    telling = tuple(word for word in words if word not in MILD) + OATH_WORDS if is_weighted else words
    found, certain = flagged_characters(build_trie(telling, bounded=False), *column.utf8)
    spaced = column.matches(r"\p{Han} \p{Han} \p{Han}")
    ratios: npt.NDArray[np.float64] = np.zeros(len(column))
    named: dict[int, str] = {}
    for row in np.flatnonzero((found > 0) | ~certain | spaced).tolist():
        hits, total = _hits(column.array[row].as_py(), words, is_weighted)
        if hits:
            ratios[row] = min(1.0, sum(weight for _, weight in hits) / max(total, 1))
            named[row] = ", ".join(word for word, _ in hits)
    return ratios, named


def _may_hold(column: Column, words: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """Rows in which a flagged word may stand as a word of its own."""
    found, certain = flagged_characters(build_trie(words, bounded=False), *column.utf8)
    return np.flatnonzero((found > 0) | ~certain)


def _share_of_words(given: list[str], flagged: frozenset[str], sizes: Sequence[int], join: str) -> float:
    kept = refined(given)
    kept += [run for size in sizes for run in runs(kept, size, join)]
    return min(1.0, sum(word in flagged for word in kept) / len(kept)) if kept else 0.0


@operator("filter", version=2, assets=_files, check=_check)
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
    words. `zh` finds words of unsegmented text, between the words of a dictionary, and gives their weight over the
    number of words: of the published list, everyday words (屁股) weigh nothing, words of medicine,
    law and literature half
    where the text is not about these, insults and coarse words one; what adds up to less than one word does not count.
    With `tokenization`, both compare sentencepiece's pieces.
    """
    paths = sorted(str(p) for p in Path(flagged_words_dir).glob("*flagged_words*.json")) if flagged_words_dir else []
    words = tuple(sorted(set(flagged_words))) if flagged_words is not None else ()
    if flagged_words is None:
        words = _listed(tuple(paths) or (assets[WORDS_FILE],), lang)
    exact = tokenization or use_words_aug  # words that are not substrings of the text: every row is looked at
    named: dict[int, str] = {}
    if dialect == "zh" and not exact:
        ratios, named = _share_in_unsegmented(column, words, is_weighted=flagged_words is None)
    else:
        rows = np.arange(len(column)) if exact else _may_hold(column, words)
        texts = column.array.take(rows).to_pylist()
        split = pieces(texts, assets[sentencepiece_of(lang)]) if tokenization else [split_words(text) for text in texts]
        sizes = words_aug_group_sizes if use_words_aug else ()
        ratios = np.zeros(len(column))
        ratios[rows] = [_share_of_words(s, frozenset(words), sizes, words_aug_join_char) for s in split]
    ranged = within("flagged_words_ratio", ratios, {"min_ratio": min_ratio, "max_ratio": max_ratio}, interval)

    def reasons(rows: Indices) -> list[str]:
        return [
            f"{reason} ({named[row]})" if row in named else reason
            for row, reason in zip(rows.tolist(), ranged.reasons(rows), strict=True)
        ]

    return Verdict(ranged.keep, ranged.stats, reasons)


STOPWORDS_FILE = "stopwords.json"


def _stopword_files(parameters: Parameters, dialect: Dialect) -> list[str]:
    words = [] if parameters["stopwords_dir"] is not None else [STOPWORDS_FILE]
    return words + ([sentencepiece_of(parameters["lang"])] if parameters["tokenization"] else [])


def _check_stopwords(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    folder = parameters["stopwords_dir"]
    if folder is not None and not list(Path(folder).glob("*stopwords*.json")):
        yield "stopwords_dir", f"no file like {STOPWORDS_FILE} in {folder}"


@operator("filter", assets=_stopword_files, check=_check_stopwords)
def stopwords_filter(
    column: Column,
    *,
    lang: str = "en",
    tokenization: bool = False,
    min_ratio: Ratio = 0.3,
    max_ratio: Ratio = 1.0,
    stopwords_dir: str | None = None,
    use_words_aug: bool = False,
    words_aug_group_sizes: list[PositiveCount] = [2],  # noqa: B006 - data-juicer's default, never changed
    words_aug_join_char: str = "",
    assets: Assets,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts by their share of stop words, from a JSON file by language.

    Words are what whitespace separates, stripped of special characters, or with `tokenization`, which Chinese needs,
    sentencepiece's pieces.
    """
    paths = sorted(str(path) for path in Path(stopwords_dir).glob("*stopwords*.json")) if stopwords_dir else []
    words = frozenset(_listed(tuple(paths) or (assets[STOPWORDS_FILE],), lang))
    texts = column.texts()
    split = pieces(texts, assets[sentencepiece_of(lang)]) if tokenization else [split_words(text) for text in texts]
    sizes = words_aug_group_sizes if use_words_aug else ()
    ratios = np.array([_share_of_words(row, words, sizes, words_aug_join_char) for row in split], dtype=np.float64)
    return within("stopwords_ratio", ratios, {"min_ratio": min_ratio, "max_ratio": max_ratio}, interval)
