"""The edited file: what is read of it, and what is said of one that cannot be used."""

from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.artifacts.rows import MESSAGES
from pipelines.errors import DataError, InputError
from pipelines.sources.manual_edits import cell_of, read_edited, require_known_columns, with_edits

POINT = pa.struct({"x": pa.int64()})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"row_id": "r0"}', "rows.jsonl:1: kept is None, not true or false"),
        ('{"kept": true}', "rows.jsonl:1: no row_id"),
        ('{"row_id": "r0", "kept": true}\n\n{"row_id": "r0", "kept": false}', "rows.jsonl:3: row r0 is there twice"),
        ('{"row_id": "r0", "kept": tr', "rows.jsonl:1: Expecting value"),
        ('{"row_id": "r0", "kept": true, "kept": false}', "rows.jsonl:1: key 'kept' is there twice"),
        ("[1]", "rows.jsonl:1: not a JSON object"),
        ('{"row_id": "r0", "kept": true, "response": "\\ud83d"}', "rows.jsonl:1: holds half a character"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_edited("clean.edited", str(path), needs_kept=True)


def test_a_file_lists_changes_or_what_is_left(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"row_id": "a", "response": "甲\u2028乙"}\n{"row_id": 7}\n', encoding="utf-8")
    assert read_edited("refine.edited", str(path), needs_kept=False) == {
        "a": {"row_id": "a", "response": "甲\u2028乙"},
        "7": {"row_id": 7},
    }
    path.write_text('{"row_id": "a", "kept": false}\n{"row_id": "b"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"refine\.edited .*rows\.jsonl:2: kept is None"):
        read_edited("refine.edited", str(path), needs_kept=False)
    with pytest.raises(InputError, match=r"refine.edited: .*none.jsonl"):
        read_edited("refine.edited", str(tmp_path / "none.jsonl"), needs_kept=False)


def test_a_table_as_spreadsheets_save_it(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    text = f"row_id,kept,response\na,TRUE,{'长' * 140_000}\nb,0,第二行\n"
    path.write_text(text, encoding="utf-8-sig")
    lines = read_edited("clean.edited", str(path), needs_kept=True)
    assert [line["kept"] for line in lines.values()] == [True, False]
    assert len(lines["a"]["response"]) == 140_000
    path.write_bytes(b"row_id,kept,response\na,TRUE,ok\n" + "b,TRUE,中文".encode("gb18030"))
    with pytest.raises(DataError, match=r"clean\.edited .*rows\.csv:3: not UTF-8; save it as UTF-8"):
        read_edited("clean.edited", str(path), needs_kept=True)
    path.write_text("row_id,kept\na,true,更多\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.csv:2: more fields than the header"):
        read_edited("clean.edited", str(path), needs_kept=True)
    path.write_text("row_id,kept,query,response\na,true,答\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.csv:2: fewer fields than the header, so that columns shift"):
        read_edited("clean.edited", str(path), needs_kept=True)


TURNS = [{"role": role, "content": text} for role, text in zip(["user", "assistant"] * 2, "甲乙问答", strict=True)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"n": 2.7}, "n cannot be 2.7"),
        ({"n": "2.7"}, "n cannot be '2.7'"),
        ({"n": 2**70}, "n cannot be 1180591620717411303424"),
        ({"response": None}, "response cannot be emptied; to drop the row say kept: false"),
        ({"query": ""}, "query cannot be emptied"),
        ({"messages": []}, "messages cannot be emptied"),
        ({"messages": ""}, "messages cannot be emptied"),
        ({"messages": [*TURNS[:3], {"role": "assistant"}]}, "messages: turn 4 has no text"),
        ({"messages": [*TURNS[:3], {"role": "assistant", "content": None}]}, "messages: turn 4 has no text"),
        ({"messages": [*TURNS[:2], {"role": "system", "content": "S"}, *TURNS[2:]]}, "messages: turns must alternate"),
        ({"messages": [*TURNS[:1], *TURNS]}, "messages: two turns in a row are one speaker's"),
        ({"messages": [{"role": "human", "content": "甲"}, TURNS[1]]}, "messages: turn 1 has role human"),
        ({"messages": [*TURNS[:3], {**TURNS[3], "weight": 0}]}, "messages: a turn has no weight; delete it"),
        (
            {"query": "改问", "messages": [*TURNS[:3], {"role": "assistant", "content": "新"}]},
            "query and messages are both",
        ),
    ],
)
def test_an_edit_is_made_whole_or_refused(line: dict[str, Any], said: str) -> None:
    schema = pa.schema({"query": pa.string(), "response": pa.string(), "messages": MESSAGES, "n": pa.int64()})
    row = {"row_id": "a", "system": None, "query": "问", "response": "答", "messages": TURNS, "n": 5}
    with pytest.raises(DataError, match=f"row a: {said}"):
        with_edits("clean.edited", row, line, schema, schema.names)
    both = {"response": "新", "messages": [*TURNS[:3], {"role": "assistant", "content": "新"}], "n": "2.0"}
    changed = with_edits("clean.edited", row, both, schema, schema.names)
    assert (changed["query"], changed["response"], changed["n"]) == ("问", "新", 2)


