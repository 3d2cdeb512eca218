"""Words as data-juicer counts them: whitespace-separated, or pieces of a sentencepiece model."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from pipelines.clean.kernels.characters import special_characters


def sentencepiece_of(lang: str) -> str:
    """The name of the sentencepiece model of a language, as data-juicer names it."""
    return f"{lang}.sp.model"


@cache
def _processor(path: str) -> Any:
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=path)


def pieces(texts: list[str], model: str) -> list[list[str]]:
    """The sentencepiece pieces of each text; `model` is the path of the model file."""
    split: list[list[str]] = _processor(model).encode(texts, out_type=str, num_threads=1)
    return split


def words(text: str) -> list[str]:
    """What spaces, newlines and tabs separate."""
    return [word for word in re.split("[ \n\t]", text) if word]


@cache
def _edge_characters() -> str:
    return "".join(sorted(special_characters()))


def refined(given: Sequence[str]) -> list[str]:
    """Words in lower case without special characters at their ends; those of nothing else vanish."""
    return [kept for word in given if (kept := word.lower().strip(_edge_characters()))]


def runs(given: Sequence[str], size: int, join: str) -> list[str]:
    """All runs of `size` consecutive words."""
    return [join.join(given[i : i + size]) for i in range(len(given) - size + 1)]
