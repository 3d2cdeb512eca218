"""Texts that nobody can read, by what can be seen without a language model."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import regex

from pipelines.clean.column import Column, Indices, Mask
from pipelines.clean.kernels.han_pairs import DIFFERENT, HAN, HOME_ROW, LETTERS, MOST, PAIRS
from pipelines.clean.operators.registry import Ratio, Verdict, operator

_ENCODED = regex.compile(
    r"(?:%[0-9A-Fa-f]{2}){3,}|(?:\\u[0-9A-Fa-f]{4}){2,}|(?:\\x[0-9A-Fa-f]{2}){3,}|"
    r"(?<![0-9A-Za-z])(?:[0-9a-fA-F]{2} ){7,}[0-9a-fA-F]{2}|"
    r"(?<![0-9A-Za-z+/])[A-Za-z0-9+/]{40,}={0,2}(?![0-9A-Za-z+/])|(?:&#x?[0-9A-Fa-f]+;){3,}"
)
"""Bytes written as text: in URLs, escapes, hexadecimal digits, base64, entities."""
_MISDECODED = regex.compile("(?:锟斤拷|烫烫烫|屯屯屯|�){2,}|锘縗|(?=[¡-¿]*[À-ÿ])[ÀÃÂÄÅÆÇ-ïð-ÿ¡-¿]{6,}")
_SEPARATED = regex.compile(r"[\s,|/;]+")
_HAN = regex.compile(r"\p{Han}")
LONG_ENOUGH, NEW_PAIRS, MOSTLY_HAN = 20, 60, 0.8
"""Han characters from which repetition tells; so many different pairs are enough, since long texts repeat their words;
a text with more else in it is a table, a sum or code."""


def variety(counts: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
    """Different pairs of Han characters over the pairs of a text, or over as many as are enough in a long one, which
    may have more; from `Column.pairs`. 1 for short texts and for code."""
    pairs = np.maximum(counts[:, PAIRS], 1)
    shares = counts[:, DIFFERENT] / np.minimum(pairs, NEW_PAIRS)
    tells = (counts[:, HAN] >= LONG_ENOUGH) & (counts[:, HAN] >= MOSTLY_HAN * counts[:, LETTERS])
    return np.asarray(np.where(tells, shares, 1.0))


def _is_one_word(counts: npt.NDArray[np.int64]) -> Mask:
    """One word in place of all others."""
    han = counts[:, HAN]
    often = np.maximum(5, 0.45 * han / 2)
    return np.asarray((counts[:, MOST] > often) & (han >= MOSTLY_HAN * counts[:, LETTERS]))


def _is_list(text: str, most: int) -> bool:
    """Whether the word that comes so often stands in another item of a list each time, as in 清华大学、北京大学."""
    return text.count("、") >= most - 1


_MENU = regex.compile(
    "首页|上一页|下一页|尾页|末页|登录|登陆|注册|返回顶部|返回首页|版权(?:所有|声明)?|备案号?|友情链接|关于我们|联系我们|网站地图|设为首页|加入收藏|"
    "请输入(?:文本|内容|标题|关键词)?|点击此处(?:添加|输入|编辑)?|此处填写|占位(?:符|文本)?|副?标题|正文|内容|搜索|分享|打印|关闭|更多|广告|"
    "首頁|上一頁|下一頁|登入|註冊|返回頂部|關於我們|聯絡我們|版權(?:所有|聲明)?"
)
"""Words of a page's frame and of a form not filled in."""
_COMPONENTS = frozenset("亻冫冖讠阝刂勹匚卩厶廴彳彡忄扌氵犭纟饣钅礻衤罒爫攵疒糹釒訁") | frozenset(
    map(chr, range(0x2E80, 0x2FE0))
)
"""Parts of characters, which stand in no text by themselves."""
_FUNCTION_WORDS = regex.compile(
    "因为|所以|而且|但是|或者|如果|虽然|然后|其实|就是|不过|之所以|的话|这个|那个|这样子?|那么|什么|时候|我们|他们|大家|很多|因為|這個|這樣子?|"
    "那個|我們|他們|雖然|然後|其實|對不對|是不是|[的了是在有和不也都就吧吗呢啊嘛說说而且会能到在于這於]"
)
_EMOJI = regex.compile(r"\p{Emoji_Presentation}")
_NO_SYLLABLES = regex.compile("(?i)^[^aeiouy]+$|[^aeiouy]{5}")
_LATIN_WORD = regex.compile("[A-Za-z]{5,}")
_MARKS_IN_A_ROW = regex.compile(r"[,.;。，；]{2}|[,.;] ?[,.;]")
_PARTED = regex.compile(r"\p{P}|\s")


