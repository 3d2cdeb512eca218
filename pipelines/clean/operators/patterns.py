"""Mappers that remove what a pattern finds: mail addresses, IP addresses, tables, and what a recipe names.

A cheap test over the column comes first and never misses a match; the `regex` module decides, with data-juicer's
patterns, because its classes are Unicode's.
"""

from collections.abc import Callable, Iterator
from functools import cache
from typing import Annotated

import pyarrow as pa
import regex
from pydantic import Field

from pipelines.clean.column import Column, Mask
from pipelines.clean.operators.registry import Dialect, Parameters, Regex, operator

EMAIL = r"[A-Za-z0-9.\-+_]+@[a-z0-9.\-+_]+\.[a-z]+"
EMAIL_ZH = (
    r"(?<![A-Za-z0-9.+_-])[A-Za-z0-9][A-Za-z0-9.+_-]*@(?:[A-Za-z0-9](?:[A-Za-z0-9-]*[A-Za-z0-9])?\.)+[A-Za-z]{2,}"
    r"(?!\.?[A-Za-z]|:[\w.~-]*/)"
)
"""Domains in any case; marks around an address stay. A login before a path (`git@HOST:a/b`) is no address."""
IP = (
    r"(?:(?:1[0-9][0-9]\.)|(?:2[0-4][0-9]\.)|(?:25[0-5]\.)|(?:[1-9][0-9]\.)|(?:[0-9]\.))"
    r"{3}(?:(?:1[0-9][0-9])|(?:2[0-4][0-9])|(?:25[0-5])|(?:[1-9][0-9])|(?:[0-9]))|"
    r"([\da-fA-F]{1,4}:){7}[\da-fA-F]{1,4}"
)

IP_ZH = (
    r"(?<![\d.vV]|第 ?|版本?号?[:： ]{0,2}|(?i:version|ver)[:. ]{0,2})"
    rf"(?:{IP})(?!\d|\.\d|[ ]?小?[节節条條款章版])"
)
"""Four numbers that count a version or a section are no address."""


def _bare(pattern: str) -> str:
    """A pattern that stands in a YAML as a Python literal, without its marks."""
    is_literal = len(pattern) > 2 and pattern[:2] in ("r'", 'r"') and pattern[-1] == pattern[1]
    return pattern[2:-1] if is_literal else pattern


@cache
def _compiled(pattern: str) -> regex.Pattern[str]:
    return regex.compile(_bare(pattern), flags=regex.DOTALL)


def replaced(column: Column, given: str | None, default: str, repl: str, likely: Callable[[Column], Mask]) -> pa.Array:
    """What a given pattern finds, or the default one among the likely rows, replaced."""
    found = _compiled(given or default)
    candidates = likely(column) if given is None else column.matches("")
    return column.rewrite(candidates, lambda text: found.sub(repl, text))


@operator("mapper", version=3)
def clean_email_mapper(
    column: Column, *, pattern: Regex | None = None, repl: str = "", dialect: Dialect = "zh"
) -> pa.Array:
    """Replace mail addresses by `repl`; in data-juicer's dialect only those whose domain is in lower case."""
    default = EMAIL if dialect == "data_juicer" else EMAIL_ZH
    return replaced(column, pattern, default, repl, lambda column: column.contains("@"))


def _may_hold_ip(column: Column) -> Mask:
    return column.matches(r"[0-9]\.[0-9]{1,3}\.[0-9]|:[^:]{1,4}:[^:]{1,4}:[^:]{1,4}:")


@operator("mapper", version=2)
def clean_ip_mapper(
    column: Column, *, pattern: Regex | None = None, repl: str = "", dialect: Dialect = "zh"
) -> pa.Array:
    """Replace IPv4 addresses, and IPv6 addresses with all eight groups, by `repl`; in `zh`, numbers of versions and
    sections (`版本 1.2.3.4`, `10.5.2.1 小节`) stay."""
    return replaced(column, pattern, IP if dialect == "data_juicer" else IP_ZH, repl, _may_hold_ip)


def _check_replacements(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    pattern, repl = parameters["pattern"], parameters["repl"]
    patterns = pattern if isinstance(pattern, list) else [pattern]
    if isinstance(repl, list) and pattern is not None and len(repl) != len(patterns):
        yield "repl", f"{len(repl)} replacements for {len(patterns)} patterns"
    for number, found in enumerate(patterns if pattern is not None else []):
        try:
            given = repl[number] if isinstance(repl, list) and number < len(repl) else repl
            regex.compile(f"(?:{_bare(found)})|$").sub(
                given if isinstance(given, str) else "", ""
            )  # reads the template
        except (regex.error, IndexError) as error:
            yield "repl", f"not a replacement for {found!r}: {error}"


@operator("mapper", check=_check_replacements)
def replace_content_mapper(
    column: Column, *, pattern: Regex | list[Regex] | None = None, repl: str | list[str] = ""
) -> pa.Array:
    """Replace what each pattern finds by `repl`, or by the replacement at its place in a list; in order."""
    if pattern is None:
        return column.array
    patterns = [_compiled(one) for one in ([pattern] if isinstance(pattern, str) else pattern)]
    replacements = [repl] * len(patterns) if isinstance(repl, str) else repl

    def replaced_in(text: str) -> str:
        for found, replacement in zip(patterns, replacements, strict=True):
            text = found.sub(replacement, text)
        return text

    return column.rewrite(column.matches(""), replaced_in)


Columns = Annotated[int, Field(ge=2, le=20)]


@operator("mapper")
def remove_table_text_mapper(column: Column, *, min_col: Columns = 2, max_col: Columns = 20) -> pa.Array:
    """Remove tables: two and more lines of `min_col` to `max_col` words parted by a blank, a bar or a tab."""
    tables = [
        regex.compile(rf"(?<=\n)((\S+?)([ |\t](\S+?)){{{bars}}}\n+){{2,}}") for bars in range(min_col - 1, max_col)
    ]

    def without_tables(text: str) -> str:
        for table in tables:
            text = table.sub("", text)
        return text

    return column.rewrite(column.matches(r"\n[^\n]*[ |\t][^\n]*\n+[^\n]*[ |\t]"), without_tables)
