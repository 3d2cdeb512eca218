"""Perplexity by a KenLM model over sentencepiece pieces, as in CCNet."""

from functools import cache
from typing import Any

import numpy as np
import regex

from pipelines.clean.column import Column
from pipelines.clean.operators.garbled import variety
from pipelines.clean.operators.language import variant_of
from pipelines.clean.operators.registry import CLOSED, Assets, Dialect, Interval, Parameters, Verdict, operator, within
from pipelines.clean.operators.words import pieces, sentencepiece_of


def _kenlm_of(lang: str) -> str:
    return f"{lang}.arpa.bin"


def _files(parameters: Parameters, dialect: Dialect) -> list[str]:
    return [sentencepiece_of(parameters["lang"]), _kenlm_of(parameters["lang"])]


@cache
def _model(path: str) -> Any:
    import kenlm

    return kenlm.Model(path)


def _perplexity(line_of_pieces: str, model: Any) -> float:
    """10 to the power of the mean negative log10 probability per piece and line end; 0 for an empty text."""
    lines = line_of_pieces.splitlines()
    length = sum(len(line.split()) + 1 for line in lines)
    return round(10.0 ** (-sum(model.score(line) for line in lines) / length), 1) if length else 0.0


@cache
def _to_simplified() -> Any:
    import opencc

    return opencc.OpenCC("t2s.json").convert


_EMOJI = regex.compile(r"[\p{Emoji_Presentation}\ufe0f\u200d]+")
_CLAUSE = regex.compile(r"[\s\p{P}]+")
_CLASSICAL = regex.compile("[之乎者也矣焉哉兮曰吾尔汝于亦皆遂乃]|而不|其[一所]")
_DIALECT = regex.compile("俺|恁|啥子|莫得|侬|伊拉|阿拉|阿乌|佢|唔|畀|哋|嘅|冇")
UNUSUAL, MIXED, SHORT, DIALECTAL = 5.0, 2.0, 3.0, 20.0
SHORT_PIECES = 14


def allowance(text: str, pieces_of_text: int) -> float:
    """By how much a readable text of this kind lies above plain prose, which a model of written Mandarin has seen most.

    Cantonese, Wu and other dialects by their own words; classical Chinese, verse of even lines, lists; text with much
    Latin in it; a few words. 1 for plain prose.
    """
    if variant_of(text) in ("yue", "wuu") or _DIALECT.search(text):
        return DIALECTAL
    factor = SHORT if pieces_of_text < SHORT_PIECES else 1.0
    clauses = [clause for clause in _CLAUSE.split(text) if clause]
    lengths = {len(clause) for clause in clauses}
    is_verse = len(clauses) > 1 and len(lengths) <= 2 and min(lengths) > 2 and max(lengths) < 8
    is_classical = len(_CLASSICAL.findall(text)) * 10 >= len(text)
    is_list = text.count("、") > 2 or len([line for line in text.split("\n") if 0 < len(line.strip()) < 25]) > 2
    if is_verse or is_classical or is_list:
        factor *= UNUSUAL
    latin = sum(character.isascii() and character.isalpha() for character in text)
    return factor * MIXED if latin * 4 > len(text) else factor


@operator("filter", version=2, packages=("kenlm", "sentencepiece", "opencc"), assets=_files)
def perplexity_filter(
    column: Column,
    *,
    lang: str = "en",
    min_ppl: float = 0,
    max_ppl: float = 1500,
    dialect: Dialect = "zh",
    assets: Assets,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts by their perplexity under the KenLM model of `lang`, rounded to one decimal.

    In `zh`, Chinese is scored in simplified characters and without emoji, and divided by what a readable text of its
    kind may have more than prose (`allowance`): dialects, verse, lists and short texts are no gibberish. Where it
    repeats itself it is divided by its variety, since a repeated word is easy to predict.
    """
    model = _model(assets[_kenlm_of(lang)])
    texts = given = column.texts()
    if dialect == "zh" and lang == "zh":
        convert = _to_simplified()
        texts = [convert(_EMOJI.sub("，", text)) if not text.isascii() else text for text in texts]
    split = pieces(texts, assets[sentencepiece_of(lang)])
    scores = np.array([_perplexity(" ".join(row), model) for row in split], dtype=np.float64)
    if dialect == "zh" and lang == "zh":
        near = np.flatnonzero(scores > max_ppl / 2)  # what is left alone lies below in any case
        for row in near.tolist():
            scores[row] = round(scores[row] / variety(given[row]) / allowance(given[row], len(split[row])), 1)
    return within("perplexity", scores, {"min_ppl": min_ppl, "max_ppl": max_ppl}, interval)
