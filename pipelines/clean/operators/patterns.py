"""Mappers that remove what a pattern finds: mail addresses, IP addresses, links.

A cheap test over the column comes first and never misses a match; the `regex` module decides, with data-juicer's
patterns, because its classes are Unicode's.
"""

from collections.abc import Callable
from functools import cache

import pyarrow as pa
import regex

from pipelines.clean.column import Column, Mask
from pipelines.clean.operators.registry import Dialect, Regex, operator

EMAIL = r"[A-Za-z0-9.\-+_]+@[a-z0-9.\-+_]+\.[a-z]+"
IP = (
    r"(?:(?:1[0-9][0-9]\.)|(?:2[0-4][0-9]\.)|(?:25[0-5]\.)|(?:[1-9][0-9]\.)|(?:[0-9]\.))"
    r"{3}(?:(?:1[0-9][0-9])|(?:2[0-4][0-9])|(?:25[0-5])|(?:[1-9][0-9])|(?:[0-9]))|"
    r"([\da-fA-F]{1,4}:){7}[\da-fA-F]{1,4}"
)
LINKS = (
    r"(?i)\b((?:[a-z][\w-]+:(?:\/{1,3}|[a-z0-9%])|www\d{0,3}[.]|[a-z0-9.\-]+[.][a-z]{2,4}\/)"
    r"(?:[^\s()<>]+|\(([^\s()<>]+|(\([^\s()<>]+\)))*\))+(?:\(([^\s()<>]+|(\([^\s()<>]+\)))*\)|"
    r"[^\s`!()\[\]{};:\'\".,<>?«»“”‘’]))"
)
LINKS_ZH = (
    r"(?i)(?:(?<![a-z])[a-z][a-z0-9+.-]*://(?:[^\s/@\x00-\x7f]+(?=\.[a-z\x80-\U0010ffff]{2,}/))?"
    r"|(?<![a-z0-9@.-])(?:www\d{0,3}\.|(?:mailto|magnet|data|javascript):(?=[^\s\x80-\U0010ffff])"
    r"|(?:[a-z0-9-]+\.)+[a-z]{2,10}(?=/)))"
    r"[a-z0-9._~:/?#\[\]@!$&'()*+,;=%-]*[a-z0-9_~/#@$&*+=%-]"
)
"""Links end where the characters that RFC 3986 allows end, so that Chinese text around them stays."""


@cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > 2 and pattern[:2] in ("r'", 'r"') and pattern[-1] == pattern[1]:  # a Python literal in a YAML
        pattern = pattern[2:-1]
    return regex.compile(pattern, flags=regex.DOTALL)


def _without(column: Column, given: str | None, default: str, repl: str, likely: Callable[[Column], Mask]) -> pa.Array:
    found = _compiled(given or default)
    candidates = likely(column) if given is None else column.matches("")
    return column.rewrite(candidates, lambda text: found.sub(repl, text))


@operator("mapper")
def clean_email_mapper(column: Column, *, pattern: Regex | None = None, repl: str = "") -> pa.Array:
    """Replace mail addresses by `repl`."""
    return _without(column, pattern, EMAIL, repl, lambda column: column.contains("@"))


def _may_hold_ip(column: Column) -> Mask:
    return column.matches(r"[0-9]\.[0-9]{1,3}\.[0-9]|:[^:]{1,4}:[^:]{1,4}:[^:]{1,4}:")


@operator("mapper")
def clean_ip_mapper(column: Column, *, pattern: Regex | None = None, repl: str = "") -> pa.Array:
    """Replace IPv4 addresses, and IPv6 addresses with all eight groups, by `repl`."""
    return _without(column, pattern, IP, repl, _may_hold_ip)


def _may_hold_link(column: Column) -> Mask:
    return column.matches(r"(?i):[/a-z0-9%]|www\pN{0,3}\.|\.[a-z]{2,10}/")


@operator("mapper")
def clean_links_mapper(
    column: Column, *, pattern: Regex | None = None, repl: str = "", dialect: Dialect = "zh"
) -> pa.Array:
    """Replace links by `repl`.

    In data-juicer's dialect a link needs a word boundary before it and runs to the next space, Chinese text
    included; in `zh` it may stand anywhere and ends with the last character that belongs to it.
    """
    return _without(column, pattern, LINKS if dialect == "data_juicer" else LINKS_ZH, repl, _may_hold_link)