def _is_frame(text: str) -> bool:
    """Menus, footers and placeholders of a page, and nothing else."""
    found = _MENU.findall(text)
    return len(found) > 3 and sum(map(len, found)) * 10 >= 7 * sum(character.isalpha() for character in text)


def _is_home_row(counts: npt.NDArray[np.int64]) -> Mask:
    """Keys of the home row hit at random, through an input method."""
    han, home = counts[:, HAN], counts[:, HOME_ROW]
    return np.asarray((han >= LONG_ENOUGH) & (home >= 0.75 * han) & (counts[:, DIFFERENT] <= NEW_PAIRS))


def _is_mashed(text: str) -> bool:
    """Letters that no word has, and marks in a row."""
    unreadable = [word for word in _LATIN_WORD.findall(text) if _NO_SYLLABLES.search(word)]
    if not unreadable or not _MARKS_IN_A_ROW.search(text):
        return False
    return sum(map(len, unreadable)) * 4 >= sum(character.isalpha() for character in text)


def _is_cipher(text: str) -> bool:
    """A long run of letters that no word has, and little else."""
    unreadable = sum(len(word) for word in _LATIN_WORD.findall(text) if _NO_SYLLABLES.search(word))
    return unreadable >= LONG_ENOUGH and unreadable * 4 >= 3 * sum(character.isalnum() for character in text)


def _is_taken_apart(text: str) -> bool:
    """Characters that a scanner saw as their parts: 氵去 for 法."""
    parts = sum(character in _COMPONENTS for character in text)
    return parts > 2 and parts * 12 >= len(_HAN.findall(text))


def _is_of_function_words(text: str) -> bool:
    """A long row of words that mean nothing by themselves."""
    if len(text) < 30 or _PARTED.search(text.strip()):
        return False
    return sum(map(len, _FUNCTION_WORDS.findall(text))) >= 0.75 * len(text)


def _is_told_by_emoji(text: str) -> bool:
    """Emoji in place of every other word."""
    runs = [run for run in _EMOJI.split(text) if run.strip()]
    return len(runs) > 5 and len(_EMOJI.findall(text)) > 5 and max(map(len, runs)) <= 3


_SPOKEN = regex.compile(r"[。！？：]|(?:^|\s)\d{1,2}[.、]")
"""Marks of sentences and of a numbered list."""


def _is_strung(text: str) -> bool:
    """Search words in a row: many short parts, of which most hold one and the same word, and no sentence."""
    if _SPOKEN.search(text):
        return False
    parts = [part for part in _SEPARATED.split(text.strip()) if part]
    if len(parts) < 6 or max(map(len, parts)) > 14:
        return False
    words = {part[at : at + 2] for part in parts for at in range(len(part) - 1) if part[at : at + 2].isalpha()}
    return any(sum(word in part for part in parts) >= 0.7 * len(parts) for word in words)


