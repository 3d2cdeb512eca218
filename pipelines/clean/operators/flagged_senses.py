"""What the words of the published Chinese list count for, since many of them are innocent in most texts."""

import regex

INSULTS_AS_WORDS = ("傻逼", "傻比", "骚逼", "骚货", "贱货", "贱人", "婊子", "鸡巴", "操逼", "妈逼", "王八蛋")
"""Insults that jieba's dictionary has not, so that it would cut 很傻逼 into 很傻 and 逼."""

MILD = frozenset(
    [
        "13.",
        "13点",
        "十三点",
        "九游",
        "私服",
        "柒",
        "奶",
        "奶子",
        "乳",
        "性",
        "卵",
        "幹",
        "爛",
        "尻",
        "逼",
        "奶奶的",
        "妈妈的",
        "老二",
        "老母",
        "老味",
        "祖宗",
        "野鸡",
        "屁股",
        "狗屁",
        "笨蛋",
        "笨實",
        "肥西",
        "花柳",
        "靠背",
        "靠腰",
        "月经",
        "射你",
        "干你",
        "奸",
        "妓",
        "姘头",
        "撒尿",
        "你妈",
        "你娘",
        "你全家",
        "你奶奶的",
        "他妈",
        "他娘",
        "妈的",
        "娘的",
        "他妈的",
        "他奶奶",
        "小鸡鸡",
        "鸡鸡",
        "机机歪歪",
        "白烂",
        "粉腸",
        "鬼公",
        "后庭",
        "吹箫",
        "口肯",
        "密洞",
        "贝肉",
        "玉杵",
        "淫",
        "淫西",
        "奶奶的熊",
        "撚",
        "鳩",
        "骚",
        "下三烂",
        "性无能",
        "懒8",
        "懒八",
        "干七八",
        "柒",
        "cougar",
        "bareback",
        "dogging",
        "facial",
        "fingering",
        "rimming",
        "squirting",
        "pegging",
        "horny",
        "vibrator",
        "orgy",
        "orgies",
        "cum",
        "milf",
        "threesome",
    ]
)
"""Everyday words and parts of them, and mild oaths: alone they count nothing."""

PLAIN = frozenset(
    [
        "成人",
        "激情",
        "情色",
        "色情",
        "淫秽",
        "淫乱",
        "三级片",
        "处女",
        "交配",
        "卖淫",
        "卵子",
        "精子",
        "射精",
        "军妓",
        "包皮",
        "外阴",
        "妓女",
        "妓院",
        "嫖娼",
        "嫖客",
        "招妓",
        "强奸",
        "轮奸",
        "鸡奸",
        "性交",
        "性爱",
        "性器",
        "阴道",
        "阴部",
        "阴茎",
        "陰莖",
        "阴唇",
        "阴户",
        "阴核",
        "阴毛",
        "阳具",
        "阳萎",
        "乳头",
        "乳房",
        "龟头",
        "屁眼",
        "放荡",
        "做爱",
        "叫床",
        "打炮",
        "打飞机",
        "抽插",
        "迷药",
        "扒光",
        "想上你",
        "下贱",
        "杂种",
        "吃屎",
        "白痴",
        "白癡",
        "靠北",
        "靠母",
        "靠爸",
        "刚度",
        "瘪三",
        "他奶奶的",
        "他奶娘的",
        "姣西",
        "硬膠",
        "浪叫",
        "肉棒",
        "erotic",
        "porn",
        "xxx",
        "masturbate",
        "masturbating",
        "masturbation",
    ]
)
"""Words of medicine, law, news and literature, and weak insults: each different one counts half, and nothing in a text
that speaks of such things in their own terms."""

SERIOUS = regex.compile(
    "医[院生学疗]|疾?病|症状|患者|疫苗|感染|妇科|手术|受精|子宫|卵巢|细胞|染色体|激素|怀孕|孕|胚胎|繁[殖育]|哺乳|生殖|解剖|避孕|青春期|"
    "法律|刑法|刑事|法院|起诉|判[决刑处]|犯罪|罪[名行犯]?|条例|处罚|警[方察]|公安|嫌疑|受害|被害|诉讼|律师|有期徒刑|"
    "健康|教育|社会|研究|历史|文学|小说家|作家|鲁迅|年代|学者|论文|识字率|统计|保护|抵制"
)
"""Terms of medicine, biology, law, news and scholarship."""

OATHS = regex.compile(
    r"(?:真|都|太|就|还|又|个|狗|去|操|你|我|的确?|为什么|因为|简直|到底)他[妈马娘](?:的|地)?(?![妈亲爸娘]|是\p{Han}{0,4}老师)|他[妈马娘]的(?=[\p{Han}\p{P}]|$)"
    r"|(?<![\p{Han}])[你他她它]?[妈娘]的(?=[\p{P}\s]|$)|(?:去|操|日|草|艹|肏)你[妈娘]的?|[你尼]他[妈媽]的?|[你他她]妈的(?=\p{P}|怎么|什么|还)"
)
"""Family words as an oath: after an adverb, or cut off by a mark."""

OATH_WORDS = ("他妈", "他娘", "他马", "你妈", "妈的", "娘的")
"""One of them stands in every such oath."""

QUOTED = regex.compile("“[^“”\n]{0,12}”|「[^「」\n]{0,12}」|『[^『』\n]{0,12}』|‘[^‘’\n]{0,12}’|《[^《》\n]{0,30}》")
"""Short quotations and titles: a word spoken about."""


def weight_of(word: str, is_serious: bool) -> float:
    """What one word of the list counts for."""
    if word in MILD:
        return 0.0
    if word in PLAIN:
        return 0.0 if is_serious else 0.5
    return 1.0
