"""Copyright comments at the head of a text."""

import pyarrow as pa
import pyarrow.compute as pc
import regex

from pipelines.clean.column import Column
from pipelines.clean.operators.registry import Dialect, operator

_BLOCK = regex.compile(r"/\*[^*]*\*+(?:[^/*][^*]*\*+)*/")
_COPYRIGHT = regex.compile("copyright", regex.IGNORECASE)
_NOTICE = regex.compile(r"copyright|©|\(c\)\s*\d{4}|all rights reserved|licensed? under|版权|著作权", regex.IGNORECASE)
_LINE_COMMENTS = ("//", "#", "--")


def _without_block(text: str) -> str | None:
    """The text without its first block comment if that mentions copyright; None where it has no block comment."""
    block = _BLOCK.search(text)
    if block is None:
        return None
    return text[: block.start()] + text[block.end() :] if _COPYRIGHT.search(block.group()) else text


def _head(lines: list[str]) -> int:
    """How many lines at the head are comments or empty."""
    for number, line in enumerate(lines):
        if line and not line.startswith(_LINE_COMMENTS):
            return number
    return len(lines)


def _clean_as_data_juicer(text: str) -> str:
    if (cleaned := _without_block(text)) is not None:
        return cleaned
    lines = text.split("\n")
    return "\n".join(lines[_head(lines) :])


def _clean_zh(text: str) -> str:
    if (cleaned := _without_block(text)) is not None:
        return cleaned.lstrip("\n") if cleaned != text else text
    lines = text.split("\n")
    head = _head(lines)
    return "\n".join(lines[head:]) if _NOTICE.search("\n".join(lines[:head])) else text


@operator("mapper")
def clean_copyright_mapper(column: Column, *, dialect: Dialect = "zh") -> pa.Array:
    """Remove the first block comment if it mentions copyright, or else a head of line comments.

    In data-juicer's dialect every leading line that begins with `//`, `#` or `--` or is empty goes, Markdown
    headings and `#话题#` too; in `zh` the head goes only if it speaks of copyright.
    """
    starts = [pc.starts_with(column.array, head) for head in (*_LINE_COMMENTS, "\n")]
    candidates = column.contains("/*")
    for start in starts:
        candidates = candidates | start.to_numpy(zero_copy_only=False)
    return column.rewrite(candidates, _clean_as_data_juicer if dialect == "data_juicer" else _clean_zh)
