"""Language identification by fastText's lid.176 model."""

import numpy as np

from pipelines.clean.column import Column, Indices
from pipelines.clean.fasttext_model import load_classifier
from pipelines.clean.fasttext_predict import predict
from pipelines.clean.operators.registry import CLOSED, Assets, Interval, Ratio, Verdict, operator, within

MODEL = "lid.176.ftz"


@operator("filter", assets=lambda parameters, dialect: [MODEL])
def language_id_score_filter(
    column: Column,
    *,
    lang: str | list[str] | None = "",
    min_score: Ratio = 0.8,
    assets: Assets,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts whose language, by fastText, is one of `lang` (any where empty) with at least `min_score`.

    The text is lower-cased and its newlines become spaces, as in data-juicer. Scores may exceed 1 by rounding.
    """
    model = load_classifier(assets[MODEL])
    answers, probabilities = predict(model, *column.utf8)
    languages = np.array(model.labels, dtype=object)[answers]
    scores = probabilities.astype(np.float64)
    ranged = within("lang_score", scores, {"min_score": min_score, "max_score": float("inf")}, interval)
    wanted = [lang] if isinstance(lang, str) and lang else list(lang or ())
    spoken = np.isin(languages, wanted) if wanted else np.ones(len(scores), dtype=np.bool_)

    def reasons(rows: Indices) -> list[str]:
        told = ranged.reasons(rows)
        return [
            reason if spoken[row] else f"lang {languages[row]} (score {scores[row]:.4g}) is not {' or '.join(wanted)}"
            for row, reason in zip(rows, told, strict=True)
        ]

    return Verdict(ranged.keep & spoken, {"lang": languages, "lang_score": scores}, reasons)
