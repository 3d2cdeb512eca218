"""Promotion in Chinese texts: what asks the reader to follow, add, scan, join, buy or write for an offer."""

import sys
import unicodedata
from collections.abc import Iterator
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import regex

from pipelines.clean.column import Column, Indices, Mask
from pipelines.clean.operators.registry import Verdict, operator

_NAME = r"(?:[a-z][a-z0-9_—-]{4,}|\d{5,})"
_WECHAT = r"(?:[微徽]信|薇信?|威信|卫星|扣扣|(?<![a-z0-9_])(?:v信|vx|wx|weixin|qq|line|whatsapp))"
_CALLS = (
    # an account of a person, a group or a shop, given to be written to
    rf"{_WECHAT}号?群?(?:公众号|同号|搜索?)?(?:[:：是，,] ?| ?(?=[a-z_-]*\d)){_NAME}",
    rf"(?<![他她谁]|有人|医生|老师|同事|领导|客户|对方|亲戚|女生|男生|女孩|男孩)(?:加|添加|\+)(?:我|本人|老师|助理|助手|客服|顾问|店主|主播|小编|小編)[^,，。!！?？]{{0,4}}(?:{_WECHAT}|好友|拉你|私聊|详谈)",
    rf"(?<![a-z0-9._-])(?:(?:加|v)[:：] ?{_NAME}|(?<![参增添])加v? ?(?=[a-z_-]*\d){_NAME})|"
    rf"(?<![a-z0-9_])\+v ?(?=[a-z_-]*\d){_NAME}|"
    rf"(?:加(?![他她])|请加|详情加|咨询)[^,，。!！?？]{{0,8}}{_WECHAT}(?:[^,，。!！?？吧]{{0,2}}(?:{_NAME}|咨询|报价|详谈|领|发|送|看|备注)|[:：。]|$|和我)",
    rf"{_WECHAT}(?:同号|看简介|备注)|(?:加盟热线|群号)见主页|加薇|加v[:：]",
    r"(?:加入?|进)(?!了)[^,，。!！?？]{0,10}(?:交流|育儿|福利|学习|资源|粉丝|qq|q|微信)群|加群(?:获取|领|号)|"
    r"进群(?:领|免费|请)|扫码?进群|拉你进群",
    # to follow and to like
    r"(?:欢迎|歡迎|敬请|记得|請|请|可以|别忘了|也可|喜欢|感兴趣|并(?=关注))[^。!！?？]{0,14}(?<!不|不用|不要|别|没|没有|太|分|过度|过多|过于|值得)关注(?:一?下(?=[我公微本专主店账吧哦呗哈呀喔啦嘛]|\W|$)|我(?![国省市县区校院军司方]|们?(?:身边|周围|自己))|公[众共主]?号|微信|专栏|主播|主页|店铺|账号|后|飞|[~～—。！!）)]|$)",
    r"欢迎(?:大家)?关注[:：]? ?@",
    r"(?:(?<![人他她谁别]|不要)关注|追蹤|追踪|follow)(?:我(?![国省市县区校院军司方给跟和对]|们?(?:身边|周围|自己))们?的?|我哋|本号|小编|主播|主页|不迷路|后私信)|关注(?:一下)?(?:微信)?公[众共主]?号|关注“[^”]{1,12}”公众号|关注[+＋]转发|对微信公众号",
    r"(?<![重热焦要观特看优缺一])(?:点|點)个?(?:个|了)?关注|点个?赞(?:吧|关注|支持|过|再走)|按讚|点赞关注|"
    r"(?:请|請|记得|麻烦|别忘了?)(?:大家|各位|你|您)?(?:帮忙)?点个?赞|帮我点|点个红心|双击屏幕|一键三连|求(?:关注|收藏|转发)(?![是的者])|互粉|点“在看”|集满.{1,6}赞|多两个关注|点进来看看",
    r"(?:微信)?公[众共主]号(?:[:：](?!第一|首先|一是|1[.、])|【)|"
    r"[(（]公众号[)）]|感谢(?:您|你|大家)?的?关注(?=[。！!~～ 】」』）)]|$)|"
    r"我的(?:小)?(?:微信)?公[众共]?号|知乎机构号",
    # to answer for a gift
    r"回复 ?[“\"「『][^”\"」』]{1,12}[”\"」』] ?(?:获取|领取?|自动|即可|得)|"
    r"(?<![次都来人他她别勿]|不要|不用|不必)私[信訊聊](?:我(?![,，]?(?:说|问|告诉)|的)|小编|小編|"
    r"“)|(?:要|咨询)[^,，。]{0,6}私聊|而家inbox|评论区?(?:扣|打|留) ?\d|評論區|评论区抽|按讚留言",
    r"(?<!不要|切勿|不能|不得|别|随意|[让叫要]我)扫(?:码|描)[^,，。!！?？、]{0,6}(?:加|添加|关注|咨询|联系|预约|占位|进群|领)|扫码$|扫(?:描|码)(?:下(?!单)[方面图]?|文[末中]|上方|我的)?的?(?:二维码)(?=[^,，。]{0,4}(?:关注|加|进群|领|咨询|获取|了解|[。!！~～\n]|$))|扫(?:描|码)(?:下[方面图]|文末)|二维码自动识别|长按识别|联系我(?:，|$|们(?:吧|哦|[!！~～]))|(?<!避免|不要|勿)点击(?:头像|体验|左下角|链接(?=[^,，。]{0,6}(?:领|购|买|参与|下载|获取|加入|抽|进|查看)))",
    # codes and shops
    r"(?:优惠|折扣|邀请|券|优惠券|優惠|兑换)[码碼] ?[:：是]? ?[a-z0-9]{3,}|"
    r"报暗号|复制(?:口令|这段话)|口令[￥¥]|领(?![了过到])[^,，。]{0,4}元?券",
    r"(?<![我他她妈]在|我[去从上用])(?:淘宝|微信|京东|闲鱼|抖音|line|拼多多)[，, ]?"
    r"搜[索尋]?(?![索尋框栏的]|功能|引擎|结果|排名|指数|记录)|"
    r"搜索小程序|搜尋 ?@|搜索“[^”]+”并",
    r"(?:可以|试试|用[下用])[^,，。]{0,4}我(?:们)?做的[^,，。]{0,12}(?:小程序|app|网站|软件)|(?<!我)在京东搜索|"
    r"找房就上|敬请关注|欢迎订阅|点我头像|更多[^,，。]{0,10}(?:请看主页|请点击|请关注)",
)
_OFFERS = (
    "免费(?:领|送|发|试|看|做|上门)|即?送七天|立减|现折|立得|首单|下单|包邮|秒发|正品|一件代发|厂家直销|批发|代购|代练|代写|代发|代做|代办|代理记账|辅导|"
    "限时|名额|前[一十百\\d]+[名位]|頭十位|手慢无|先到先得|群满即止|错过不再|錯過不再|拼手速|抵押|放款|黑户|日[赚入領领]|在家|兼职|刷单|结算|加盟|扶持|回本|代理|"
    "货源|新开业|新張|新张|开跑|開跑|盛大开盘|首付|到访|预约|报名|减五百|清仓|原价|现价|全网|最低价?|价格(?:美丽|公道|全城|我给)|打到底|假一赔十|诚信|急招|包吃住|收购|上门|"
    "咨询|详谈|有意者|有需要|订阅|主页购买|提现|抽奖|抽[三十\\d]|送口红|送保温|送签名|送全套|送大礼|福袋|直播间|链接|家人们|宝子们|老铁|姐妹们?|会员账号|资料包|题库|"
    "一对一|稳赚|团购|團購|試堂|九折|购买后|上架|截图|取关|报个到|涨停|助理|朋友圈|转发|找我|寻我|便宜|扣1|发你链接|支持[^,，。]{0,2}(?:闲鱼|验货|批发)|欢迎骚扰|包包"
)
_TELLTALE = (
    "关注|公众|公号|微信|徽信|薇|威|卫星|ＶＸ|vx|QQ|扣扣|群|扫|二维码|码|碼|券|赞|讚|三连|粉|私信|私訊|私聊|inbox|评论区|[加+]V|口令|搜|求|"
    "免费|代|贷|加盟|日赚|直播间|名额|急招|收购|专栏|下单|購|购|链接|寻我|follow|双击|在看|转发|追蹤|欢迎|"
    '回复 ?[“"「『]|小程序|点击|找房|点我|点个|上门|优惠|優惠|暗号|包邮|正品|报名|订阅|放款'
)
"""Words that stand in nearly all calls and offers; cheap to look for, before a sentence is looked at."""
_MAY_CALL = regex.compile(_TELLTALE, regex.IGNORECASE)
_CALL = regex.compile("|".join(_CALLS))
_OFFER = regex.compile(_OFFERS)
_SUBJECT = regex.compile(
    "诈骗|骗子|骗人|被骗|虚假|违法|投诉|举报|广告法|劳动监察|征信|避坑|个坑|一句话|政府|官方(?!号)|上海发布|发明|口头禅|商机|价格歧视|老人|吗[，,]?(?:想写|谢谢)"
    "|(?:怎么|怎样|如何)[^,，。:：!！]{0,14}[?？]"
    "|据悉|据了解|据.{0,6}(?:报道|消息)|记者|获悉|消息称|公告称"
)
"""Words with which a sentence speaks about promotion, reports it, or names a public office."""
_SENTENCE = regex.compile(
    r"[^。！？!?~～\n]*(?:[。！？!?~～]+[”’」』）)]*|$)(?:[\p{Emoji_Presentation}\ufe0f\u200d])*|[^\n]+"
)
_DECORATION = regex.compile(r"[\p{Emoji_Presentation}\u2764\ufe0f\u200d]+")
_RULE = regex.compile(r"[\s\p{Pd}=_*·•~～─━.。]*")
OFFERS_FOR_PROMOTION = 3
"""So many words of selling in one sentence are promotion without any call."""
LITTLE_LEFT = 12
"""Letters below which what remains beside promotion is no answer."""
SHORT_LINE = 25
_OTHERS = r"其他文章|往期(?:推荐|回顾|文章|精选)?|相关(?:回答|文章)|更多(?:文章|回答|内容)"
_COMPANION = regex.compile(rf"\s*-?(?:{_OTHERS}|知乎专栏|专栏|微博|了解更多|小红书|抖音)[\s:：“]")
"""Lines that list an author's other places."""
_HEAD_OF_OTHERS = regex.compile(rf"\W*(?:{_OTHERS})\W*")
"""The line before a list of the author's other texts."""


