"""Removes links, and in Chinese texts what only held them: brackets, labels, list items, extraction codes."""

import pyarrow as pa
import regex

from pipelines.clean.column import Column, Mask
from pipelines.clean.operators.patterns import replaced
from pipelines.clean.operators.registry import Dialect, Regex, operator

LINKS = (
    r"(?i)\b((?:[a-z][\w-]+:(?:\/{1,3}|[a-z0-9%])|www\d{0,3}[.]|[a-z0-9.\-]+[.][a-z]{2,4}\/)"
    r"(?:[^\s()<>]+|\(([^\s()<>]+|(\([^\s()<>]+\)))*\))+(?:\(([^\s()<>]+|(\([^\s()<>]+\)))*\)|"
    r"[^\s`!()\[\]{};:\'\".,<>?«»“”‘’]))"
)
"""data-juicer's pattern."""

_TLDS = (
    "com|cn|net|org|edu|gov|mil|info|biz|io|co|me|tv|cc|top|xyz|site|online|app|dev|ai|im|club|vip|shop|pro|tech|wiki|link|"
    "fm|ly|gg|be|uk|us|jp|kr|hk|tw|mo|de|fr|ru|au|ca|eu|in|sg|it|es|nl|se|ch|nz|br|vn|th|my|id|ph|int|asia|mobi|name|live|"
    "news|blog|store|cloud|space|website|fun|work|ltd|group|art|red|ink|love|moe"
)
"""Ends of domains that stand before a path; .py, .sh, .md and their like are files, and in
capitals they end names such as ASP.NET and Socket.IO."""
_SERVICES = r"mysql|mariadb|postgres(?:ql)?|sqlserver|mongodb(?:\+srv)?|redis|amqps?|hdfs|tcp|unix"
"""Schemes of programs that are connected to, not of pages."""
_ADDRESS = (
    rf"(?:(?<![a-z+])(?!(?:{_SERVICES})://)[a-z][a-z0-9+.-]*://(?:[^\s/@\x00-\x7f]+(?=\.[a-z\x80-\U0010ffff]{{2,}}/))?"
    r"|(?<![a-z0-9@.-])(?:www\d{0,3}\.|(?:mailto|magnet):(?=[!-~])|data:[a-z]+/[a-z0-9.+-]+[;,]"
    rf"|(?:[a-z0-9-]+\.)+(?-i:{_TLDS})(?=/)))"
    r"[a-z0-9._~:/?#\[\]@!$&'()*+,;=%-]*[a-z0-9_~/#@$&*+=%-]"
)
"""Links end where the characters that RFC 3986 allows end, so that Chinese text around them stays. `data:` without a
media type is a key of an object, and `javascript:` is code, but as the target of words in Markdown."""
_MARKDOWN_IMAGE = regex.compile(rf"!\[[^\]\n]*\]\(\s*<?{_ADDRESS}[^)\n]*\)", regex.IGNORECASE)
_MARKDOWN_LINK = regex.compile(
    rf"\[([^\]\n]+)\]\(\s*<?(?={_ADDRESS}|javascript:)[^()\s]*(?:\([^()\s]*\)[^()\s]*)*(?:\s+\"[^\"\n]*\")?\s*\)",
    regex.IGNORECASE,
)
_BARE = regex.compile(_ADDRESS, regex.IGNORECASE)

