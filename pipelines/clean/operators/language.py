"""Language identification: by script where that decides, and by fastText's lid.176 model."""

from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import regex

from pipelines.clean.column import Column, Indices, Mask
from pipelines.clean.kernels.fasttext_model import Classifier, load_classifier
from pipelines.clean.kernels.fasttext_predict import predict, predict_labels
from pipelines.clean.kernels.scripts import ASCII_LETTER, HAN, HANGUL, HIRAGANA, KATAKANA, OTHER_LETTER, script_counts
from pipelines.clean.operators.notation import is_notation
from pipelines.clean.operators.registry import (
    CLOSED,
    Assets,
    Dialect,
    Interval,
    Parameters,
    Ratio,
    Verdict,
    operator,
    within,
)

MODEL = "lid.176.ftz"
CHINESE = ("zh", "yue", "wuu")
"""What fastText calls it; short Mandarin is often `wuu` to it."""
NO_LANGUAGE = "none"
"""What no writing system decides: marks, emoji, bytes decoded with the wrong table."""
NOTATION = "code"
"""Code, formulas, data and numbers, which are in no language."""
Variant = Literal["simplified", "traditional", "yue", "wuu"]

ENOUGH_HAN = 0.3
"""Share of Han characters among all words from which a text is Chinese."""
SOME_HAN = 0.06
"""Share below which it is not; between the two fastText decides."""
ENOUGH_HIRAGANA = 0.12
"""Share of hiragana, which only Japanese grammar needs, among hiragana and Han from which a text is Japanese."""

_CANTONESE = regex.compile("[哋嘅咗喺嚟冇㗎佢嗰啲嘢瞓攞冚噉嗌]|唔(?!知)|点样|點樣|边度|邊度|系度|系咪|係咪|得闲|得閒")
WU_WE = "阿拉(?!伯|斯加|善|丁|法特|木)"
"""We, in Wu; in names such as 阿拉伯 it is none."""
_WU = regex.compile(f"侬|{WU_WE}|倷|弗|侪|伲|格桩|今朝|屋里向|哪能|闲话|辰光|物事|晓得伐|伊[讲拉]")
TRADITIONAL = frozenset(
    "們個這來時說對會為國過後還沒麼裡裏學經現發點問無實將與種開關見從長話電車東門買賣讀書寫聽樂愛體頭覺讓請謝錢員該機動業產務報場區單價應當質邊處難樣"
    "總選擇給課題義進達連運達遠適選選遊週隊階際隨雖雙雜離難雲靜須順預頻題願類顧風飛飯館馬驗驚魚鳥麗龍"
)
"""Frequent characters that only traditional Chinese has."""
_SIMPLIFIED = frozenset(
    "们个这来时说对会为国过后还没么里学经现发点问无实将与种开关见从长话电车东门买卖读书写听乐爱体头觉让请谢钱员该机动业产务报场区单价应当质边处难样"
    "总选择给课题义进达连运远适游队阶际随虽双杂离云静须顺预频愿类顾风飞饭馆马验惊鱼鸟丽龙"
) - frozenset("里后系没么")
_MAY_BE_MISDECODED = "[锛鐨銆鏄涓浠鍦鍙绋鎴]"
"""Characters that UTF-8's most frequent Chinese ones become when they are read as GBK."""


def _is_misdecoded(text: str) -> bool:
    """Whether the text is UTF-8 that was read as GBK: written as GBK again, most of it is UTF-8."""
    again = text.encode("gb18030", "ignore").decode("utf-8", "ignore")
    return len(regex.findall(r"\p{Han}|[，。、：；！？]", again)) * 2 > len(regex.findall(r"\p{Han}", text))


def _misdecoded(column: Column, candidates: Mask) -> Mask:
    rows = np.flatnonzero(candidates & column.matches(_MAY_BE_MISDECODED))
    broken = np.zeros(len(column), dtype=np.bool_)
    broken[rows] = [_is_misdecoded(text) for text in column.array.take(pa.array(rows)).to_pylist()]
    return broken


def _notation(column: Column, candidates: Mask) -> Mask:
    rows = np.flatnonzero(candidates)
    found = np.zeros(len(column), dtype=np.bool_)
    found[rows] = [is_notation(text) for text in column.array.take(pa.array(rows)).to_pylist()]
    return found


