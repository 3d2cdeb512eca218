"""Manual edits of rows: the file that `clean.edited` or `refine.edited` names, and what it changes in a row.

The file is .jsonl or .csv with a row a line, found by its `row_id`. Where lines say `kept`, as those that clean exports
do, the file lists changes: a row that is kept false goes, and one that is not in the file stays as it is. A file
without `kept`, as the stage export writes it, is all that is left: a row that is not in it goes.
"""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import date, time, timedelta
from decimal import Decimal
from difflib import get_close_matches
from typing import Any

import fsspec
import pyarrow as pa
import xxhash

from pipelines.artifacts.rows import is_text, with_same_messages
from pipelines.errors import DataError, InputError
from pipelines.sources.files import csv_reader, header_of
from pipelines.sources.json_text import value_of
from pipelines.sources.turns import canonical_tools, conversation_of, says_nothing, turn_of

Line = dict[str, Any]
_OF_LINES = ("row_id", "pos", "kept", "operator", "reason")
"""Columns of exported lines that are about the row."""
_NEVER_EMPTY = ("query", "response", "messages")


def digest_of(key: str, path: str) -> str:
    """What identifies the file's content; InputError where there is none."""
    return xxhash.xxh3_128_hexdigest(_read(key, path))


def read_edited(key: str, path: str, *, needs_kept: bool) -> dict[str, Line]:
    """The lines of the file that the recipe names under `key`, by row id; `kept` is a bool in all of them or in none.

    InputError where there is no file; DataError naming the line that cannot be used.
    """
    lines = list(_lines(key, path))
    has_kept = needs_kept or any(isinstance(line, dict) and "kept" in line for _, line in lines)
    found: dict[str, Line] = {}
    for number, line in lines:
        where = f"{key} {path}:{number}"
        row_id = _row_id(where, line)
        if row_id in found:
            raise DataError(f"{where}: row {row_id} is there twice, so it cannot be told which of two rows is meant")
        found[row_id] = {**line, "kept": _flag(where, line.get("kept"))} if has_kept else line
    return found


def require_known_columns(
    key: str, edits: Mapping[str, Line], columns: Iterable[str], statistics: Iterable[str] | None
) -> None:
    """DataError for a line that says something in a column which rows do not have, and which would change nothing.

    `statistics`: the columns of what was measured; None where they are not known, and any number is taken for one.
    """
    known = {*_OF_LINES, *columns, *(statistics or ())}
    for row_id, line in edits.items():
        for name, value in line.items():
            if name in known or says_nothing(value) or (statistics is None and _is_number(value)):
                continue
            close = get_close_matches(name, known, n=1)
            hint = f"; is it {close[0]}" if close else ""
            raise DataError(f"{key}: row {row_id}: rows have no column {name}{hint}? Correct it, or delete the column")


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _lines(key: str, path: str) -> Iterator[tuple[int, Any]]:
    """The lines that hold something, with their numbers; in place of one that cannot be parsed its error."""
    data = _read(key, path)
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{key} {path}:{number}: not UTF-8; save it as UTF-8, which Excel calls CSV UTF-8") from None
    if path.endswith(".csv"):
        yield from _records(f"{key} {path}", text)
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield number, parsed(line)


def _records(where: str, text: str) -> Iterator[tuple[int, Line]]:
    reader = csv_reader(io.StringIO(text, newline=""))
    header = header_of(where, reader)
    for number, record in enumerate(reader, start=2):
        if isinstance(record, csv.Error):
            raise DataError(f"{where}:{number}: its quotation marks cannot be told apart ({record}); save it again")
        if len(record) > len(header):
            raise DataError(f"{where}:{number}: more fields than the header: {record!r:.200}")
        if record and len(record) < len(header):
            raise DataError(f"{where}:{number}: fewer fields than the header, so that columns shift: {record!r:.200}")
        if record:
            yield number, dict(zip(header, record, strict=True))


def parsed(text: str) -> Any:
    """The value of a JSON text, or the ValueError that says why it has none."""
    try:
        return value_of(text)
    except ValueError as error:
        return error


def _row_id(where: str, line: Any) -> str:
    if not isinstance(line, dict):
        raise DataError(f"{where}: {line if isinstance(line, ValueError) else 'not a JSON object'}")
    if not is_text(line):
        raise DataError(f"{where}: holds half a character (a lone surrogate such as \\ud83d); delete it")
    if line.get("row_id") in (None, ""):
        raise DataError(f"{where}: no row_id, by which a row is found")
    return str(line["row_id"])


def _flag(where: str, value: Any) -> bool:
    flags = {"true": True, "false": False, "1": True, "0": False}
    flag = flags.get(str(value).strip().lower())
    if flag is None:
        raise DataError(f"{where}: kept is {value!r}, not true or false")
    return flag


