"""Formats of other programs: every turn is there in the words of the reader, or the row is refused by name."""

import json
from collections import Counter
from typing import Any

import pytest

from pipelines.errors import DataError
from pipelines.export.formats import conversation_as
from pipelines.sources.row_keys import adapter_for, classify

CALL = json.dumps([{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}])
PLAIN: dict[str, Any] = {"row_id": "a:1", "system": "S", "query": "问", "response": "答", "messages": None}
TALK: dict[str, Any] = {
    **PLAIN,
    "messages": [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二", "loss": None},
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答"},
    ],
}
MARKED: dict[str, Any] = {
    "row_id": "a:2",
    "messages": [
        {"role": "user", "content": "一"},
        {"role": "assistant", "content": "二", "loss": False},
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "答", "reasoning": "想"},
    ],
}
TOOLS: dict[str, Any] = {
    "row_id": "a:3",
    "tools": '[{"type": "function", "function": {"name": "f"}}]',
    "messages": [
        {"role": "user", "content": "问"},
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "晴"},
        {"role": "assistant", "content": "答"},
    ],
}


def read_back(row: dict[str, Any]) -> dict[str, Any]:
    _, adapter = adapter_for(classify(row, "auto"), row)
    return adapter.read(row, Counter())


@pytest.mark.parametrize("name", ["messages", "alpaca", "sharegpt", "swift", "llamafactory", "xtuner"])
def test_what_is_exported_reads_back_the_same(name: str) -> None:
    for row in (PLAIN, TALK):
        back = read_back(conversation_as(name, row))
        assert [back[column] for column in ("system", "query", "response")] == ["S", "问", "答"]
        assert bool(back.get("messages")) == bool(row["messages"])
        if row["messages"]:
            assert [turn["content"] for turn in back["messages"]] == ["S", "一", "二", "问", "答"]


def test_each_format_has_the_fields_of_its_reader() -> None:
    assert conversation_as("alpaca", TALK) == {
        **{"instruction": "问", "input": "", "output": "答", "system": "S"},
        "history": [("一", "二")],
    }
    assert conversation_as("sharegpt", PLAIN)["conversations"][1:] == [
        {"from": "human", "value": "问"},
        {"from": "gpt", "value": "答"},
    ]
    assert conversation_as("llamafactory", PLAIN) == {
        "conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}],
        "system": "S",
    }
    assert conversation_as("xtuner", TALK)["conversation"] == [
        {"system": "S", "input": "一", "output": "二"},
        {"system": "", "input": "问", "output": "答"},
    ]
    marked = conversation_as("messages", MARKED)["messages"]
    assert marked[1]["weight"] == 0 and marked[3]["reasoning_content"] == "想"


@pytest.mark.parametrize("name", ["messages", "swift", "llamafactory"])
def test_tools_read_back_the_same(name: str) -> None:
    back = read_back(conversation_as(name, TOOLS))
    assert json.loads(back["tools"]) == json.loads(TOOLS["tools"])
    assert [(turn["role"], turn["content"]) for turn in back["messages"]] == [
        *(("user", "问"), ("assistant", ""), ("tool", "晴"), ("assistant", "答")),
    ]
    assert json.loads(back["messages"][1]["tool_calls"]) == json.loads(CALL)


@pytest.mark.parametrize(
    ("name", "row", "what"),
    [
        ("alpaca", MARKED, "loss|reasoning"),
        ("sharegpt", TOOLS, "tool_calls"),
        ("xtuner", MARKED, "reasoning|loss"),
        ("swift", MARKED, "reasoning"),
        ("llamafactory", MARKED, "loss: false"),
        ("messages", {"row_id": "a:4", "query": None, "response": "文"}, "plain text"),
    ],
)
def test_what_a_format_has_no_place_for_is_refused(name: str, row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=rf"row a:\d: .*({what})"):
        conversation_as(name, row)


def test_results_that_only_their_ids_tell_apart_are_refused_where_ids_are_not_written() -> None:
    calls = [{"id": name, "type": "function", "function": {"name": name, "arguments": {}}} for name in "fg"]
    called = {"role": "assistant", "content": "", "tool_calls": json.dumps(calls)}
    results = [{"role": "tool", "content": f"of {name}", "tool_call_id": name} for name in "fg"]
    ends = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
    row = {"row_id": "x", "messages": [ends[0], called, *results, ends[1]]}
    said = [turn["content"] for turn in conversation_as("swift", row)["messages"] if turn["role"] == "tool_response"]
    assert said == ["of f", "of g"]
    with pytest.raises(DataError, match=r"row x: export\.format swift has results in the order of their calls only"):
        conversation_as("swift", {**row, "messages": [ends[0], called, *results[::-1], ends[1]]})


@pytest.mark.parametrize("name", ["messages", "alpaca", "sharegpt", "swift", "llamafactory", "xtuner"])
def test_a_row_without_an_answer_is_refused(name: str) -> None:
    silent = [*TALK["messages"][:-1], {"role": "assistant", "content": ""}]
    for row in ({**PLAIN, "response": ""}, {**PLAIN, "response": None}, {**TALK, "messages": silent}):
        with pytest.raises(DataError, match=rf"row a:1: its response is empty, and export\.format {name} ends with"):
            conversation_as(name, row)
