"""HTML to text, by the Lexbor parser."""

from typing import Any

import pyarrow as pa
from selectolax.lexbor import LexborHTMLParser

from pipelines.clean.column import Column
from pipelines.clean.operators.registry import Dialect, operator

_BULLETS = (("<li>", "\n*"), ("</li>", ""), ("<ol>", "\n*"), ("</ol>", ""))


def _text(html: str) -> str:
    for tag, replacement in _BULLETS:
        html = html.replace(tag, replacement)
    text: Any = LexborHTMLParser(html).text()
    return str(text)


@operator("mapper")
def clean_html_mapper(column: Column, *, dialect: Dialect = "zh") -> pa.Array:
    """Replace HTML by its text; list items become lines that begin with `*`, other tags vanish without a line break.

    In data-juicer's dialect every text goes through the parser, which also drops leading whitespace and turns
    carriage returns into newlines; in `zh` only texts with a tag or an entity do.
    """
    markup = column.contains("<") | column.contains("&") if dialect == "data_juicer" else column.matches(_MARKUP)
    if dialect == "data_juicer":
        markup = markup | column.matches(r"^[\t\n\f\r ]|[\r\x00]")
    return column.rewrite(markup, _text)


_MARKUP = r"</?[a-zA-Z][^<>]*>|<!--|&(?:#[0-9]+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]+);"
"""What only HTML writes: a complete tag, a comment, or an entity."""