def with_edits(
    key: str, row: dict[str, Any], line: Mapping[str, Any], schema: pa.Schema, names: Iterable[str]
) -> dict[str, Any]:
    """A row with what its line says otherwise of the columns `names`, in its `messages` too; itself where nothing.

    DataError for a value that its column cannot hold.
    """
    said = {
        name: value
        for name in names
        if name in line
        and _differs(line[name], row[name])
        and (value := _value(key, line[name], schema.field(name), row["row_id"])) != row[name]
    }
    return with_same_messages({**row, **said}, row) if said else row


def _differs(given: Any, value: Any) -> bool:
    is_cell = isinstance(given, str) and not isinstance(value, bytes)
    return bool(given != value) and not (is_cell and given == cell_of(value))


def cell_of(value: Any) -> str:
    """A value in a CSV file; TypeError for bytes, which it cannot hold."""
    if value is None or isinstance(value, str):
        return value or ""
    if isinstance(value, date | time | timedelta | Decimal):
        return str(value)
    return json.dumps(value, ensure_ascii=False, default=_beyond_json)


def _beyond_json(value: Any) -> str:
    if isinstance(value, bytes):
        raise TypeError("bytes")
    return str(value)


def _value(key: str, given: Any, field: pa.Field, row_id: str) -> Any:
    """What the file gives for one column of a row, as the column's type."""
    value = given
    is_told_as_text = pa.types.is_temporal(field.type) or pa.types.is_decimal(field.type)
    if is_told_as_text and isinstance(value, str):
        try:
            return pa.array([value or None], pa.string()).cast(field.type)[0].as_py()
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise DataError(f"{key}: row {row_id}: {field.name} cannot be {given!r} ({error})") from None
    if isinstance(value, str) and not pa.types.is_string(field.type) and not pa.types.is_large_string(field.type):
        value = _of_cell(value, field.type) if value else None
    if field.name in _NEVER_EMPTY and says_nothing(value):
        raise DataError(f"{key}: row {row_id}: {field.name} cannot be emptied; to drop the row say kept: false")
    try:
        if field.name == "messages" and isinstance(value, list):
            value = _turns(value, {inner.name for inner in field.type.value_type})
        elif field.name == "tools" and pa.types.is_string(field.type):
            value = canonical_tools(value)
        else:
            _require_fields(value, field.type)
    except ValueError as error:
        raise DataError(f"{key}: row {row_id}: {field.name}: {error}") from None
    try:
        if isinstance(value, float) and pa.types.is_integer(field.type) and not value.is_integer():
            raise OverflowError("it is no whole number")  # Arrow would cut it off
        return pa.array([value], type=field.type)[0].as_py()
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise DataError(f"{key}: row {row_id}: {field.name} cannot be {given!r} ({error})") from None


def _of_cell(text: str, kind: pa.DataType) -> Any:
    """A spreadsheet's text as a value: it writes TRUE and FALSE."""
    return parsed(text.lower() if pa.types.is_boolean(kind) else text)


def _require_fields(value: Any, kind: pa.DataType) -> None:
    """ValueError for a structure with a field that the column has not, which Arrow would pass over."""
    if pa.types.is_struct(kind) and isinstance(value, Mapping):
        for name, inner in value.items():
            if kind.get_field_index(name) < 0:
                raise ValueError(f"there is no field {name}; delete it")
            _require_fields(inner, kind.field(name).type)
    elif pa.types.is_list(kind) and isinstance(value, list):
        for entry in value:
            _require_fields(entry, kind.value_type)


def _turns(turns: list[Any], fields: set[str]) -> list[dict[str, Any]]:
    """Edited turns, with tool calls as rows have them; ValueError where a part would be lost or they are no
    conversation."""
    read = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, Mapping):
            raise ValueError(f"turn {number} is not an object")
        if unknown := next((name for name in turn if name not in fields), None):
            raise ValueError(f"a turn has no {unknown}; delete it")
        if not isinstance(turn.get("content"), str):
            raise ValueError(f"turn {number} has no text")
        read.append(turn_of(turn, number))
        if read[-1]["role"] != turn["role"]:
            raise ValueError(f"turn {number} has role {turn['role']}, which here is {read[-1]['role']}")
    _, joined = conversation_of(read, None)
    if joined:
        raise ValueError("two turns in a row are one speaker's; make one of them")
    calls = [{"tool_calls": turn["tool_calls"]} if "tool_calls" in turn else {} for turn in read]
    return [{**turn, **called} for turn, called in zip(turns, calls, strict=True)]


def _read(key: str, path: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as stream:
            data: bytes = stream.read()
    except OSError as error:
        raise InputError(f"{key}: {path}: {error.strerror or error}") from None
    return data
