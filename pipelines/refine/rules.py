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


_EMOJI = regex.compile(r"\p{Emoji_Presentation}|\p{Emoji}\uFE0F|[☀-☄☎☕☘☝☠☹☺♀♂♠♣♥♦♨♻⚡✂✈✉✌✍✏✔✨❄❣❤➡]")
"""What is shown in colours: marks such as ★, ™ and ① are text."""
_MARK = r"[！!。，,、；;～~…]"
_AFTER = r"(?=$|[～~！!。，,\s]|\p{Emoji_Presentation}|\p{Extended_Pictographic})"
_PARTICLE = regex.compile(rf"{_MARK}[\s\uFE0F]*([啦哦呀哟呢嘛喔咯嘞噢哈]){_AFTER}")
_QUOTES = ("“”", '""', "「」", "『』", "‘’", "''", "《》")

_NOUN = (
    r"(?:祝福|文案|贺词|祝寿?词|寄语|内容|短信|致辞|发言稿|回信|一句话|一段话|句子|版本|要求|诗|绝句|律诗|对联|春联|信)"
)
"""What an announcement announces."""
_LEAD = regex.compile(
    rf"""^\W*(?:
        (?:好的|当然(?:可以)?|没问题|收到|明白了?|可以的|OK)[，,。！!、～~：:\s]  # talks to the person who asked
        |(?:以下|下面|如下|这里?是|这首诗|这段话|这封信|当前|根据|按照|为您|为你|给您|给你)[^。！!\n]{{0,30}}
            {_NOUN}[^。！!，\n]{{0,12}}[：:]
        |(?:根据|按照)[^。！!\n]{{0,30}}(?:写|拟|生成|创作|准备)[^。！!\n]{{0,16}}[：:]
        |(?:祝福语?|祝词|贺词|标题|主题|文案|正文|答案?|回答|输出|送[给祝][^，。！\n]{{1,10}}|[^，。！!\n]{{1,12}}(?:贺|贺词|祝福语?|篇|版))[：:]
        |(?:嗯[，,]\s*)?(?:这个)?用户(?:想要?|要求?|希望|让|需要|请求?)(?!的)[^。！!\n]{{0,30}}(?:一[段句首封条]|祝福|文案|写)
        |(?:assistant|助手|旁白|场景|画外音)[：:]|(?:版本|方案|示例)[一二三\dA-C][：:](?![^\n]*[；;])
        |[\#＃]+\s|\*\*|```|\*[^*\n]{{2,20}}\*\s|[【\[](?![上下]联|横[批额])[^】\]\n]{{1,20}}[】\]](?![这那的是])\s*\S
        |[^\n，。！!？?：:]{{2,10}}(?:祝福语?|贺词|祝词|寄语|致辞)[ ]*\n\s*\n  # a title in a paragraph of its own
        |(?:写给|送给|献给|致)[^\n，。！!？?：:]{{1,10}}(?:祝福语?|贺词|寄语)[ ]*\n
        |《[^》\n]{{1,20}}》\s*\n|《[^》\n]{{0,18}}(?:祝|贺|寄语|赠|致)[^》\n]{{0,8}}》\s*\w  # a title, not a source
        |\{{\s*["'“][^"'”\n]{{1,20}}["'”]\s*[：:]|<[a-z]+>\s*\S  # a field of JSON, a tag
        |\d+[.、)）](?!\d|[^\n]*[；;，,][ ]*2[.、)）])\s*\S  # versions; of a list within a sentence the next follows
    )""",
    regex.VERBOSE | regex.IGNORECASE,
)
_TRAIL = regex.compile(
    r"""(?:
        [（(](?:注|备注|说明|或[：:]|解释|字数|共\d+字|\d+字|[以本][^）)]{0,8}(?:生成|仅供参考))[^）)]*[）)]?
        |(?:^|[。！!？?～~\n\s])希望(?:这|以上|您|你)[^。！!，]{0,16}(?:喜欢|满意|符合[^。！!，]{0,8}|有?帮助|合适)
            (?:这[^。！!，\n]{0,8})?[^\p{L}\p{N}]*$
        |[。！!？?～~\n]\s*[-*=_]*\s*(?:这|以上|本)(?:[段条首篇则封份])?(?:祝福|文案|贺词|诗|信|短信|寄语|文字|话)
            [^。！!，\n]{0,12}(?:简洁|适合|突出|采用|运用|融合|融入|体现|押韵|结合|符合)
        |(?:[。！!？?～~\n]\s*[您你]也?可以?|[（(][^）)\n]{0,8}可以?)(?:根据|按照?)[^。！!\n]{0,16}(?:修改|调整|增减|替换|选用)
        |[您你]看[^。！!，\n]{0,6}(?:合适|满意)[^。！!，\n]{0,4}$
        |[您你](?:觉得|认为|看)[^。！!，\n]{0,8}(?:版本|祝福|文案|段话|首诗)[^。！!，\n]{0,6}(?:怎么?样|如何|[吗行])[^\p{L}]*$
        |[。！!？?～~\n]\s*还?需要我[^。！!\n]{0,14}(?:写|改|调整|提供|补充)[^。！!\n]{0,10}[？?]$
        |hope\s(?:this|that)\shelps|let\sme\sknow\sif|feel\sfree\sto
        |(?:如果|如需|若)[^。！!；;]{0,20}(?:
            修改|调整|更多(?:祝福|文案|版本|内容|帮助|信息)|其他(?:风格|版本|需求|要求|内容|问题)
            |(?:需要|想要|不满意)[^。！!]{0,14}告诉我)
        |(?<!\p{Han})(?:注|备注|说明|解释|字数|注意|温馨提示)[：:]
        |[。！!？?～~）\n]\s*(?:(?:创作|写作|设计)(?:思路|说明)|赏析|点评)[：:]
        |emoji\s*表情|表情包[：:]|以上(?:就)?是[^。！!，,\n]{0,8}(?:祝福|文案|贺词|寄语|内容|版本|全部|[为给][您你]|我)
        |\*\*$
    )""",
    regex.VERBOSE | regex.IGNORECASE,
)
_TRAIL_CHARACTERS = 80
"""A remark stands at the end: so many characters are looked through."""
_PLACEHOLDER = regex.compile(
    r"[\[【（(](?:此处|这里|插入|填写|停顿|配图|图片|表情)[^\]】）)\n]{0,20}[\]】）)]"
    r"|[\[【][^\[\]【】\n]{0,6}(?:名字|姓名|称呼|署名|落款|签名)[\]】]|[（(【\[](?:场景|旁白|画外音|镜头)[：:]"
    r"|(?:^|(?<=[。！!？?～~，,\n]))\s*[（(][^，。！!）)\n祝愿]{0,8}(?:微笑|鞠躬|举杯|挥手|拥抱|比心|眨眼|眨眨眼|深情|合十|作揖|拱手|抱拳|清嗓|掌声"
    r"|撒花|眼含|双手|热泪|凑近|递上|递过|点头|转身|歪头|叉腰|跺脚|笑着|轻声|低声|大声)[^，。！!）)\n]{0,8}[）)]"
    r"|请(?:自行)?(?:替换|填写|改)[为成]?[您你]的|(?:尊敬|敬爱|亲爱)的(?:[Xx×○_]{2,}|某某)"
)
"""A stage direction (`[此处故意卖萌]`), or a gap that somebody should have filled."""
_DECLINES = r"(?:无法|不能|没法|没有办法|不便|不可以|不适合|不支持|未能|难以)"
_SERVICE = (
    r"(?:为[您你]|给[您你]|帮[您你]|代替[您你]|直接)?(?:提供|生成|满足|撰?写|回答|处理|协助|完成|评论|讨论|表达|执行)"
)
"""What is declined: speech of love and thanks has things that one cannot do as well."""
_NON_ANSWER = regex.compile(
    rf"""(?:
        # announces
        ^\W*(?:好的[，,]?)?(?:当前|以下|下面|这里?是|我?[为给][您你]|我的)[^，。！!\n]{{0,16}}(?:祝福|文案|贺词|寄语|内容)语?
            (?:内容|如下|是|为|请看|请查收)?[：:。.…\s]*$
        |^\W*(?:好的[，,]?)?[^，。！!\n]{{0,14}}(?:祝福|文案|贺词|寄语|内容)语?(?:内容)?
            (?:如下|是|为|请看|请查收)?[：:]\s*$
        |^\W*[^，。！!\n]{{0,14}}(?:祝福|文案|贺词|寄语|内容)语?(?:如下|请看|请查收|生成(?:完毕|中))[：:。.…\s]*$
        |^\W*[^，。！!\n]{{0,10}}(?:祝福|文案|贺词|寄语)语?已经?(?:写好|生成|完成|准备好)[^。！!\n]{{0,12}}[。！!～~]*$
        |^\W*[^。！!\n]{{0,12}}(?:生成|撰写|创作)[^。！!\n]{{0,8}}[，,\s]*请稍[等候后]\W*$
        |^\W*(?:null|none|nan|n/?a|undefined|暂?无)\W*$
        # greets
        |^\W*(?:尊敬|敬爱|亲爱)的[^，。！!\n]{{1,12}}[：:，,]\s*$
        |^\W*(?:Hi|Hello|嗨|哈[喽啰])[，,！!\s]*[^，。！!\n]{{0,8}}[！!。～~\s]*$
        |^\W*(?:(?:尊敬|敬爱|亲爱)的)?[^，。！!：:\n]{{0,8}}[，,：:]?\s*(?:[您你]|早上|上午|中午|下午|晚上)好[呀啊]?(?:[，,][^，。！!？?\n]{{1,8}})?[！!。～~，,：:\s]*$
        |^\W*(?:好的|当然(?:可以)?|没问题|收到|明白了?|可以)
            (?:[，,。！!～~\s]+(?:请稍等|马上|我来|请问)?[^，。\n]{{0,12}}[。！!～~？?]*)?$
        # declines
        |^\W*(?:非常|很|十分|真的?)?(?:抱歉|对不起|不好意思|遗憾)[，,！!。\s]*
            (?:[^。！!\n]{{0,24}}(?:(?:{_DECLINES}|不会){_SERVICE}|帮不了|做不到|不(?:太)?(?:明白|理解|清楚)|[您你]的(?:输入|问题|请求)|没(?:太|有)?(?:明白|理解|听懂|看懂)[您你]的(?:意思|问题)|{_DECLINES}[^，。！!\n]{{0,2}}$)|$)
        |^\W*(?:我(?:只)?是|作为|本)[^，。！!\n]{{0,10}}(?:AI|人工智能|语言模型)
            (?!公司|行业|专业|工程|研究|博士|学院|学者|团队|时代|从业|产品|的)
        |^\W*(?:我|本人|目前|暂时|作为|这边|系统)[^。，！!\n]{{0,6}}{_DECLINES}{_SERVICE}(?!的)
        |^\W*[您你]好[，,。！!\s]*[^。！!\n]{{0,16}}{_DECLINES}{_SERVICE}(?!的)
        |^\W*(?:根据|依据|由于)[^。！!\n]{{0,24}}(?:法律|法规|政策|规定|限制)[^。！!\n]{{0,20}}{_DECLINES}(?:显示|展示|{_SERVICE})
        |^\W*我(?:很|非常)?(?:理解|明白|知道)[^。！!\n]{{0,16}}[，,]但是?我?{_DECLINES}{_SERVICE}(?!的)
        |^\W*(?:我们|咱们)?(?:还是)?换个话题[^。！!\n]{{0,8}}[。！!？?～~]*$
        |^\W*{_DECLINES}(?:[为给帮][您你])?(?:提供|生成|满足|协助|处理)(?!的)
        |^\W*(?:这个问题)?我?(?:不太?|并不)(?:清楚|知道|了解|确定)(?:[您你][^，。！!\n]{{0,12}})?[。！!…]*$
        |^\W*[^，。！!\n]{{0,12}}超出了?我的(?:能力|知识|权限)|^\W*无可奉告[。！!]*$
        # asks back
        |^[^\n]{{0,30}}请(?:[您你])?(?:提供|输入|补充|说明|告诉我[^。！!\n]*(?:谁|什么|哪|风格|场合|信息|细节|对象|姓名|要求|更多|具体))
            [^。！!\n]{{0,20}}[。！!？?～~]*$
        |^\W*请问[^。！!\n]{{0,30}}[？?]?$
        |^\W*(?:请问)?有什么(?:可以|能)帮
        |^\W*(?:[您你](?:想要?|希望|需要|能|可以)|需要我)[^。！!\n]{{0,12}}(?:祝福|风格|文案|信息|细节|场合|告诉我|写|提供)[^。！!\n]{{0,16}}[？?]$
        # the same in English
        |^\W*(?:I['’]m|I\sam)?\s?sorry\b[^.\n]{{0,12}}(?:can['’]?t|cannot|unable)
        |^\W*As\san?\s(?:AI|artificial|(?:large\s)?language\smodel)
        |^\W*I\s(?:can['’]?t|cannot|am\sunable\sto)\s(?:help|assist|provide|fulfil|write|create|answer)
        |^\W*(?:sure|certainly|of\scourse)[,!]?[^\n]{{0,60}}:\s*$
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


def foreign(text: str, expected: Expected) -> bool:
    """Has words of another language where the style forbids them.

    Names, abbreviations and what Chinese has taken over (`offer`, `WiFi`) are none; nor are titles, addresses and code.
    """
    if expected.style.foreign == "any":
        return False
    text = _QUOTED_FOREIGN.sub(" ", text)
    return _OTHER_SCRIPT.search(text) is not None or any(map(_is_foreign, _LATIN_WORD.findall(text)))


def _is_foreign(word: str) -> bool:
    if not word.isascii() or word.casefold() in _FOREIGN_WISHES:
        return True
    return word.islower() and len(word) > 1 and word not in _LOANS


_QUOTED_FOREIGN = regex.compile(r"《[^》\n]*》|`[^`\n]*`|\S*(?:://|@|www\.)\S+")
_OTHER_SCRIPT = regex.compile(
    r"[\p{Cyrillic}\p{Hiragana}\p{Katakana}\p{Hangul}\p{Arabic}\p{Hebrew}\p{Thai}\p{Devanagari}]{2}"
)
_LATIN_WORD = regex.compile(r"(?<![\p{Latin}\d.])\p{Latin}+(?:['’-]\p{Latin}+)*(?!\d)")
_FOREIGN_WISHES = {"dear", "happy", "merry", "best", "love", "thank", "thanks", "wishing", "wish", "hello"}
"""Words that are foreign though they begin with a capital, as names do."""
_LOANS = {
    *(
        "ok",
        "wifi",
        "wi-fi",
        "app",
        "offer",
        "logo",
        "vlog",
        "bug",
        "diy",
        "pk",
        "vs",
        "emo",
        "high",
        "up",
        "hi",
        "emoji",
    ),
    *(
        "kg",
        "km",
        "cm",
        "mm",
        "ml",
        "mg",
        "vip",
        "ktv",
        "ppt",
        "pdf",
        "gif",
        "cp",
        "ps",
        "pro",
        "cosplay",
        "buff",
        "flag",
    ),
}


def mismatch(text: str, expected: Expected) -> bool:
    """Addresses or celebrates another value of the grid, and does not mention the one that was asked for."""
    return any(_is_about_another(name, text.strip(), expected) for name in expected.dimensions)


def _is_about_another(dimension: str, text: str, expected: Expected) -> bool:
    own = _words(expected.cell[dimension], expected.aliases)
    if len(expected.cell[dimension]) == 2:
        own.append(2 * expected.cell[dimension][-1])  # a younger cousin, 表妹, is addressed as 妹妹
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
    """A value, without `节` or `快乐` at its end, and the other words for it."""
    return [value.removesuffix("节").removesuffix("快乐") if len(value) > 2 else value, *aliases.get(value, ())]


Rule = Callable[[str, Expected], bool]

RULES: dict[str, Rule] = {
    rule.__name__: rule
    for rule in (empty, non_answer, explanation, quotes, particle, opening, length, emoji, foreign, mismatch)
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
