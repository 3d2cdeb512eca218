"""JSON is JSON, whichever way it is laid out."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import DataError
from pipelines.sources.cut import plan_shards
from pipelines.sources.files import is_lines, rows_of_file, sample_rows
from pipelines.sources.row_keys import adapter_for, classify

ROWS: list[dict[str, Any]] = [{"query": f"问{n}", "response": "答\n[{}]", "n": {"a": [1, {}]}} for n in range(40)]
ARRAY = json.dumps(ROWS, ensure_ascii=False)
WRAPPED = {"version": "1", "meta": {"a": [1]}, "n": 3}


def read(path: Path, text: str, encoding: str = "utf-8") -> list[dict[str, Any]]:
    path.write_bytes(text.encode(encoding))
    return sample_rows(str(path), 1000)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize(
    "text",
    [
        ARRAY,
        json.dumps(ROWS, indent=2, ensure_ascii=False),
        "\n".join(json.dumps(row) for row in ROWS),
        "\n\n".join(json.dumps(row, indent=1) for row in ROWS),
        json.dumps({"data": ROWS}),
        json.dumps({"data": ROWS}, indent=4),
        json.dumps({"version": "1", "rows": ROWS, "n": 3}, indent=1),
        " \n" + ARRAY.replace("}, {", "}\n,\r\n{"),
    ],
    ids=["array", "indented", "lines", "objects", "wrapped", "wrapped, indented", "wrapped, with more", "spaces"],
)
def test_every_layout_gives_the_same_rows(tmp_path: Path, name: str, encoding: str, text: str) -> None:
    assert read(tmp_path / name, text, encoding) == ROWS


@pytest.mark.parametrize("beside", ["system", "tools", "history", "System", "loss_mask", "images"])
@pytest.mark.parametrize("before", [True, False])
def test_what_would_hold_for_all_rows_is_not_passed_over(tmp_path: Path, beside: str, before: bool) -> None:
    around = {beside: "你是诗人。", "data": ROWS} if before else {"data": ROWS, beside: "你是诗人。"}
    with pytest.raises(DataError, match=f"a.json: .*{beside} stands beside the rows .*write it into each row"):
        read(tmp_path / "a.json", json.dumps(around))


@pytest.mark.parametrize("marks", [{"label": True}, {"label": 0}, {"train": False}, {"label": "x", "train": 0}])
def test_marks_beside_the_rows_are_not_passed_over(tmp_path: Path, marks: dict[str, Any]) -> None:
    for around in ({**marks, "data": ROWS}, {"items": ROWS, **marks}):
        with pytest.raises(DataError, match=r"a\.json: .*(label|train) stands beside the rows"):
            read(tmp_path / "a.json", json.dumps(around))


def test_what_else_stands_beside_the_rows_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"name": "甲", "label": "x", "items": ROWS, "n": 3}), encoding="utf-8")
    unread: dict[str, None] = {}
    assert sample_rows(str(path), 1000, unread) == ROWS
    assert [*unread] == [f"{key} beside the rows of a.json" for key in ("name", "label", "n")]
    shards = plan_shards([str(path)], 1 << 20, None, lambda part: "stored")
    assert [shard["unread"] for shard in shards] == [[*unread]]


def test_lines_may_end_as_on_old_macs_and_have_layouts_of_their_own(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    rows = [{"messages": turns}, {"instruction": "译", "output": "cat"}, {"conversations": turns}]
    lines = [json.dumps(row) for row in rows]
    for text in ("\r".join(lines), "\r".join(lines) + "\r", "\r\n".join(lines), "\n".join(lines)):
        assert read(tmp_path / "a.jsonl", text) == rows
    (tmp_path / "b.jsonl").write_bytes(f"{lines[0]}\r{lines[1]}\n{lines[2]}\n".encode())
    (_, row, reason), (_, other, _) = rows_of_file(str(tmp_path / "b.jsonl"))
    assert row is None and reason.startswith("not valid JSON: Extra data") and other == rows[2]
    names = [adapter_for(classify(row, "auto"), row)[0] for row in rows]
    assert names == ["messages", "alpaca", "sharegpt"]


def test_one_object_is_one_row(tmp_path: Path) -> None:
    row = {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]}
    for indent in (None, 2):
        assert read(tmp_path / "a.json", json.dumps(row, indent=indent)) == [row]
        assert read(tmp_path / "a.jsonl", json.dumps({"conversations": row["messages"]}, indent=indent))


def test_numbers_that_are_none_and_halves_of_characters_are_read_as_in_lines(tmp_path: Path) -> None:
    for text in ('[{"n": NaN, "m": Infinity, "t": "\\ud83d"}]', '{"n": NaN, "m": Infinity, "t": "\\ud83d"}'):
        (row,) = read(tmp_path / "a.json", text)
        assert math.isnan(row["n"]) and row["m"] == math.inf and row["t"] == "\ud83d"


def test_broken_lines_do_not_make_an_array_of_lines(tmp_path: Path) -> None:
    good = '{"query": "问", "response": "答"}'
    for first in ('{"query": "问", "resp', "[1]", "[1, 2]", "null", "", '{"data": 1}'):
        path = tmp_path / "a.jsonl"
        path.write_text(f"{first}\n{good}\n{good}\n", encoding="utf-8")
        assert is_lines(str(path)), first


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}',
        '[{"a": 1},',
        '[{"a": 1} {"a": 2}]',
        '[{"a": 1}] x',
        '{"data": [{"a": 1}',
        '{"data": [{"a": 1}]',
        "[{",
        '[{"a": ' + "9" * 5000 + "}]",
        '{\n"a": ' + "9" * 5000 + "}",
    ],
)
def test_an_array_that_ends_too_early_is_named(tmp_path: Path, text: str) -> None:
    with pytest.raises(DataError, match=r"a\.json: broken after element"):
        read(tmp_path / "a.json", text)


def test_large_values_are_read_across_blocks(tmp_path: Path) -> None:
    rows = [{"query": "长" * 70_000, "response": "文" * n} for n in (1, 200_000, 3)]
    assert read(tmp_path / "a.json", json.dumps(rows, ensure_ascii=False, indent=1)) == rows


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"query": "a", "response": "b", "response": "c"}', "response"),
        ('{"query" : "a", "query": "a", "response": "b"}', "query"),
        ('{"query"\t: "a", "query": "x", "response": "b"}', "query"),
        ('{"k\\\\": 1, "query": "a", "query": "x", "response": "b"}', "query"),
        ('{"query": "\\":", "x": {"y": 1, "y": 2}, "response": "b"}', "y"),
        ('{"messages": [{"role": "user", "content": "a", "content": "b"}]}', "content"),
    ],
)
def test_a_key_that_is_there_twice_is_named(tmp_path: Path, text: str, key: str) -> None:
    good = '{"query": "a\\":b", "response": "\\\\", "x": {"y": 1}}'
    for name, content in (("a.jsonl", f"{text}\n{good}\n"), ("a.json", f"[\n{text},\n{good}]")):
        (tmp_path / name).write_text(content, encoding="utf-8")
        (_, row, reason), (_, other, _) = rows_of_file(str(tmp_path / name))
        assert row is None and reason.startswith(f"key '{key}' is there twice; delete one"), reason
        assert other == json.loads(good)


def test_a_large_value_with_a_key_twice_is_read_to_its_end(tmp_path: Path) -> None:
    text = f'[{{"a": 1, "a": 2, "long": "{"x" * 300_000}"}}, {{"a": 3}}]'
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert [row for _, row, _ in rows_of_file(str(tmp_path / "a.json"))] == [None, {"a": 3}]
