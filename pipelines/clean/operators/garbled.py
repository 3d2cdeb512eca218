"""Texts that nobody can read, by what can be seen without a language model."""

import numpy as np
import regex

from pipelines.clean.column import Column, Indices
from pipelines.clean.operators.registry import Ratio, Verdict, operator

_ENCODED = regex.compile(
    r"(?:%[0-9A-Fa-f]{2}){3,}|(?:\\u[0-9A-Fa-f]{4}){2,}|(?:\\x[0-9A-Fa-f]{2}){3,}|"
    r"(?<![0-9A-Za-z])(?:[0-9a-fA-F]{2} ){7,}[0-9a-fA-F]{2}|"
    r"(?<![0-9A-Za-z+/])[A-Za-z0-9+/]{40,}={0,2}(?![0-9A-Za-z+/])|(?:&#x?[0-9A-Fa-f]+;){3,}"
)
"""Bytes written as text: in URLs, escapes, hexadecimal digits, base64, entities."""
_MISDECODED = regex.compile("(?:锟斤拷|烫烫烫|屯屯屯|�){2,}|锘縗|[ÀÃÂÄÅÆÇ-ïð-ÿ¡-¿]{6,}")
_LAUGHTER = regex.compile(r"([哈呵嘿嘻啊]|[^\p{L}\p{N}])\1+")
_SEPARATED = regex.compile(r"[\s,|/;]+")
_HAN = regex.compile(r"\p{Han}")
LONG_ENOUGH, NEW_PAIRS, MOSTLY_HAN = 20, 60, 0.8
"""Han characters from which repetition tells; so many different pairs are enough, since long texts repeat their words;
a text with more else in it is a table, a sum or code."""


def variety(text: str) -> float:
    """Different pairs of Han characters over all pairs; laughter counts once, and code does not. 1 for short texts."""
    han = "".join(_HAN.findall(_LAUGHTER.sub(r"\1", text)))
    letters = sum(character.isalnum() for character in text)
    if len(han) < LONG_ENOUGH or len(han) < MOSTLY_HAN * letters:
        return 1.0
    pairs = [han[at : at + 2] for at in range(len(han) - 1)]
    expected = min(1.0, NEW_PAIRS / len(pairs))
    return len(set(pairs)) / len(pairs) / expected


def _is_strung(text: str) -> bool:
    """Search words in a row: many short parts, of which most hold one and the same word, and no sentence."""
    parts = [part for part in _SEPARATED.split(text.strip()) if part]
    if len(parts) < 6 or regex.search("[。！？：]", text) or max(map(len, parts)) > 14:
        return False
    words = {part[at : at + 2] for part in parts for at in range(len(part) - 1) if part[at : at + 2].isalpha()}
    return any(sum(word in part for part in parts) >= 0.7 * len(parts) for word in words)


def _reason(text: str, max_encoded: float, min_variety: float) -> str | None:
    visible = len(regex.sub(r"\s", "", text))
    encoded = sum(len(regex.sub(r"\s", "", match)) for match in _ENCODED.findall(text))
    if encoded > max_encoded * max(visible, 1):
        return f"{encoded / visible:.0%} of the text is encoded bytes"
    if (broken := sum(map(len, _MISDECODED.findall(text)))) > max_encoded * max(visible, 1) or (
        _MISDECODED.search(text) and broken > 10
    ):
        return "decoded with the wrong table"
    if (different := variety(text)) < min_variety:
        return f"repeats itself: {different:.2f} of its pairs of characters differ"
    return "words strung together without a sentence" if _is_strung(text) else None


@operator("filter")
def garbled_text_filter(column: Column, *, max_encoded: Ratio = 0.5, min_variety: Ratio = 0.45) -> Verdict:
    """Drop texts of encoded bytes or broken characters, of one phrase over and over, and of strung search words.

    `max_encoded` is the share of encoded or broken characters from which a text goes, `min_variety` the share of its
    pairs of characters that differ, below which it goes.
    """
    found: dict[int, str] = {}
    for row, text in enumerate(column.texts()):
        if reason := _reason(text, max_encoded, min_variety):
            found[row] = reason
    keep = np.ones(len(column), dtype=np.bool_)
    keep[list(found)] = False

    def reasons(rows: Indices) -> list[str]:
        return [found[int(row)] for row in rows]

    return Verdict(keep, {"garbled": (~keep).astype(np.float64)}, reasons)
