"""Words as data-juicer counts them: whitespace-separated, or pieces of a sentencepiece model."""

from functools import cache
from typing import Any


def sentencepiece_of(lang: str) -> str:
    """The name of the sentencepiece model of a language, as data-juicer names it."""
    return f"{lang}.sp.model"


@cache
def _processor(path: str) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=path)


def pieces(texts: list[str], model: str) -> list[list[str]]:
    """The sentencepiece pieces of each text; `model` is the path of the model file."""
    split: list[list[str]] = _processor(model).encode(texts, out_type=str)
    return split
