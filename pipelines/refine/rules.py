"""What is wrong with a synthesized answer: one small function per defect, each with the defect's name.

A rule takes the answer and what it should be and returns whether the answer has the defect. Adding one is a function
and a line in `RULES`; a defect that can be mended has a function in `FIXES` as well.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import regex

from pipelines.recipe.synthesize import Style

Aliases = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Expected:
    """What an answer should be: its cell, the style's demands, all values of the grid, and other words for them."""

    cell: Mapping[str, str]
    style: Style
    dimensions: Mapping[str, Sequence[str]]
    aliases: Aliases = field(default_factory=dict)


_EMOJI = regex.compile(r"[\p{Emoji_Presentation}\p{Extended_Pictographic}]")
_MARK = r"[！!。，,、；;～~…]"
_AFTER = r"(?=$|[～~！!。，,\s]|\p{Emoji_Presentation}|\p{Extended_Pictographic})"
_PARTICLE = regex.compile(rf"{_MARK}[\s\uFE0F]*([啦哦呀哟呢嘛喔咯嘞噢哈]){_AFTER}")
_QUOTES = ("“”", '""', "「」", "『』", "‘’", "''", "《》")

_LEAD = regex.compile(
    r"""^\W*(?:
        (?:好的|当然|没问题|收到|明白了?|可以的|OK)[，,。！!、～~：:\s]  # talks to the person who asked
        |(?:以下|下面|如下|这里|这|当前|根据|按照|为您|为你|给您|给你)[^。！!\n]{0,30}
            (?:祝福|文案|贺词|寄语|内容|短信|一句话|一段话|句子|版本|要求)[^。！!，\n]{0,12}[：:]
        |(?:祝福语?|祝词|贺词|标题|主题|文案|正文|答案?|回答|输出|送[给祝][^，。！\n]{1,10}|[^，。！!\n]{1,12}(?:贺|贺词|祝福语?|篇|版))[：:]
        |[\#＃]+\s|\*\*|[【\[《][^】\]》\n]{1,20}[】\]》]\s*\S
        |\d+[.、)）]\s*\S
    )""",
    regex.VERBOSE | regex.IGNORECASE,
)
_TRAIL = regex.compile(
    r"""(?:
        [（(](?:注|备注|说明|或[：:]|解释|字数|共\d+字|\d+字)[^）)]*[）)]?
        |(?:^|[。！!？?～~\n\s])(?:希望(?:这|以上|您|你)[^。！!]{0,16}(?:喜欢|满意|符合|有?帮助|合适))
        |(?:如果|如需|若)[^。！!]{0,20}(?:修改|调整|告诉我|更多|其他)
        |(?<!\p{Han})(?:注|备注|说明|解释|字数|注意|温馨提示)[：:]
        |emoji\s*表情|表情包[：:]|以上(?:就)?是
        |\*\*$
    )""",
    regex.VERBOSE | regex.IGNORECASE,
)
_TRAIL_CHARACTERS = 80
"""A remark stands at the end: so many characters are looked through."""
_PLACEHOLDER = regex.compile(
    r"[\[【（(](?:此处|这里|插入|填写|停顿|配图|图片|表情)[^\]】）)\n]{0,20}[\]】）)]"
    r"|[\[【](?:您|你|对方)?的?(?:名字|姓名|称呼)[\]】]"
)
"""A stage direction (`[此处故意卖萌]`), or a gap that somebody should have filled."""
_DECLINES = r"(?:无法|不能|没法|没有办法|不便|不会|不可以|不适合|不支持|未能|帮不了|难以)"
_NON_ANSWER = regex.compile(
    rf"""(?:
        ^\W*(?:好的[，,]?)?(?:当前|以下|下面|这|这里|为您|为你|我的?)?[^，。！!\n]{{0,14}}(?:祝福|文案|贺词|寄语|内容)[^，。！!\n]{{0,8}}
            (?:如下|是|为|请看|请查收|生成(?:完毕|中)|有)?[：:。.…\s]*$
        |^\W*(?:尊敬|敬爱|亲爱)的[^，。！!\n]{{1,12}}[：:，,]\s*$
        |^\W*[^，。！!：:\n]{{1,8}}[，,：:]?\s*[您你]好[呀啊]?[！!。～~，,：:\s]*$
        |^\W*(?:好的|当然|没问题|收到|明白了?|可以)[，,。！!～~\s]*
            (?:请稍等|马上|我来|请问)?[^，。\n]{{0,12}}[。！!～~？?]*$
        |^\W*(?:非常|很|十分|真的?)?(?:抱歉|对不起|不好意思|遗憾)[，,！!。\s]*(?:[^。！!\n]{{0,24}}{_DECLINES}|$)
        |^\W*(?:我|作为|目前|暂时|这边|本)[^。！!\n]{{0,16}}(?:AI|人工智能|语言模型)
        |^\W*(?:我|本人|目前|暂时|作为|这边|系统)?[^。，！!\n]{{0,6}}{_DECLINES}(?:为您|为你|给您|给你|直接)?
            (?:提供|生成|满足|撰?写|回答|处理|协助)
        |^[^\n]{{0,30}}请(?:[您你])?(?:提供|告诉我|输入|补充|说明)[^。！!\n]{{0,20}}[。！!？?～~]*$
        |^\W*请问[^。！!\n]{{0,30}}[？?]?$
    )""",
    regex.VERBOSE | regex.IGNORECASE,
)
"""Looked for at the beginning, or in an answer that holds nothing else: in its midst one may apologize, or ask."""


