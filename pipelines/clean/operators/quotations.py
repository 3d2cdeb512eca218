"""Answers that only quote, and sentences that a text repeats."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import regex

from pipelines.clean.column import Column, Indices
from pipelines.clean.kernels.sentences import may_repeat
from pipelines.clean.operators.registry import Count, Dialect, Verdict, operator

_QUOTED_LINE = regex.compile(r"(?m)^[ \t]*[>＞](?![>＞]) ?.*$")
_QUOTED = regex.compile(r"“[^“”]*”|「[^「」]*」|『[^『』]*』|‘[^‘’]*’|\"[^\"\n]*\"")
_MAY_QUOTE = rf"(?m:^[ \t]*[>＞])|{_QUOTED.pattern}"
_ATTRIBUTION = regex.compile(
    r"(?:—|–|-|─){1,3} ?[^，。！？\n—]{1,20}(?=$|\n)"
    r"|(?:以上|本文|全文|原文)?(?:文章|内容|文字|原文)?(?:引用?|摘|转|载|出|来)(?:自|源于?|载自?|于)[：: ]?"
    r"[^，。！？\n]{0,30}"
    r"|(?:引用|原文|出处|来源|作者|原作者|原答案|转载)[：:][^，。！？\n]{0,30}"
    r"|(?:正如|就像|借用|引用)?[^，。！？\n“「]{0,8}(?:说过|说|写道|曾言|有云|云|曰|的(?:[这那一]?句)?话)(?:过?的?一?句?话?)?[：:，,]"
)
ENOUGH_QUOTED, LITTLE_OWN, LONGEST_ATTRIBUTION = 10, 6, 150
"""Letters quoted from which a text can be a quotation; letters of its own below which it is nothing else;
characters that all its sources may take."""


def _letters(text: str) -> int:
    return sum(character.isalnum() for character in text)


def only_quotes(text: str) -> bool:
    """Whether all of a text is somebody else's: quoted lines, or quotations and whom they are from.

    A text in quotation marks of which nobody is named is an answer, such as a title or a slogan, and so is dialogue.
    """
    unquoted = _QUOTED_LINE.sub("", text)
    rest = _QUOTED.sub("", unquoted)
    if len(rest) > LONGEST_ATTRIBUTION or _letters(text) - _letters(rest) < ENOUGH_QUOTED:
        return False
    own = _ATTRIBUTION.sub("", rest)
    is_attributed = unquoted != text or own != rest
    return is_attributed and _letters(own) < LITTLE_OWN


@operator("filter", version=2)
def quotation_filter(column: Column) -> Verdict:
    """Drop texts that are nothing but a quotation and its source; a word of one's own keeps it."""
    keep = np.ones(len(column), dtype=np.bool_)
    rows = np.flatnonzero(column.matches(_MAY_QUOTE))
    for row, text in zip(rows.tolist(), column.array.take(pa.array(rows)).to_pylist(), strict=True):
        keep[row] = not only_quotes(text)

    def reasons(gone: Indices) -> list[str]:
        return ["nothing but a quotation"] * len(gone)

    return Verdict(keep, {"quotation": (~keep).astype(np.float64)}, reasons)


_SENTENCE_ENDS = (
    (regex.compile(r"([.。！!？\?])([^’”])"), r"\1\n\2"),
    (regex.compile(r"(\.{6})([^’”])"), r"\1\n\2"),
    (regex.compile(r"(\…{2})([^’”])"), r"\1\n\2"),
    (regex.compile(r"([.。!！？\?\.{6}\…{2}][’”])([^’”])"), r"\1\n\2"),
)
"""Where data-juicer ends a sentence."""
_NOT_COMPARED = regex.compile("[^a-zA-Z0-9\u4e00-\u9fa5\n\t ]")
_CODE = regex.compile(r"```|(?m:^[ \t]{2,}\S|[;{}]\s*$)")
_TABLE = regex.compile(r"(?m)^\s*\|.*\|\s*$")
_SIGNS = regex.compile(r"[<>=≤≥≠≈+*/^-]")
"""Signs by which sentences differ in meaning: 当 a>b 时, 当 a<b 时."""
SENTENCE_OF_ITS_OWN = 10
"""Characters from which `zh` takes a sentence that comes again for a slip; shorter ones are answers and refrains."""


def _sentences(line: str) -> list[str]:
    for end, parted in _SENTENCE_ENDS:
        line = end.sub(parted, line)
    return line.split("\n")


_SENTENCE = regex.compile(r"[^。！!？?…]*?(?:[。！!？?…]+[”’」』）)]*|\.(?=\s)|$)")


def _chinese_sentences(line: str) -> list[str]:
    found: list[str] = _SENTENCE.findall(line)
    return found


def _without_repeats(
    text: str,
    split: Callable[[str], list[str]],
    shortest: int,
    lowercase: bool,
    ignore_special_character: bool,
    signs: regex.Pattern[str] | None = None,
) -> str:
    seen: set[tuple[str, ...]] = set()
    lines = []
    for line in text.split("\n"):
        kept = ""
        for sentence in split(line) if line else []:
            compared = sentence.strip().lower() if lowercase else sentence.strip()
            compared = _NOT_COMPARED.sub("", compared) if ignore_special_character else compared
            if len(compared) < shortest:
                kept += sentence
            elif (key := (compared, *(signs.findall(sentence) if signs else ()))) not in seen:
                kept += sentence
                seen.add(key)
        lines.append(kept)
    return "\n".join(lines)


@operator("mapper", version=2)
def remove_repeat_sentences_mapper(
    column: Column,
    *,
    lowercase: bool = False,
    ignore_special_character: bool = True,
    min_repeat_sentence_length: Count | None = None,
    tokenizer: None = None,
    dialect: Dialect = "zh",
) -> pa.Array:
    """Remove sentences that stood in the text before; of fewer characters than `min_repeat_sentence_length` they stay.

    That is 2 in data-juicer's dialect and 10 in `zh`, where code, tables and verse stay as they are, signs such as <
    and + tell sentences apart, and a line that becomes empty goes.
    """
    if dialect == "data_juicer":
        shortest = 2 if min_repeat_sentence_length is None else min_repeat_sentence_length
        everything = column.matches("")
        return column.rewrite(
            everything, lambda text: _without_repeats(text, _sentences, shortest, lowercase, ignore_special_character)
        )
    least = SENTENCE_OF_ITS_OWN if min_repeat_sentence_length is None else min_repeat_sentence_length

    def changed(text: str) -> str:
        lines = [line.strip() for line in text.split("\n") if line.strip()]
        if (
            _CODE.search(text)
            or _TABLE.search(text)
            or (len(lines) > 3 and max(map(len, lines)) <= 2 * SENTENCE_OF_ITS_OWN)
        ):
            return text
        done = _without_repeats(text, _chinese_sentences, least, lowercase, ignore_special_character, _SIGNS)
        if done == text:
            return text
        pairs = zip(text.split("\n"), done.split("\n"), strict=True)
        return "\n".join(after for before, after in pairs if after.strip() or not before.strip())

    if lowercase:
        return column.rewrite(column.lengths >= 2 * least, changed)
    return column.rewrite(may_repeat(*column.utf8, least if ignore_special_character else 0), changed)
