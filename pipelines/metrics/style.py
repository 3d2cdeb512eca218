"""Metrics of style that need no reference: repetition, variety, length, and marks of machine-made text.

Text is counted in units: every Chinese or Japanese character is one, every other run of letters and digits is one,
in lower case; punctuation and spaces count nothing. So Chinese needs no segmenter, and the numbers of Chinese and
English text are of the same kind.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence

import regex

from pipelines.recipe.evaluate import Mark

_UNIT = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}]|[^\W_\p{Han}\p{Hiragana}\p{Katakana}]+")
_EMOJI_CHARACTER = r"(?:\p{Emoji_Presentation}|\p{Emoji}\uFE0F)\p{Emoji_Modifier}?"
_EMOJI = regex.compile(
    rf"\p{{Regional_Indicator}}{{2}}|[0-9#*]\uFE0F?\u20E3|{_EMOJI_CHARACTER}(?:\u200D{_EMOJI_CHARACTER})*"
)
_LIST_ITEM = regex.compile(r"^ {0,3}(?:[-*+]\s+|\d{1,9}(?:[.)]\s+|、))\S", regex.MULTILINE)

HOW = {
    "rep-n": "share of an answer's n-grams that occurred in it before (Welleck 2020, seq-rep-n)",
    "loop": "answers that end in a phrase of two or more units said three times or more (Holtzman 2020)",
    "distinct-n": "different n-grams over all n-grams, of all answers together (Li 2016)",
    "length": "characters of an answer",
    "emoji": "emoji in an answer, a joined sequence being one",
    "lists": "answers with a Markdown list",
    "stock": "answers with one of the recipe's stock phrases",
}
"""How each metric is computed, for the report."""


def units(text: str) -> list[str]:
    """The units of a text: single Chinese and Japanese characters, lower-case words of everything else."""
    return list(_UNIT.findall(text.lower()))


def repetition(text: str, n: int) -> float:
    """The share of a text's n-grams that occurred in it before: 1 - different / all; 0 for fewer than n units.

    seq-rep-n of Welleck et al. 2020, Neural Text Generation with Unlikelihood Training.
    """
    grams = _ngrams(units(text), n)
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def loops(text: str) -> bool:
    """Whether a text ends in a phrase of two or more units that is said at least three times.

    The last time may be cut short, as it is where the answer hits its token limit, if three whole ones come before
    the cut. After Holtzman et al. 2020, The Curious Case of Neural Text Degeneration.
    """
    sequence = units(text)
    return any(_periodic_tail(sequence, period) >= 3 * period for period in range(2, len(sequence) // 3 + 1))


def _periodic_tail(sequence: Sequence[Hashable], period: int) -> int:
    """How many units at the end repeat with the given period, the first round included."""
    length = period
    while length < len(sequence) and sequence[-length - 1] == sequence[-length - 1 + period]:
        length += 1
    return length


def distinct(texts: Sequence[str], n: int) -> float:
    """Different n-grams over all n-grams of all texts together; 0 where there are none.

    Li et al. 2016, A Diversity-Promoting Objective Function for Neural Conversation Models.
    """
    grams = [gram for text in texts for gram in _ngrams(units(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def emoji(text: str) -> int:
    """How many emoji a text holds; flags, keycaps and sequences joined by U+200D are one each (Unicode TS 51)."""
    return len(_EMOJI.findall(text))


def has_list(text: str) -> bool:
    """Whether a line is a Markdown list item (CommonMark 0.31, 5.2), or begins with a number and 、 as in Chinese."""
    return _LIST_ITEM.search(text) is not None


def has_stock_phrase(text: str, phrases: Sequence[str]) -> bool:
    """Whether a text holds one of the phrases, in any case."""
    lowered = text.lower()
    return any(phrase.lower() in lowered for phrase in phrases)


def per_answer(answers: Sequence[str], phrases: Sequence[str]) -> dict[str, list[float]]:
    """Every metric that one answer has by itself, for each answer in order."""
    metrics: dict[str, Callable[[str], float]] = {
        "length": len,
        "rep-2": lambda text: repetition(text, 2),
        "rep-3": lambda text: repetition(text, 3),
        "rep-4": lambda text: repetition(text, 4),
        "loop": loops,
        "emoji": emoji,
        "lists": has_list,
        "stock": lambda text: has_stock_phrase(text, phrases),
    }
    return {name: [float(metric(answer)) for answer in answers] for name, metric in metrics.items()}


def marked(queries: Sequence[str], answers: Sequence[str], marks: Mapping[str, Mark]) -> dict[str, list[float]]:
    """Every mark of the recipe, for each answer to a question it applies to; marks that apply to none are left out.

    With `each`, the share of what the question names that the answer repeats, as AdvertiseGen's attributes (Shao et
    al. 2019, Long and Diverse Text Generation with Planning-based Hierarchical Variational Model); with `answer`, 1
    where the answer matches.
    """
    pairs = list(zip(queries, answers, strict=True))
    values = {
        name: [value for pair in pairs if (value := _mark(*pair, mark)) is not None] for name, mark in marks.items()
    }
    return {name: found for name, found in values.items() if found}


def _mark(query: str, answer: str, mark: Mark) -> float | None:
    if not regex.search(mark.where, query):
        return None
    if mark.answer is not None:
        return float(regex.search(mark.answer, answer) is not None)
    wanted = {text.strip() for text in regex.findall(mark.each, query)} - {""}
    return sum(text in answer for text in wanted) / len(wanted) if wanted else None


def over_answers(answers: Sequence[str]) -> dict[str, float]:
    """Every metric that only all answers together have."""
    return {f"distinct-{n}": distinct(answers, n) for n in (1, 2, 3)}


def _ngrams(sequence: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(sequence[i : i + n]) for i in range(len(sequence) - n + 1)]
