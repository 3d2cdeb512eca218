"""Language identification by fastText's lid.176 model."""

from functools import cache
from typing import Any

import fasttext
import numpy as np

from pipelines.clean.column import Column, Indices
from pipelines.clean.operators.registry import CLOSED, Assets, Interval, Ratio, Verdict, operator, within

MODEL = "lid.176.ftz"


@cache
def _model(path: str) -> Any:
    return fasttext.load_model(path)


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
    model = _model(assets[MODEL])
    answers = [model.predict(text.lower().replace("\n", " ")) for text in column.texts()]
    languages = np.array([labels[0].removeprefix("__label__") for labels, _ in answers], dtype=object)
    scores = np.array([float(values[0]) for _, values in answers], dtype=np.float64)
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
