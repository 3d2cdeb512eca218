"""HTML to text: by the Lexbor parser as data-juicer does it, or by the known tags alone."""

import re
from collections.abc import Iterator
from html import unescape
from html.entities import html5
from typing import Any

import pyarrow as pa
from selectolax.lexbor import LexborHTMLParser

from pipelines.clean.column import Column
from pipelines.clean.operators.registry import Dialect, operator

_BULLETS = (("<li>", "\n*"), ("</li>", ""), ("<ol>", "\n*"), ("</ol>", ""))


def _text_by_lexbor(html: str) -> str:
    for tag, replacement in _BULLETS:
        html = html.replace(tag, replacement)
    text: Any = LexborHTMLParser(html).text()
    return str(text)


_BLOCKS = frozenset(
    [
        "address",
        "article",
        "aside",
        "blockquote",
        "body",
        "center",
        "dd",
        "details",
        "dialog",
        "div",
        "dl",
        "dt",
        "fieldset",
        "figcaption",
        "figure",
        "footer",
        "form",
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "h6",
        "head",
        "header",
        "hgroup",
        "hr",
        "html",
        "legend",
        "main",
        "menu",
        "nav",
        "ol",
        "optgroup",
        "option",
        "p",
        "pre",
        "search",
        "section",
        "select",
        "summary",
        "table",
        "tbody",
        "tfoot",
        "thead",
        "title",
        "tr",
        "ul",
        "caption",
    ]
)
_WITHOUT_CONTENT = ("script", "style", "noscript", "template", "iframe", "svg", "object")
_INLINE = [
    "a",
    "abbr",
    "acronym",
    "area",
    "audio",
    "b",
    "base",
    "basefont",
    "bdi",
    "bdo",
    "big",
    "br",
    "button",
    "canvas",
    "cite",
    "code",
    "col",
    "colgroup",
    "data",
    "datalist",
    "del",
    "dfn",
    "em",
    "embed",
    "font",
    "i",
    "img",
    "input",
    "ins",
    "kbd",
    "label",
    "li",
    "link",
    "map",
    "mark",
    "meta",
    "meter",
    "nobr",
    "output",
    "param",
    "picture",
    "progress",
    "q",
    "rp",
    "rt",
    "ruby",
    "s",
    "samp",
    "slot",
    "small",
    "source",
    "span",
    "strike",
    "strong",
    "sub",
    "sup",
    "td",
    "textarea",
    "th",
    "time",
    "track",
    "tt",
    "u",
    "var",
    "video",
    "wbr",
]
_ATTRIBUTE_WITHOUT_VALUE = (
    "allowfullscreen|async|autofocus|autoplay|checked|compact|controls|default|defer|disabled|download|hidden|inert|"
    "ismap|itemscope|loop|multiple|muted|nofollow|nomodule|noshade|novalidate|nowrap|open|playsinline|readonly|required|"
    "reversed|selected|data-[\\w-]+"
)
_CLOSED_BY_THE_NEXT = frozenset(
    [
        "area",
        "base",
        "br",
        "col",
        "embed",
        "hr",
        "img",
        "input",
        "link",
        "meta",
        "param",
        "source",
        "track",
        "wbr",
        "html",
        "head",
        "body",
        "p",
        "li",
        "dt",
        "dd",
        "tr",
        "td",
        "th",
        "thead",
        "tbody",
        "tfoot",
        "colgroup",
        "option",
        "optgroup",
        "rt",
        "rp",
    ]
)
"""Tags that need no closing one."""
_NAMES = "|".join(sorted((*_BLOCKS, *_WITHOUT_CONTENT, *_INLINE), key=len, reverse=True))
_ATTRIBUTE = rf"""\s+(?:[a-z_:@][\w:.-]*\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>=`]+)|(?:{_ATTRIBUTE_WITHOUT_VALUE})\b)"""
_TOKEN = re.compile(
    rf"""
      (?P<fence>^[ ]*(?P<marks>```+|~~~+)[^\n]*\n.*?(?:^[ ]*(?P=marks)[`~]*[ ]*$|\Z))
    | (?P<quoted>(?<!`)(?P<ticks>`+)(?!`)[^`\n]{{1,200}}(?P=ticks)(?!`))
    | (?P<gone><!--.*?-->|<!doctype\s[^<>]*>
        |<(?P<holder>{"|".join(_WITHOUT_CONTENT)})(?:{_ATTRIBUTE})*\s*>.*?</(?P=holder)\s*>)
    | <(?P<close>/?)(?P<name>{_NAMES})(?P<attributes>(?:{_ATTRIBUTE})*)\s*/?>
    | &(?:\#(?P<decimal>[0-9]{{1,7}})|\#x(?P<hexadecimal>[0-9a-f]{{1,6}})|(?P<entity>[a-z][a-z0-9]{{1,31}}));
    """,
    re.VERBOSE | re.IGNORECASE | re.DOTALL | re.MULTILINE,
)
_FORMULA = re.compile(r"""\seeimg\s*=|equation\?tex=""", re.IGNORECASE)
"""Attributes of the images that Zhihu sets formulas as."""
_ALT = re.compile(r"""\salt\s*=\s*(?:"([^"]*)"|'([^']*)')""", re.IGNORECASE)
_SPOKEN_OF = re.compile(" ?(?:标签|標籤|元素)(?![:：])")
_GLUED = re.compile(r"[A-Za-z0-9_>]")
_BLANK_LINES = re.compile(r"\n[ \t\r]*(?:\n[ \t\r]*)+")