CALL = '[{"type": "function", "function": {"name": "f", "arguments": {}}}]'
CALLED = [
    TURNS[0],
    {"role": "assistant", "content": "", "tool_calls": CALL},
    {"role": "tool", "content": "r"},
    TURNS[1],
]


def test_tools_and_their_calls_are_kept_as_rows_have_them() -> None:
    schema = pa.schema({"query": pa.string(), "response": pa.string(), "messages": MESSAGES, "tools": pa.string()})
    row = {
        "row_id": "a",
        "system": None,
        "query": "甲",
        "response": "乙",
        "messages": CALLED,
        "tools": '[{"name": "f"}]',
    }
    call = {**CALLED[1], "tool_calls": '{"name": "f", "arguments": "{}"}'}
    changed = with_edits("clean.edited", row, {"messages": [CALLED[0], call, *CALLED[2:]]}, schema, schema.names)
    assert changed["messages"][1]["tool_calls"] == CALL
    assert (
        with_edits("clean.edited", row, {"tools": '[{"name":"g"}]'}, schema, schema.names)["tools"] == '[{"name": "g"}]'
    )
    for tools in ("{", '{"name": "f"}', "钳子"):
        with pytest.raises(DataError, match="row a: tools: tools "):
            with_edits("clean.edited", row, {"tools": tools}, schema, schema.names)


def test_values_that_json_has_not_are_edited_as_text() -> None:
    schema = pa.schema({"day": pa.date32(), "at": pa.timestamp("us"), "price": pa.decimal128(5, 2), "s": POINT})
    row = {
        "row_id": "a",
        "day": date(2024, 1, 1),
        "at": datetime(2024, 1, 1, 8),
        "price": Decimal("1.50"),
        "s": {"x": 1},
    }
    as_it_was = {name: cell_of(value) for name, value in row.items()}
    assert as_it_was["at"] == "2024-01-01 08:00:00" and as_it_was["price"] == "1.50"
    assert with_edits("clean.edited", row, as_it_was, schema, schema.names) is row
    given = {"day": "2024-02-01", "at": "2024-02-01 09:00:00", "price": "2.25", "s": '{"x": 2}'}
    changed = with_edits("clean.edited", row, given, schema, schema.names)
    assert {name: cell_of(value) for name, value in changed.items()} == {"row_id": "a", **given}
    for line, said in (
        ({"day": "morgen"}, "day cannot be 'morgen'"),
        ({"price": "1.555"}, "price cannot be"),
        ({"s": {"x": 1, "y": 2}}, "s: there is no field y"),
    ):
        with pytest.raises(DataError, match=f"row a: {said}"):
            with_edits("clean.edited", row, line, schema, schema.names)


def test_a_column_that_rows_do_not_have_is_named() -> None:
    columns = ("row_id", "pos", "response", "upvotes")
    for line, said in (
        ({"respones": "新"}, "row a: rows have no column respones; is it response"),
        ({"Response": "新"}, "rows have no column Response; is it response"),
        ({"note": "看过"}, "rows have no column note"),
        ({"upvots": 3}, "rows have no column upvots; is it upvotes"),
    ):
        with pytest.raises(DataError, match=said):
            require_known_columns("clean.edited", {"a": {"row_id": "a", **line}}, columns, ["text_len"])
    fine = {"row_id": "a", "kept": True, "operator": "x", "reason": "y", "text_len": "3", "unnamed": ""}
    require_known_columns("clean.edited", {"a": fine}, columns, ["text_len"])
    require_known_columns("refine.edited", {"a": fine}, columns, None)
    with pytest.raises(DataError, match="no column respones"):
        require_known_columns("refine.edited", {"a": {"respones": "新"}}, columns, None)
