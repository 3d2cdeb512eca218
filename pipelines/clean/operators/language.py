"""Language identification by fastText's lid.176 model."""

from typing import Any

import numpy as np

from pipelines.clean.column import Column, Indices
from pipelines.clean.kernels.fasttext_model import Classifier, Floats, load_classifier
from pipelines.clean.kernels.fasttext_predict import predict, predict_labels
from pipelines.clean.operators.registry import CLOSED, Assets, Dialect, Interval, Ratio, Verdict, operator, within

MODEL = "lid.176.ftz"
HAN = r"\p{Han}"
KANA_OR_HANGUL = r"[\p{Hiragana}\p{Katakana}\p{Hangul}]"


def _identified(column: Column, model: Classifier) -> tuple[Any, Floats]:
    """Language and score of each text; in Han characters alone, what the model gives to Japanese and Korean is Chinese.

    Formal Chinese has much in common with what the model saw of these; kana or hangul is what tells them.
    """
    answers, scores, asked = predict_labels(model, *column.utf8, ("zh", "ja", "ko"))
    chinese = asked.sum(axis=1)
    ours = (chinese >= scores) & column.matches(HAN) & ~column.matches(KANA_OR_HANGUL)
    return np.where(ours, model.labels.index("zh"), answers), np.where(ours, chinese, scores)


@operator("filter", version=2, assets=lambda parameters, dialect: [MODEL])
def language_id_score_filter(
    column: Column,
    *,
    lang: str | list[str] | None = "",
    min_score: Ratio = 0.8,
    dialect: Dialect = "zh",
    assets: Assets,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts whose language, by fastText, is one of `lang` (any where empty) with at least `min_score`.

    The text is lower-cased and its newlines become spaces, as in data-juicer. Scores may exceed 1 by rounding.
    In `zh`, a text with Han characters and without kana or hangul is not Japanese or Korean: their probabilities count
    as Chinese.
    """
    model = load_classifier(assets[MODEL])
    answers, probabilities = _identified(column, model) if dialect == "zh" else predict(model, *column.utf8)
    languages = np.array(model.labels, dtype=object)[answers]
    scores = probabilities.astype(np.float64)
    ranged = within("lang_score", scores, {"min_score": min_score, "max_score": float("inf")}, interval)
    wanted = [lang] if isinstance(lang, str) and lang else list(lang or ())
    spoken = np.isin(languages, wanted) if wanted else np.ones(len(scores), dtype=np.bool_)

    def reasons(rows: Indices) -> list[str]:
        by_range = ranged.reasons(rows)
        return [
            reason if spoken[row] else f"lang {languages[row]} (score {scores[row]:.4g}) is not {' or '.join(wanted)}"
            for row, reason in zip(rows, by_range, strict=True)
        ]

    return Verdict(ranged.keep & spoken, {"lang": languages, "lang_score": scores}, reasons)
