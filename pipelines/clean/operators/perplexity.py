"""Perplexity by a KenLM model over sentencepiece pieces, as in CCNet."""

from functools import cache
from typing import Any

import numpy as np

from pipelines.clean.column import Column
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


@operator("filter", packages=("kenlm", "sentencepiece"), assets=_files)
def perplexity_filter(
    column: Column,
    *,
    lang: str = "en",
    min_ppl: float = 0,
    max_ppl: float = 1500,
    assets: Assets,
    interval: Interval = CLOSED,
) -> Verdict:
    """Keep texts by their perplexity under the KenLM model of `lang`, rounded to one decimal."""
    model = _model(assets[_kenlm_of(lang)])
    split = pieces(column.texts(), assets[sentencepiece_of(lang)])
    scores = np.array([_perplexity(" ".join(row), model) for row in split], dtype=np.float64)
    return within("perplexity", scores, {"min_ppl": min_ppl, "max_ppl": max_ppl}, interval)