MARK = "\ufdd0"
"""Stands for a link that was found; no text holds this code point, which Unicode keeps free of characters."""
_LABEL = (
    r"[^\s\p{P}\p{S}\ufdd0]{0,6}(?:链接|鏈接|連結|网址|網址|地址|传送门|傳送門|原文|来源|來源|出处|出處|原帖|转自|转载自|全文|仓库|视频|文章|声明|见|看|戳|点击|點擊|"
    r"详情|参考|官网|官網|主页|下载|链接如下|如下|这里|這裡|http|url|link|source)[^\s\p{P}\p{S}\ufdd0]{0,2}"
)
_STEPS = [
    (rf"{MARK}(?:[ \t]*[、,，;；|和及][ \t]*{MARK}|[ \t]+{MARK})+", MARK),
    (rf"{MARK}[ \t]*[，,；;]?[ \t]*(?:提取码|提取碼|密码|访问码|验证码)[ \t]*[:：]?[ \t]*[A-Za-z0-9]{{4,6}}", MARK),
    (
        rf"[ \t]*(?:[（(]\s*(?:{_LABEL}[:：]\s*)?{MARK}\s*[)）]|"
        rf"[【\[]\s*(?:{_LABEL}[:：]\s*)?{MARK}\s*[】\]]|[<＜]\s*{MARK}\s*[>＞])",
        MARK,
    ),
    (rf"(?m)(?:(?<=^)|(?<=[。！？!?；;\n]))[ \t]*(?:{_LABEL})[ \t]*(?:[:：]|[-=]*[→>]+)[ \t]*{MARK}", MARK),
    (rf"[，,、；;]?[ \t]*(?<=[，,、；; \t])(?:{_LABEL})[ \t]*(?:[:：]|[-=]*[→>]+)[ \t]*{MARK}", MARK),
    (
        rf"(?m)^[ \t]*(?:[-*•·●▪>]+|\d{{1,3}}[.、．)）]|[（(]\d{{1,3}}[)）]|"
        rf"[①-⑳])?[ \t]*{MARK}[ \t]*[。.；;，,]?[ \t]*(?:\n|\Z)",
        "",
    ),
    (rf"(?m)^[ \t]*{MARK}[ \t]*[，,、；;][ \t]*", ""),
    (rf"[ \t]*[:：]?[ \t]*{MARK}(?=[\p{{P}}\s]|\Z)", MARK),
    (rf"(?:(?<=[\p{{Han}}\p{{P}}])[ \t]*|[ \t]+|^){MARK}[ \t]+(?=[\p{{Han}}，。！？；：、,.!?;:)）])", ""),
    (rf"[ \t]+{MARK}", ""),
    (MARK, ""),
]
_COMPILED = [(regex.compile(pattern, regex.IGNORECASE), new) for pattern, new in _STEPS]


def _without_links(text: str) -> str:
    """The text without its links and what only held them; the text itself where it has none."""
    marked: str = _MARKDOWN_LINK.sub(r"\1", _MARKDOWN_IMAGE.sub(MARK, text))
    marked = _BARE.sub(MARK, marked)
    if MARK not in marked:
        return marked
    for pattern, new in _COMPILED:
        marked = pattern.sub(new, marked)
    marked = marked if text.startswith("\n") else marked.lstrip("\n")
    return marked if text.endswith("\n") else marked.removesuffix("\n")


def _may_hold_link(column: Column) -> Mask:
    return column.matches(r"(?i):[/a-z0-9%]|www\pN{0,3}\.|\.[a-z]{2,10}/")


@operator("mapper", version=5)
def clean_links_mapper(
    column: Column, *, pattern: Regex | None = None, repl: str = "", dialect: Dialect = "zh"
) -> pa.Array:
    """Replace links by `repl`.

    In data-juicer's dialect a link needs a word boundary before it and runs to the next space, Chinese text included.
    In `zh` it may stand anywhere and ends with the last character that belongs to it; names such as `Node.js/Express`
    are none; without `repl`, what only held the link goes with it: brackets, a label such as `传送门：`, an extraction
    code, a list item or line with nothing else. `[words](link)` becomes the words.
    """
    if dialect == "data_juicer" or pattern:
        return replaced(column, pattern, LINKS, repl, _may_hold_link)
    if repl:
        return replaced(column, None, f"(?i){_ADDRESS}", repl, _may_hold_link)
    return column.rewrite(_may_hold_link(column), _without_links)
