"""Personal data in Chinese texts: numbers by their checks, plates, addresses and names by what stands before them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import regex

from pipelines.clean.column import Column
from pipelines.clean.operators.registry import operator

KINDS = ("mobile", "id_card", "bank_card", "plate", "address", "name")

_HALF_WIDTH = str.maketrans({0xFF01 + i: 0x21 + i for i in range(94)} | {0x3000: 0x20})
"""Full-width letters, digits and marks; a text keeps its length."""

_NO_NUMBER_BEFORE = r"(?<![\dA-Za-z/=_%.@-])"
_MOBILE = regex.compile(
    _NO_NUMBER_BEFORE
    + r"(?:\+?86[- ]?)?1[3-9]\d(?:-?\d{8}|[- ]\d{4}[- ]\d{4})(?![\d*]|\.\d|[ -]?\d|\s?美?[元圆块萬万亿円])"
)
_ID_CARD = regex.compile(
    r"(?<![\dA-Za-z])[1-9]\d{5} ?(?:19|20)\d\d(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01]) ?\d{3}[\dXx](?![\dA-Za-z])"
)
_BANK_CARD = regex.compile(
    _NO_NUMBER_BEFORE + r"[3-6]\d{3}(?:(?:\d{4}){3}\d{0,3}|(?:[ -]\d{4}){3}(?:[ -]?\d{1,3})?)(?![\d.]\d|\d)"
)
_OF_A_CARD = regex.compile("卡|[账帐帳賬][号號户]|[汇匯]款")
_OF_AN_ORDER = regex.compile("(?:单号|编号|流水号|序列号|条形码|随机数|[Qq]群)[^，。；\n]{0,6}$")
_PROVINCES = "京津沪渝冀豫云辽黑湘皖鲁新苏浙赣鄂桂甘晋蒙陕吉闽贵粤青藏川宁琼"
_PLATE = regex.compile(
    rf"(?<![北南东天最更全])[{_PROVINCES}] ?[A-HJ-NP-Z][ ·•.-]{{0,2}}"
    r"(?=[A-Z]{0,6}\d|[A-Z\d ]{0,4}\d)(?:[A-HJ-NP-Z\d](?:[ -]?[A-HJ-NP-Z\d]){4,5}|"
    r"[A-HJ-NP-Z\d]{4} ?[挂掛学警港澳领使试])"
    r"(?![A-Za-z\d]|航班| ?次)"
)

_UNIT = (
    r"(?:[A-Z]?\d{1,5}|[A-Z]|[一二三四五六七八九十百]{1,4}) ?(?:号楼|"
    r"號樓|号院|号|號|弄|巷|栋|棟|"
    r"幢|座|单元|單元|室|户|戶|楼|樓|层|組|组|段)"
)
_ADDRESS = (
    r"(?P<address>(?:\p{Han}{1,12} ?(?:省|自治区|市|自治州|州|盟|区|區|县|"
    r"縣|旗|镇|鎮|乡|鄉|街道|村|路|街|大道|道|巷|胡同|里)[ ]?)+"
    rf"(?:[\p{{Han}}A-Za-z ]{{0,10}}?{_UNIT})+(?: ?\d{{2,4}}(?!\d))?)"
)
_LIVES = (
    r"(?:(?:收货|收件|家庭|通讯|通訊|通信|居住|户籍|戶籍|联系|现住|新|邮寄|郵寄)(?:所在)?地?(?:地址|住址|址)|户籍所在地|戶籍所在地|住址|地址|寄到|寄往|送到|"
    r"[我他她](?:家|们家)?(?:现在?)?住在?|我家(?:住)?在|租住在|家住|(?<!\p{Han})住在)[是为為]?[:： ]*"
)
_HOME = regex.compile(_LIVES + _ADDRESS)
_AFTER_A_CARD = regex.compile(r"[，,；; ]{1,2}(?:住)?" + _ADDRESS + "人")
_PUBLIC = regex.compile("大厅|中心|政府|公司|医院|大学|学校|景区|博物|故宫|酒店|宾馆|商场|派出所|法院|办理")

_SURNAMES = (
    "赵钱孙李周吴郑王冯陈褚卫蒋沈韩杨朱秦尤许何吕施张孔曹严华金魏陶姜戚谢邹喻柏水窦章云苏潘葛奚范彭郎鲁韦昌马苗凤花方俞任袁柳酆鲍史唐费廉岑薛雷贺倪汤滕殷罗毕郝邬安常乐于时傅皮"
    "卞齐康伍余元卜顾孟平黄和穆萧尹姚邵湛汪祁毛禹狄米贝明臧计伏成戴谈宋茅庞熊纪舒屈项祝董梁杜阮蓝闵席季麻强贾路娄危江童颜郭梅盛林刁钟徐邱骆高夏蔡田樊胡凌霍虞万支柯管卢莫经房裘缪"
    "干解应宗丁宣邓郁单杭洪包诸左石崔吉钮龚程嵇邢滑裴陆荣翁荀羊惠甄曲家封芮储靳汲邴糜松井段富巫乌焦巴弓牧隗山谷车侯宓蓬全郗班仰秋仲伊宫宁仇栾暴甘厉戎祖武符刘景詹束龙叶幸司韶黎"
    "薄印宿白怀蒲台从鄂索咸籍赖卓蔺屠蒙池乔阴胥能苍双闻莘党翟谭贡劳逄姬申扶堵冉宰郦雍桑桂濮牛寿通边扈燕冀浦尚农温别庄晏柴瞿阎充慕连茹习宦艾鱼容向古易慎戈廖庾终暨居衡步都耿满弘匡国文"
    "寇广禄阙东欧殳沃利蔚越夔隆师巩厍聂晁勾敖融冷訾辛阚那简饶空曾毋沙乜养鞠须丰巢关蒯相查后荆红游竺权逯盖益桓公付肖闫涂趙錢孫鄭馮陳衛蔣韓楊許張嚴陶謝鄒蘇魯馬鳳費賀湯羅畢鄔樂傅齊顧黃蕭"
    "計談龐紀項藍賈婁顏鍾駱盧經應鄧單諸鈕龔榮儲焦烏車寧欒厲劉葉龍闕歐師聶饒關"
)
_TITLE = "先生|女士|小姐|老师|老師|警官|经理|师傅|医生|主任|同学|教授|队长|书记|院长|校长|记者|律师|总|局|某"
_NAME = rf"(?P<name>(?:欧阳|司马|上官|诸葛|慕容|皇甫|[{_SURNAMES}])\p{{Han}}{{1,2}})"
_AFTER_NAME = r"(?=[\s\p{P}|\"]|$|驾驶|本人|女士|先生|等人|签收|身份|电话|手机)"
_FIELDS = (
    r"(?:姓名|联系人|聯絡人|收件人|收货人|寄件人|户名|持卡人|车主|借款人|出借人|"
    r"失主|机主|申请人|嫌疑人|当事人|我(?:的)?名字(?:叫|是)|我叫|"
    r"我是(?=[^，。]{2,3}[，,]\s?(?:电话|手机)))[是为:：\s]{0,3}"
)
_NAMED = (
    regex.compile(_FIELDS + _NAME + rf"(?!{_TITLE})" + _AFTER_NAME),
    regex.compile(r"(?i)\"name\"\s*[:：]\s*\"" + _NAME + r"(?=\")"),
    regex.compile(r"(?<![\p{Han}])" + _NAME + r"\s?[（(]\s?身份证"),
    regex.compile(r"向出借人" + _NAME + r"(?=[（(])"),
)
_OF_A_SEX = regex.compile(_NAME.replace(r"{1,2}", r"{1,2}?") + r"\s?[（(，,]\s?(?:男|女)[，,)）]")
_BESIDE = regex.compile(r"(?:^|[\s:：|，,(（])" + _NAME + r"[\s|，,：:()（）]{1,4}$")


@dataclass(frozen=True)
class _Found:
    """One piece of personal data: where it stands and what it is."""

    start: int
    end: int
    kind: str
    name: str = ""


def _found(match: Any, kind: str, group: str | int = 0, name: str = "") -> _Found:
    return _Found(match.start(group), match.end(group), kind, name)


def passes_luhn(digits: str) -> bool:
    """Whether a card number's last digit is right (ISO/IEC 7812)."""
    doubled = [sum(divmod(int(d) * 2, 10)) if i % 2 else int(d) for i, d in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


def is_identity_number(number: str) -> bool:
    """Whether the check digit of an identity number is right (GB 11643)."""
    weights = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
    total = sum(int(digit) * weight for digit, weight in zip(number, weights, strict=False))
    return "10X98765432"[total % 11] == number[17].upper()


def _numbers(text: str) -> Iterator[_Found]:
    """Identity cards, bank cards, mobile numbers and plates."""
    for match in _ID_CARD.finditer(text):
        if is_identity_number(match.group().replace(" ", "")):
            yield _found(match, "id_card")
    for match in _BANK_CARD.finditer(text):
        before = text[max(0, match.start() - 20) : match.start()]
        digits = regex.sub(r"\D", "", match.group())
        if len(digits) >= 16 and passes_luhn(digits) and _OF_A_CARD.search(before) and not _OF_AN_ORDER.search(before):
            yield _found(match, "bank_card")
    for match in _MOBILE.finditer(text):
        if not _OF_AN_ORDER.search(text[max(0, match.start() - 12) : match.start()]):
            yield _found(match, "mobile")
    for match in _PLATE.finditer(text):
        yield _found(match, "plate")


def _addresses(text: str, numbers: list[_Found]) -> Iterator[_Found]:
    """Where a person lives, after a word that says so, or after an identity number."""
    for match in _HOME.finditer(text):
        said = text[match.start() : match.start("address")]
        around = text[max(0, match.start() - 14) : match.end() + 8]
        is_bare = regex.fullmatch(r"地址[是为:： ]*", said) is not None
        if is_bare and (_PUBLIC.search(around) or not numbers):
            continue
        yield _found(match, "address", "address")
    for found in numbers:
        if found.kind == "id_card" and (match := _AFTER_A_CARD.match(text, found.end)):
            yield _found(match, "address", "address")


def _names(text: str, numbers: list[_Found]) -> set[str]:
    """Full names in fields for them, in self-introductions, and just before a person's number."""
    names = {match["name"] for pattern in _NAMED for match in pattern.finditer(text)}
    if "男" in text or "女" in text:
        names |= {match["name"] for match in _OF_A_SEX.finditer(text)}
    for found in numbers:
        if found.kind == "mobile" and (match := _BESIDE.search(text, max(0, found.start - 12), found.start)):
            names.add(match["name"])
    return {name for name in names if not regex.search(_TITLE, name)}


def personal_data_of(text: str) -> list[_Found]:
    """What stands in the text, in order and without overlaps."""
    plain = text.translate(_HALF_WIDTH)
    numbers = list(_numbers(plain))
    found = [*numbers, *_addresses(plain, numbers)]
    for name in _names(plain, numbers):
        found += [_found(match, "name", name=name) for match in regex.finditer(regex.escape(name), plain)]
    kept: list[_Found] = []
    for piece in sorted(found, key=lambda piece: (piece.start, -piece.end)):
        if not kept or piece.start >= kept[-1].end:
            kept.append(piece)
    return kept


def _replaced(text: str) -> tuple[str, Counter[str]]:
    parts, at = [], 0
    aliases: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for piece in personal_data_of(text):
        counts[piece.kind] += 1
        mark = f"[{piece.kind}]"
        if piece.kind == "name":
            mark = aliases.setdefault(piece.name, f"[name{len(aliases) + 1}]")
        parts += [text[at : piece.start], mark]
        at = piece.end
    return "".join([*parts, text[at:]]), counts


_CANDIDATE = (
    rf"[0-9０-９]{{4}}|[{_PROVINCES}] ?[A-ZＡ-Ｚ]|"
    rf"我叫|姓名|[联聯][系絡]人|收[件货]人|户名|车主|"
    rf"人[，,：:]?\s?\p{{Han}}{{2,3}}[（(]|地址|住|寄|我家在|\"name\""
)
_NECESSARY = (
    rf"(?:\pN[ 　－-]?){{11}}|[{_PROVINCES}][ 　]?[A-ZＡ-Ｚ]|"
    r"(?s:(?:[址住]|所在地|[寄送]到|寄往|我家在).*"
    r"[\pNA-ZＡ-Ｚ一二三四五六七八九十百][ 　]?[号號弄巷栋棟幢座单單室户戶楼樓层組组段])|"
    rf"(?:姓名|[人主]|户名|名字[叫是]|我[叫是])[是为:：\s\pZ]{{0,3}}[{_SURNAMES}]|"
    r"[（(，,][\s\pZ]?[男女]|身份证|(?i:[\"＂][nｎ])"
)
"""Without one of these no number, plate, address or name is found."""


@operator("mapper", version=3)
def personal_data_mapper(column: Column) -> tuple[pa.Array, dict[str, npt.NDArray[np.int64]]]:
    """Replace personal data by marks such as `[mobile]`, and count each kind.

    Mainland mobile numbers, identity cards with a right check digit, bank cards that pass Luhn after a word for a card,
    number plates, addresses where somebody lives, and full names in a field for them: `[name1]`, the same for the same
    name. Service numbers, public addresses, orders, versions and what is masked already stay.
    """
    counts = {f"personal_{kind}": np.zeros(len(column), dtype=np.int64) for kind in KINDS}
    rows = np.flatnonzero(column.matches(_CANDIDATE) & column.matches(_NECESSARY))
    texts = column.texts() if len(rows) else []
    for row in rows.tolist():
        texts[row], found = _replaced(texts[row])
        for kind, number in found.items():
            counts[f"personal_{kind}"][row] = number
    changed = any(values.any() for values in counts.values())
    return (pa.array(texts, type=column.array.type) if changed else column.array), counts