def _decoded(match: re.Match[str]) -> str:
    """The character of an entity; what names none stays as it is."""
    if match["entity"]:
        return html5.get(f"{match['entity']};", match.group())
    number = int(match["decimal"]) if match["decimal"] else int(match["hexadecimal"], 16)
    is_character = 0 < number < 0x110000 and not 0xD800 <= number < 0xE000
    return chr(number) if is_character else match.group()


def _formula(match: re.Match[str]) -> str | None:
    """The TeX of a formula that is set as an image; None for other tags."""
    alt = _ALT.search(match["attributes"]) if match["name"].lower() == "img" else None
    if alt is None or not _FORMULA.search(match["attributes"]):
        return None
    return unescape(alt[1] or alt[2] or "").strip()


def _is_text(match: re.Match[str], html: str) -> bool:
    """Whether what looks like a tag is none: after a word and never closed, as in `vector<b>` and `Map<i>`, or, in a
    text that closes no tag, spoken of, as in `<p>标签`, or one that HTML wants closed, as in `从<h1>到<h6>`."""
    name, at = match["name"].lower(), match.start()
    if "</" not in html and (
        _SPOKEN_OF.match(html, match.end()) or (name not in _CLOSED_BY_THE_NEXT and not match["attributes"])
    ):
        return True
    if match["close"] or match["attributes"] or name in _BLOCKS or name in ("br", "li", "img"):
        return False
    glued = at > 0 and _GLUED.match(html[at - 1]) and html[at - 1] != ">"
    return bool(glued) and f"</{name}" not in html[match.end() :].lower()


def _tokens(html: str) -> Iterator[tuple[str, str]]:
    """The text in pieces: `text` and `code`, and tags by name with `/` before the closing ones."""
    at = 0
    for match in _TOKEN.finditer(html):
        if match["name"] and _is_text(match, html):
            continue
        if match.start() > at:
            yield "text", html[at : match.start()]
        at = match.end()
        if match["name"] and (formula := _formula(match)):
            yield "text", formula
        elif match["name"]:
            yield match["close"] + match["name"].lower(), ""
        elif match["fence"] or match["quoted"]:
            yield "code", match.group()
        elif not match["gone"]:
            yield "text", _decoded(match).replace("\xa0", " ")
    if at < len(html):
        yield "text", html[at:]


class _Lines:
    """Text as it is put together; breaks are kept back until the next words, so that a run of them counts once."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.breaks: list[str] = []
        self.bullet = self.pre = False
        self.cells = 0
        self.cell_is_empty = False

    def tag(self, name: str) -> None:
        """What a tag does to the line."""
        bare = name.removeprefix("/")
        if bare == "pre":
            self.pre = name == "pre"
        if bare in ("td", "th"):
            if name == bare:
                self._cell()
            self.breaks.clear()
        elif bare == "br":
            self.breaks.append("br")
        elif bare in _BLOCKS or bare == "li":
            if bare == "tr":
                self.cells = 0
            if not self.cell_is_empty or bare == "tr":
                self.breaks.append("block")
            if name == "li":
                self.bullet = True
            elif name == "/li":
                self.bullet = False

    def _cell(self) -> None:
        if self.cells:
            self.parts[-1] = self.parts[-1].rstrip(" \n\r")
            self.parts.append("\t")
        elif self.breaks:
            self._break()
        self.cells += 1
        self.cell_is_empty = True

    def _break(self) -> None:
        """One line break for a run of them; a blank line for two `<br>`, or one on a line of its own."""
        breaks, self.breaks = self.breaks, []
        is_blank = breaks.count("br") > 1 or ("br" in breaks and breaks[0] == "block")
        if self.parts:
            self.parts[-1] = self.parts[-1].rstrip(" \n\r")
            self.parts.append("\n\n" if is_blank else "\n")

    def text(self, words: str) -> None:
        """Words, after the breaks before them."""
        begins = bool(self.breaks) or self.cell_is_empty or not self.parts
        if begins and not self.pre:
            words = words.lstrip(" \t\n\r\f")
        if not words:
            return
        if self.breaks:
            self._break()
        if self.bullet:
            words, self.bullet = f"* {words}", False
        self.cell_is_empty = False
        self.parts.append(words)


def text_of_known_tags(html: str) -> str:
    """The text of HTML, of which only HTML's own tags count as tags; what has none keeps its blank space."""
    lines, has_tags = _Lines(), False
    for kind, words in _tokens(html):
        if kind in ("text", "code"):
            lines.text(words)
        else:
            has_tags = True
            lines.tag(kind)
    text = "".join(lines.parts)
    return _BLANK_LINES.sub("\n\n", text).strip() if has_tags else text


_MARKUP = rf"(?i)</?(?:{_NAMES})[\s/>]|<!--|<!doctype|&(?:#[0-9]+|#x[0-9a-f]+|[a-z][a-z0-9]+);"
"""What only HTML writes: a known tag, a comment, or an entity."""


@operator("mapper", version=4)
def clean_html_mapper(column: Column, *, dialect: Dialect = "zh") -> pa.Array:
    """Replace HTML by its text.

    In data-juicer's dialect every text goes through the Lexbor parser, which also drops leading whitespace and turns
    carriage returns into newlines; list items become lines that begin with `*`, other tags vanish without a line break.
    In `zh` only HTML's own tags are tags, so `vector<int>` and `<think>` stay, as does what stands in code fences or
    between backticks. Blocks and `<br>` end a line, list items begin with `* `, cells are parted by tabs, the contents
    of scripts and styles go, formulas set as images become their TeX, and entities are decoded once.
    """
    if dialect == "zh":
        return column.rewrite(column.matches(_MARKUP), text_of_known_tags)
    markup = column.contains("<") | column.contains("&") | column.matches(r"^[\t\n\f\r ]|[\r\x00]")
    return column.rewrite(markup, _text_by_lexbor)
