"""The rows labelled by hand, as `tests/data/labelled/README.md` describes them."""

import hashlib
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pipelines.errors import DataError

FOLDER = Path(__file__).parents[1] / "tests" / "data" / "labelled"


@dataclass(frozen=True)
class LabelledText:
    """One text and what a person would do with it."""

    id: str
    label: str
    text: str
    right: str
    """The text as a mapper should leave it; the text itself where the file has no edits."""
    kinds: dict[str, int]
    """How many edits of each kind, in `personal_data`."""


@dataclass(frozen=True)
class LabelledPair:
    """Two rows, each as (question, answer), and whether the second repeats the first."""

    id: str
    label: str
    first: tuple[str, str]
    second: tuple[str, str]


def labelled_texts(name: str, data: Path) -> list[LabelledText]:
    """The rows of a file; `data` is the folder that real rows are read from. DataError where one has changed."""
    return [
        LabelledText(row["id"], row["label"], text, edited(text, row.get("edits", [])), row.get("kinds", {}))
        for row in _lines(name)
        for text in [_text(row, data)]
    ]


def labelled_pairs(data: Path) -> list[LabelledPair]:
    """The pairs of `near_duplicates`."""
    return [
        LabelledPair(row["id"], row["label"], _side(row["id"], row["a"], data), _side(row["id"], row["b"], data))
        for row in _lines("near_duplicates")
    ]


def edited(text: str, edits: list[tuple[int, int, str]]) -> str:
    """The text with `[start, end, new]` carried out; offsets are those of the original text."""
    parts, at = [], 0
    for start, end, new in edits:
        parts += [text[at:start], new]
        at = end
    return "".join([*parts, text[at:]])


def _lines(name: str) -> list[dict[str, Any]]:
    lines = (FOLDER / f"{name}.jsonl").read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines if line]


def _text(row: dict[str, Any], data: Path) -> str:
    if "text" in row:
        return str(row["text"])
    return _checked(row["id"], str(_cell(data / row["file"], row["row"], row["column"])), row["digest"])


def _side(name: str, side: dict[str, Any], data: Path) -> tuple[str, str]:
    if "answer" in side:
        return side.get("question", ""), side["answer"]
    cells = [str(_cell(data / side["file"], side["row"], column) or "") for column in side["columns"]]
    _checked(name, "\n".join(filter(None, cells)), side["digest"])
    return "\n".join(filter(None, cells[:-1])), cells[-1]


def _checked(name: str, text: str, digest: str) -> str:
    if not hashlib.sha256(text.encode()).hexdigest().startswith(digest):
        raise DataError(f"labelled row {name}: the file holds another text than was labelled")
    return text


def _cell(path: Path, row: int, column: str) -> Any:
    rows = _rows(path)
    if isinstance(rows, dict):
        return rows[column][row]
    cell = rows[row]
    for key in column.split("."):
        cell = cell[int(key)] if isinstance(cell, list) else cell[key]
    return cell


@cache
def _rows(path: Path) -> Any:
    """A Parquet file by column, or the elements of a JSON or JSONL file."""
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pydict()
    text = path.read_text(encoding="utf-8")
    return json.loads(text) if text.lstrip().startswith("[") else [json.loads(x) for x in text.split("\n") if x]
