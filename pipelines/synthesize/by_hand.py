"""Answers edited by hand: rows as the stage export writes them, changed or deleted by a person, taken back."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import fsspec
import xxhash

from pipelines.errors import DataError, InputError

EDITABLE = ("system", "query", "response", "messages")


def digest_of(path: str) -> str:
    """What identifies the file's content; InputError where there is none."""
    return xxhash.xxh3_128_hexdigest(_read(path))


def read_edits(path: str, known: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The rows of an edited .jsonl file by row_id: the columns that a person may change, as far as they are there.

    DataError for a line that is no row, names none that is `known`, or one a second time.
    """
    names = set(known)
    edits: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(_read(path).decode("utf-8-sig", "replace").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{path}: line {number}"
        try:
            row = json.loads(line)
            row_id = str(row["row_id"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(f"{where}: not a JSON object with row_id ({error}); mend or delete the line") from None
        if row_id not in names:
            raise DataError(f"{where}: no row {row_id} is left by the rules before; delete the line, or export again")
        if row_id in edits:
            raise DataError(f"{where}: row {row_id} stands there twice")
        edits[row_id] = {name: row[name] for name in EDITABLE if name in row}
    return edits


def edited(row: dict[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """A row with a person's changes; what was changed of its last exchange is changed in its `messages` too."""
    changed = {**row, **{name: value for name, value in edits.items() if name in row}}
    if changed.get("messages") and changed["messages"] == row["messages"]:
        *before, asked, said = changed["messages"]
        last = [{**asked, "content": changed["query"]}, {**said, "content": changed["response"]}]
        changed["messages"] = [*before, *last]
    return changed


def _read(path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as stream:
            data: bytes = stream.read()
    except OSError as error:
        raise InputError(f"refine.edited: {path}: {error.strerror or error}") from None
    return data
