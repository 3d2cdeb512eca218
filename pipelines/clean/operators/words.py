"""Words as data-juicer counts them: whitespace-separated, pieces of a sentencepiece model, or a tokenizer's tokens."""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

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


PYTHIA = "EleutherAI/pythia-6.9b-deduped"
"""data-juicer's tokenizer where none is named."""


def tokenizer_of(name: str) -> str:
    """The file of a tokenizer, by the name of its repository or folder."""
    return f"{name}/tokenizer.json"


@cache
def _tokenizer(path: str) -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(path)


def token_counts(texts: list[str], file: str) -> npt.NDArray[np.int64]:
    """How many tokens each text has, special ones around it not among them; `file` is a tokenizer.json."""
    encoded = _tokenizer(file).encode_batch_fast(texts, add_special_tokens=False)
    return np.array([len(row.ids) for row in encoded], dtype=np.int64)


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