def empty(text: str, expected: Expected) -> bool:
    """Nothing but spaces, punctuation and emoji."""
    return regex.search(r"[\p{L}\p{N}]", text) is None


def non_answer(text: str, expected: Expected) -> bool:
    """Announces an answer, greets, asks back or declines, but does not give one (`当前祝福语如下`)."""
    return _NON_ANSWER.search(text.strip()) is not None


def explanation(text: str, expected: Expected) -> bool:
    """A title, an announcement, a remark, a stage direction or a second version stands around the answer.

    Where the style allows no lines, a second line is one of them.
    """
    text = text.strip()
    if "\n" in text and not expected.style.lines:
        return True
    end = text[-_TRAIL_CHARACTERS:]
    return any(sign.search(part) is not None for sign, part in ((_LEAD, text), (_TRAIL, end), (_PLACEHOLDER, text)))


def quotes(text: str, expected: Expected) -> bool:
    """The whole answer stands in quotation marks."""
    text = text.strip()
    return any(
        len(text) > 2 and text[0] == marks[0] and text[-1] == marks[1] and marks[1] not in text[1:-1]
        for marks in _QUOTES
    )


def particle(text: str, expected: Expected) -> bool:
    """A particle follows punctuation (`！啦~`, `。哦！`)."""
    return _PARTICLE.search(text) is not None


def opening(text: str, expected: Expected) -> bool:
    """Begins with a mark that follows something: the name that should stand there is missing."""
    return text.lstrip()[:1] in tuple("，,。、；;：:！!？?")


def length(text: str, expected: Expected) -> bool:
    """Shorter or longer, in characters, than the style allows."""
    style, count = expected.style, len(text.strip())
    return count < style.min_length or (style.max_length is not None and count > style.max_length)


def emoji(text: str, expected: Expected) -> bool:
    """Has emoji where the style forbids them, or none where it needs them."""
    if expected.style.emoji == "any":
        return False
    return (_EMOJI.search(text) is not None) == (expected.style.emoji == "forbidden")


def mismatch(text: str, expected: Expected) -> bool:
    """Addresses or celebrates another value of the grid, and does not mention the one that was asked for."""
    return any(_is_about_another(name, text.strip(), expected) for name in expected.dimensions)


def _is_about_another(dimension: str, text: str, expected: Expected) -> bool:
    own = _words(expected.cell[dimension], expected.aliases)
    if any(word in text for word in own):
        return False
    return any(
        regex.search(rf"^{_ADDRESS}{word}|{word}{_OCCASION}", text) is not None
        for value in expected.dimensions[dimension]
        if value != expected.cell[dimension]
        for word in map(regex.escape, _words(value, expected.aliases))
        if not any(word in mine or mine in word for mine in own)
    )


_ADDRESS = r"\W*(?:尊敬的|敬爱的|亲爱的|祝愿?|祝福|恭[祝贺喜]|愿|送给)?"
"""What may stand before the one who is addressed."""
_OCCASION = r"(?:节?(?:快乐|安康|愉快|大吉|吉祥|佳节|之喜|将至|来临|到))"
"""What follows the occasion that is celebrated."""


def _words(value: str, aliases: Aliases) -> list[str]:
    """A value, without `节` at its end, and the other words for it."""
    return [value.removesuffix("节") if len(value) > 2 else value, *aliases.get(value, ())]


Rule = Callable[[str, Expected], bool]

RULES: dict[str, Rule] = {
    rule.__name__: rule for rule in (empty, non_answer, explanation, quotes, particle, opening, length, emoji, mismatch)
}
"""In this order; the first that applies names the reason."""


def without_quotes(text: str) -> str:
    """The answer without the quotation marks around it."""
    return text.strip()[1:-1]


def without_mark(text: str) -> str:
    """The answer without the marks before particles."""
    mended: str = _PARTICLE.sub(r"\1", text)
    return mended


FIXES: dict[str, Callable[[str], str]] = {"quotes": without_quotes, "particle": without_mark}
