"""Mappers that normalize whitespace, broken Unicode and Chinese variants."""

import re
import sys
from functools import cache
from typing import Any, Literal

import pyarrow as pa
import regex

from pipelines.clean.column import Column
from pipelines.clean.operators.registry import Dialect, operator

WHITESPACES = (
    "\t \x84\xa0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u200b\u200c\u200d\u202f\u205f\u2060"
    "\u3000\ufffc"
)
"""data-juicer's list (`ops/common/special_characters.py`)."""
_TO_SPACE = str.maketrans(dict.fromkeys(WHITESPACES, " "))


@cache
def _any_whitespace() -> str:
    """An RE2 pattern for texts that are not normalized: at an edge what `str.strip` takes, or anything on the list."""
    edge = "".join(re.escape(chr(c)) for c in range(sys.maxunicode + 1) if chr(c).isspace())
    return f"[{WHITESPACES.replace(' ', '')}]|\\A[{edge}]|[{edge}]\\z"


_JOINED = regex.compile(
    r"(?<=[\p{Extended_Pictographic}\ufe0f\U0001f3fb-\U0001f3ff])\u200d(?=\p{Extended_Pictographic})"
)
_INDENTED = regex.compile(r"(?m)^([ \t]+)(?=\S)")


def _normalized(text: str) -> str:
    """Plain spaces, but for the joints of emoji and the indentation of lines that are indented by blanks or tabs."""
    is_indented = len(_INDENTED.findall(text)) > 1 or text.startswith("\t")
    text = text.rstrip().lstrip("\r\n") if is_indented else text.strip()
    joints = _JOINED.sub("\ufdd0", text)
    lines = joints.split("\n")
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip("\t ")) if is_indented else 0
        lines[number] = line[:indent] + line[indent:].translate(_TO_SPACE)
    return "\n".join(lines).replace("\ufdd0", "\u200d")


@operator("mapper", version=2)
def whitespace_normalization_mapper(column: Column, *, dialect: Dialect = "zh") -> pa.Array:
    """Make every kind of space a plain one, and take whitespace off both ends; newlines inside stay.

    In `zh` the joints inside emoji stay too, and so does indentation in a text with several indented lines.
    """
    change = _normalized if dialect == "zh" else (lambda text: text.strip().translate(_TO_SPACE))
    return column.rewrite(column.matches(_any_whitespace()), change)


_UNTOUCHED = r"\A[\t\n\x20-\x25\x27-\x7e]*\z"
"""Texts that ftfy never changes: plain ASCII without entities, control characters or escapes."""


@operator("mapper", packages=("ftfy",))
def fix_unicode_mapper(
    column: Column,
    *,
    normalization: Literal["NFC", "NFKC", "NFD", "NFKD", "nfc", "nfkc", "nfd", "nfkd"] | None = None,
    dialect: Dialect = "zh",
) -> pa.Array:
    """Repair mojibake and other broken Unicode with ftfy, and normalize (NFC where nothing is given).

    In `zh`, full-width punctuation and curly quotes, which Chinese is written with, stay as they are.
    """
    import ftfy

    settings: dict[str, Any] = {"normalization": (normalization or "NFC").upper()}
    if dialect == "zh":
        settings |= {"fix_character_width": False, "uncurl_quotes": False}
    config = ftfy.TextFixerConfig(**settings)
    return column.rewrite(~column.matches(_UNTOUCHED), lambda text: str(ftfy.fix_text(text, config)))


Conversion = Literal[
    "s2t", "t2s", "s2tw", "tw2s", "s2hk", "hk2s", "s2twp", "tw2sp", "t2tw", "tw2t", "hk2t", "t2hk", "t2jp", "jp2t"
]


@cache
def _converter(mode: str) -> Any:
    import opencc

    return opencc.OpenCC(f"{mode}.json")


@operator("mapper", packages=("opencc",))
def chinese_convert_mapper(column: Column, *, mode: Conversion = "s2t", dialect: Dialect = "zh") -> pa.Array:
    """Convert between simplified, traditional and Japanese characters with OpenCC; `mode` is OpenCC's own name.

    OpenCC may end at a NUL character, and so does the text in data-juicer's dialect; in `zh` nothing is lost.
    """
    convert = _converter(mode).convert
    if dialect == "data_juicer":
        return column.rewrite(column.matches(r"\p{Han}|\x00"), convert)
    return column.rewrite(column.matches(r"\p{Han}"), lambda text: "\0".join(map(convert, text.split("\0"))))


_ENGLISH_MARKS = str.maketrans(
    {
        **dict.fromkeys("„”“«»１」「《》", '"'),
        **dict(zip("，。、´∶：？！（）；–～’━〈〉【】％►", ",.,'::?!();-~'-<>[]%-", strict=True)),
        "—": " - ",
        "．": ". ",
        "…": "...",
    }
)
"""data-juicer's table (of its operator of that name), its １ for a quotation mark included."""


@operator("mapper")
def punctuation_normalization_mapper(column: Column) -> pa.Array:
    """Make full-width and typographic marks the plain ones of English; not for Chinese that people read."""
    marked = column.matches("[，。、„”“«»１」「《》´∶：？！（）；–—．～’…━〈〉【】％►]")
    return column.rewrite(marked, lambda text: text.translate(_ENGLISH_MARKS))
