"""Mappers that remove what a pattern finds: mail addresses and IP addresses.

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
EMAIL_ZH = (
    r"(?<![A-Za-z0-9.+_-])[A-Za-z0-9][A-Za-z0-9.+_-]*@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,}"
)
"""Domains in any case; marks around an address stay."""
IP = (
    r"(?:(?:1[0-9][0-9]\.)|(?:2[0-4][0-9]\.)|(?:25[0-5]\.)|(?:[1-9][0-9]\.)|(?:[0-9]\.))"
    r"{3}(?:(?:1[0-9][0-9])|(?:2[0-4][0-9])|(?:25[0-5])|(?:[1-9][0-9])|(?:[0-9]))|"
    r"([\da-fA-F]{1,4}:){7}[\da-fA-F]{1,4}"
)


@cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > 2 and pattern[:2] in ("r'", 'r"') and pattern[-1] == pattern[1]:  # a Python literal in a YAML
        pattern = pattern[2:-1]
    return regex.compile(pattern, flags=regex.DOTALL)


def replaced(column: Column, given: str | None, default: str, repl: str, likely: Callable[[Column], Mask]) -> pa.Array:
    """What a given pattern finds, or the default one among the likely rows, replaced."""
    found = _compiled(given or default)
    candidates = likely(column) if given is None else column.matches("")
    return column.rewrite(candidates, lambda text: found.sub(repl, text))


@operator("mapper", version=2)
def clean_email_mapper(
    column: Column, *, pattern: Regex | None = None, repl: str = "", dialect: Dialect = "zh"
) -> pa.Array:
    """Replace mail addresses by `repl`; in data-juicer's dialect only those whose domain is in lower case."""
    default = EMAIL if dialect == "data_juicer" else EMAIL_ZH
    return replaced(column, pattern, default, repl, lambda column: column.contains("@"))


def _may_hold_ip(column: Column) -> Mask:
    return column.matches(r"[0-9]\.[0-9]{1,3}\.[0-9]|:[^:]{1,4}:[^:]{1,4}:[^:]{1,4}:")


@operator("mapper")
def clean_ip_mapper(column: Column, *, pattern: Regex | None = None, repl: str = "") -> pa.Array:
    """Replace IPv4 addresses, and IPv6 addresses with all eight groups, by `repl`."""
    return replaced(column, pattern, IP, repl, _may_hold_ip)