def _is_promotion(sentence: str) -> bool:
    if not _MAY_CALL.search(sentence):
        return False
    plain = _DECORATION.sub("", unicodedata.normalize("NFKC", sentence)).lower().strip()
    if _SUBJECT.search(plain):
        return False
    return _CALL.search(plain) is not None or len(set(_OFFER.findall(plain))) >= OFFERS_FOR_PROMOTION


def _sentences(line: str) -> Iterator[str]:
    return (match.group() for match in _SENTENCE.finditer(line) if match.group())


def _letters(text: str) -> int:
    return sum(character.isalnum() for character in text)


@lru_cache(1 << 15)  # the filter and the mapper ask for most texts both
def without_promotion(text: str) -> str:
    """The text without sentences and lines that promote; empty where little else is in it."""
    lines = text.split("\n")
    kept = ["".join(s for s in _sentences(line) if not _is_promotion(s)) for line in lines]
    if kept == lines:
        return text
    hit = [rest != line for line, rest in zip(lines, kept, strict=True)]
    gone = _with_block(lines, kept, hit)
    result = "\n".join(rest.rstrip() if hit[number] else rest for number, rest in enumerate(kept) if not gone[number])
    if _letters(result) < min(LITTLE_LEFT, _letters(text) - _letters(result)):
        return ""
    return result.strip("\n") if gone[0] or gone[-1] else result


