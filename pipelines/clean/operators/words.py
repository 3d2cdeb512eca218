"""Words as data-juicer counts them: whitespace-separated, pieces of a sentencepiece model, or a tokenizer's tokens."""

import re
from collections.abc import Sequence
from functools import cache
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.clean.column import Indices
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


def piece_numbers(texts: list[str], model: str) -> tuple[Indices, Indices]:
    """The same as numbers in the model's vocabulary, all texts' one after the other, and where each text begins."""
    split: list[list[int]] = _processor(model).encode(texts, out_type=int, num_threads=1)
    offsets = np.cumsum([0, *map(len, split)], dtype=np.int64)
    return np.fromiter(chain.from_iterable(split), dtype=np.int64, count=int(offsets[-1])), offsets


def vocabulary(model: str) -> list[str]:
    """All pieces of a model, by their numbers."""
    processor = _processor(model)
    return [processor.id_to_piece(number) for number in range(processor.vocab_size())]


def unknown_piece(model: str) -> int:
    """The number of the piece that stands for whatever is in no other."""
    return int(_processor(model).unk_id())


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