_BYTES = (
    r"(?:%[0-9A-Fa-f]{2}){3}|(?:\\u[0-9A-Fa-f]{4}){2}|(?:\\x[0-9A-Fa-f]{2}){3}|(?:[0-9a-fA-F]{2} ){7}|"
    r"[A-Za-z0-9+/]{40}|(?:&#x?[0-9A-Fa-f]+;){3}|(?:锟斤拷|烫烫烫|屯屯屯|�){2}|锘縗|[¡-ÿ]{6}"
)
"""All that `_ENCODED` and `_MISDECODED` find, and a little more."""


def _is_encoded(text: str, max_encoded: float) -> str | None:
    visible = max(1, len(regex.sub(r"\s", "", text)))
    encoded = sum(len(regex.sub(r"\s", "", match)) for match in _ENCODED.findall(text))
    if encoded > max_encoded * visible:
        return f"{encoded / visible:.0%} of the text is encoded bytes"
    broken = sum(map(len, _MISDECODED.findall(text)))
    return "decoded with the wrong table" if broken > max_encoded * visible or broken > 10 else None


def _without_sentence(text: str) -> str | None:
    if _is_frame(text):
        return "the frame of a page without its text"
    if _is_of_function_words(text):
        return "words without a content"
    return "words strung together without a sentence" if _is_strung(text) else None


def _seen(column: Column, max_encoded: float) -> dict[int, str]:
    """What a look at a text tells, by row; only texts are looked at in which there may be something to see."""
    parts = f"[{''.join(sorted(_COMPONENTS))}]"
    looks: list[tuple[Mask, Callable[[str], str | None]]] = [
        (column.matches(_BYTES), lambda text: _is_encoded(text, max_encoded)),
        (
            column.matches(f"(?s){parts}.*{parts}.*{parts}"),
            lambda text: "characters taken apart, as by a scanner" if _is_taken_apart(text) else None,
        ),
        (
            column.matches("[A-Za-z]{5}") & column.matches(_MARKS_IN_A_ROW.pattern),
            lambda text: "keys hit at random" if _is_mashed(text) else None,
        ),
        (
            column.matches("[A-Za-z]{5}") & ~column.matches(r"\p{Han}"),
            lambda text: "keys hit at random" if _is_cipher(text) else None,
        ),
        (
            column.matches(r"[\x{2300}-\x{2BFF}\x{1F000}-\x{1FAFF}]"),
            lambda text: "words without a content" if _is_told_by_emoji(text) else None,
        ),
        (~column.matches("[。！？]"), _without_sentence),
    ]
    found: dict[int, str] = {}
    for may_tell, look in looks:
        rows = np.flatnonzero(may_tell)
        for row, text in zip(rows.tolist(), column.array.take(pa.array(rows)).to_pylist(), strict=True):
            if row not in found and (reason := look(text)):
                found[row] = reason
    return found


@operator("filter", version=4)
def garbled_text_filter(column: Column, *, max_encoded: Ratio = 0.5, min_variety: Ratio = 0.45) -> Verdict:
    """Drop texts of encoded bytes or broken characters, of one phrase over and over, of strung search words, of the
    frame of a page, of keys hit at random, and of words without a content.

    `max_encoded` is the share of encoded or broken characters from which a text goes, `min_variety` the share of its
    pairs of characters that differ, below which it goes.
    """
    counts = column.pairs
    different = variety(counts)
    found: dict[int, str] = {}
    for row in np.flatnonzero(_is_one_word(counts)).tolist():
        if not _is_list(column.array[row].as_py(), counts[row, MOST]):
            found[row] = "words without a content"
    found |= dict.fromkeys(np.flatnonzero(_is_home_row(counts)).tolist(), "keys hit at random")
    for row in np.flatnonzero(different < min_variety).tolist():
        found[row] = f"repeats itself: {different[row]:.2f} of its pairs of characters differ"
    found |= _seen(column, max_encoded)
    keep = np.ones(len(column), dtype=np.bool_)
    keep[list(found)] = False

    def reasons(rows: Indices) -> list[str]:
        return [found[int(row)] for row in rows]

    return Verdict(keep, {"garbled": (~keep).astype(np.float64)}, reasons)