def _with_block(lines: list[str], kept: list[str], hit: list[bool]) -> list[bool]:
    """Which lines go: those that promote, what stands between and after them at the end, and what led to them, the list
    of the author's other texts before them too."""
    is_ruled = [bool(_RULE.fullmatch(line)) for line in lines]
    gone = [
        hit[number]
        and (_letters(rest) < LITTLE_LEFT or (number > 0 and is_ruled[number - 1] and len(lines[number - 1]) > 2))
        for number, rest in enumerate(kept)
    ]
    whole = [number for number, goes in enumerate(gone) if goes]
    for before, after in pairwise(whole):
        if after - before <= 3 and all(len(lines[n]) <= 3 * SHORT_LINE for n in range(before, after)):
            gone[before:after] = [True] * (after - before)
    if whole and whole[0] > 0:
        first = whole[0]
        while first > 1 and len(lines[first - 1]) <= SHORT_LINE and not _HEAD_OF_OTHERS.fullmatch(lines[first - 1]):
            first -= 1
        if _HEAD_OF_OTHERS.fullmatch(lines[first - 1]):
            gone[first - 1 : whole[0]] = [True] * (whole[0] - first + 1)
        rest = range(whole[0], len(lines))
        others = [n for n in rest if not hit[n] and lines[n].strip() and not _COMPANION.match(lines[n])]
        listed = [n for n in rest if n - 1 in rest and _COMPANION.match(lines[n - 1])]
        short = all(len(lines[n]) <= (4 if n < whole[-1] else 1) * SHORT_LINE or n in listed for n in others)
        if short and len(others) <= len(whole):
            gone[whole[0] :] = [True] * len(rest)
    for number in range(len(lines) - 1, 0, -1):
        if gone[number] and not gone[number - 1] and is_ruled[number - 1]:
            gone[number - 1] = True
    return gone