def _identified(column: Column, model: Classifier) -> tuple[npt.NDArray[Any], npt.NDArray[np.float64]]:
    """Language and score of each text: 1 where the script decides, else fastText's."""
    counts = script_counts(*column.utf8)
    han, hiragana = counts[:, HAN], counts[:, HIRAGANA]
    words = han + counts[:, [KATAKANA, HANGUL, ASCII_LETTER, OTHER_LETTER]].sum(axis=1) + hiragana
    share = han / np.maximum(words, 1)
    is_japanese = hiragana > ENOUGH_HIRAGANA * (hiragana + han)
    is_chinese = (share >= ENOUGH_HAN) & ~is_japanese & (2 * counts[:, HANGUL] <= han)
    broken = _misdecoded(column, is_chinese)
    languages: npt.NDArray[Any] = np.full(len(column), "zh", dtype=object)
    scores = np.ones(len(column))
    notation = _notation(column, ~is_chinese)
    languages[broken | (words == 0)], scores[broken | (words == 0)] = NO_LANGUAGE, 0.0
    languages[notation], scores[notation] = NOTATION, 1.0
    asked = np.flatnonzero(~is_chinese & (words > 0) & ~notation)
    if len(asked):
        part = Column(column.array.take(pa.array(asked)))
        answers, best, family = predict_labels(model, *part.utf8, CHINESE)
        named = np.array(model.labels, dtype=object)[answers]
        chinese = family.sum(axis=1)
        could_be = (share[asked] >= SOME_HAN) & ~is_japanese[asked]
        languages[asked] = np.where(could_be & (chinese >= best), "zh", named)
        scores[asked] = np.where(could_be & (chinese >= best), chinese, best)
        lost = ~could_be & np.isin(named, CHINESE)
        languages[asked[lost]] = np.where(is_japanese[asked[lost]], "ja", NO_LANGUAGE)
        scores[asked[lost]] = np.where(is_japanese[asked[lost]], 1.0, 0.0)
    return languages, scores


def variant_of(text: str) -> Variant:
    """Cantonese or Wu where two of the words stand that only these write, else by the characters' form."""
    if len(_CANTONESE.findall(text)) > 1:
        return "yue"
    if len(_WU.findall(text)) > 1:
        return "wuu"
    traditional = sum(character in TRADITIONAL for character in text)
    return "traditional" if traditional > sum(character in _SIMPLIFIED for character in text) else "simplified"


def _check(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    if parameters["variants"] is not None and dialect == "data_juicer":
        yield "variants", "data-juicer knows none; say dialect: zh"


@operator("filter", version=5, assets=lambda parameters, dialect: [MODEL], check=_check)
def language_id_score_filter(
    column: Column,
    *,
    lang: str | list[str] | None = "",
    min_score: Ratio = 0.8,
    variants: list[Variant] | None = None,
    dialect: Dialect = "zh",
    assets: Assets,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts whose language is one of `lang` (any where empty) with at least `min_score`.

    In data-juicer's dialect fastText decides, on the lower-cased text with spaces for newlines; scores may exceed 1 by
    rounding. In `zh` the script decides first: a text outside whose quotations Han characters make up a good part of
    the words, and little hiragana stands, is Chinese with score 1, however short; one without Han characters is not.
    Code, formulas, data and numbers are answers in any language. fastText is asked about the rest. Cantonese, Wu and
    traditional Chinese are Chinese too; `variants` names those that stay.
    """
    model = load_classifier(assets[MODEL])
    if dialect == "zh":
        languages, scores = _identified(column, model)
    else:
        answers, probabilities = predict(model, *column.utf8)
        languages, scores = np.array(model.labels, dtype=object)[answers], probabilities.astype(np.float64)
    if variants is not None:
        for row in np.flatnonzero(languages == "zh"):
            found = variant_of(column.array[int(row)].as_py())
            languages[row] = "zh" if found in variants else f"zh ({found})"
    ranged = within("lang_score", scores, {"min_score": min_score, "max_score": float("inf")}, interval)
    wanted = [lang] if isinstance(lang, str) and lang else list(lang or ())
    spoken = np.isin(languages, [*wanted, NOTATION]) if wanted else np.ones(len(scores), dtype=np.bool_)

    def reasons(rows: Indices) -> list[str]:
        by_range = ranged.reasons(rows)
        return [
            reason if spoken[row] else f"lang {languages[row]} (score {scores[row]:.4g}) is not {' or '.join(wanted)}"
            for row, reason in zip(rows, by_range, strict=True)
        ]

    return Verdict(ranged.keep & spoken, {"lang": languages, "lang_score": scores}, reasons)