_TOKENS = regex.compile(r"\\.|\[(?:\\.|[^\]\\])*\]|\(\?<?[=!]|.", regex.DOTALL)


def _without_lookaround(pattern: str) -> str:
    """The pattern for RE2, which knows no lookaround: it matches where the pattern does, and in more places."""
    kept, depth = [], 0
    for token in _TOKENS.findall(pattern):
        if depth or regex.fullmatch(r"\(\?<?[=!]", token):
            depth += token.startswith("(") - (token == ")")
        else:
            kept.append("" if token == "$" else token.replace(r"\d", r"\pN"))
    return "".join(kept)


@cache
def _needed() -> tuple[str, tuple[str, ...]]:
    """RE2 patterns: the decoration, and what each call, or so many offers, needs at least; each alone, since together
    they are too much for its memory."""
    points = "".join(chr(c) for c in range(sys.maxunicode + 1) if not 0xD800 <= c < 0xE000)
    offers = ".*".join([f"(?:{_OFFERS})"] * OFFERS_FOR_PROMOTION)
    calls = (f"(?s){_without_lookaround(pattern)}" for pattern in (*_CALLS, offers))
    return f"[{''.join(_DECORATION.findall(points))}]+", tuple(calls)


def _may_promote(column: Column) -> Mask:
    """The texts of which a sentence could be promotion."""
    mask = column.matches(f"(?i){_TELLTALE}")
    rows = np.flatnonzero(mask)
    decoration, patterns = _needed()
    plain = pc.utf8_normalize(column.array.take(pa.array(rows)), "NFKC")
    plain = Column(pc.utf8_lower(pc.replace_substring_regex(plain, decoration, "")))
    mask[rows] = np.any([plain.matches(pattern) for pattern in patterns], axis=0)
    return mask


@operator("mapper", version=5)
def promotion_mapper(column: Column) -> pa.Array:
    """Remove sentences and lines that ask the reader to follow, like, add, scan, join, buy or write for an offer.

    What a text says about such things (their history, a warning, a public office's account) stays. The lines between
    and after promotion at the end of a text go with it, and so does a drawn line before it. Where little else is left,
    the text becomes empty.
    """
    return column.rewrite(_may_promote(column), without_promotion)


@operator("filter", version=5)
def promotion_filter(column: Column) -> Verdict:
    """Drop texts that are nothing but promotion; what has an answer in it stays, for `promotion_mapper`."""
    keep = np.ones(len(column), dtype=np.bool_)
    rows = np.flatnonzero(_may_promote(column))
    for row, text in zip(rows.tolist(), column.array.take(pa.array(rows)).to_pylist(), strict=True):
        keep[row] = bool(without_promotion(text).strip()) or not text.strip()

    def reasons(gone: Indices) -> list[str]:
        return ["nothing but promotion"] * len(gone)

    return Verdict(keep, {"promotion": (~keep).astype(np.float64)}, reasons)
