"""What turns say: read whole, or the row is refused by the name of what is not read."""

import json
from collections import Counter
from typing import Any

import pytest

from pipelines.sources.adapters import ADAPTERS, replaced
from pipelines.sources.row_keys import adapter_for, classify

Row = dict[str, Any]


def read(row: Row, adapter: str = "auto") -> tuple[str, Row, Counter[str]]:
    counts = Counter[str]()
    name, found = adapter_for(classify(row, adapter), row)
    return name, found.read(row, counts), counts


def said(row: Row) -> list[Any]:
    """Role and text of each turn, and the rest of it where there is any."""
    turns = read(row)[1]["messages"]
    rest = [{k: v for k, v in turn.items() if k not in ("role", "content")} for turn in turns]
    return [
        (turn["role"], turn["content"], more) if more else (turn["role"], turn["content"])
        for turn, more in zip(turns, rest, strict=True)
    ]


def chat(*turns: Row, **columns: Any) -> Row:
    return {"messages": list(turns), **columns}


USER = {"role": "user", "content": "问"}
SAID = {"role": "assistant", "content": "答"}
FOUR = [("user", "我叫小林"), ("assistant", "你好小林"), ("user", "我叫什么"), ("assistant", "你叫小林")]


@pytest.mark.parametrize(
    "history",
    [
        [["我叫小林", "你好小林"]],
        '[["我叫小林", "你好小林"]]',
        [{"role": "user", "content": "我叫小林"}, {"role": "assistant", "content": "你好小林"}],
    ],
)
@pytest.mark.parametrize(
    "names", [("instruction", "output"), ("query", "response"), ("question", "answer"), ("prompt", "completion")]
)
def test_history_comes_before_the_question(history: Any, names: tuple[str, str]) -> None:
    assert said({names[0]: "我叫什么", names[1]: "你叫小林", "history": history}) == FOUR


@pytest.mark.parametrize("nothing", [None, [], "", "[]", float("nan")])
def test_an_empty_history_is_none(nothing: Any) -> None:
    assert "messages" not in read({"query": "问", "response": "答", "history": nothing})[1]


def test_messages_are_read_where_a_pair_stands_beside_them() -> None:
    turns = [{"role": role, "content": text} for role, text in FOUR]
    row = {"row_id": "a:1", "system": None, "query": "我叫什么", "response": "你叫小林", "messages": turns}
    for adapter in ("auto", "messages", "query_response"):
        assert read(row, adapter)[1]["messages"] == turns
    assert read({**row, "messages": None})[0] == "query_response"
    with pytest.raises(ValueError, match="response is not what the messages end with"):
        read({**row, "response": "改过"})


@pytest.mark.parametrize(
    ("mark", "loss"),
    [
        ({"loss": False}, False),
        ({"weight": 0}, False),
        ({"weight": 0.0}, False),
        ({"train": False}, False),
        ({"training": True}, True),
        ({"loss": True, "weight": 1}, True),
        ({"loss": "FALSE"}, False),
        ({"weight": "0.0"}, False),
        ({"train": "1"}, True),
    ],
)
def test_marks_of_loss_are_kept(mark: Row, loss: bool) -> None:
    assert said(chat(USER, {**SAID, **mark}, USER, SAID))[1] == ("assistant", "答", {"loss": loss})


def test_a_row_without_loss_has_none_in_its_answers() -> None:
    for column in ({"loss": False}, {"weight": 0}, {"train": "False"}):
        assert said(chat(USER, SAID, **column)) == [("user", "问"), ("assistant", "答", {"loss": False})]
        assert said({"query": "问", "response": "答", **column})[1] == ("assistant", "答", {"loss": False})
    assert "messages" not in read({"query": "问", "response": "答", "weight": 1})[1]
    assert said(chat(USER, {**SAID, "loss": True}, USER, SAID, loss=False))[1][2] == {"loss": True}


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content", "thinking"])
def test_reasoning_is_its_own_field(name: str) -> None:
    wanted = [("user", "问"), ("assistant", "答", {"reasoning": "想"})]
    assert said(chat(USER, {**SAID, name: "想"})) == wanted
    assert said({"query": "问", "response": "答", name: "想"}) == wanted
    parts = [{"type": "thinking", "thinking": "想"}, {"type": "text", "text": "答"}]
    assert said(chat(USER, {"role": "assistant", "content": parts})) == wanted


def test_parts_of_text_are_joined_as_they_are() -> None:
    parts = [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]
    _, row, _ = read(chat({"role": "user", "content": parts}, SAID))
    assert (row["query"], row["response"]) == ("你好", "答")


@pytest.mark.parametrize("adapter", ["auto", "prompt_completion"])
def test_columns_beside_turns_are_read_or_refused(adapter: str) -> None:
    row = {"prompt": [{"role": "user", "content": "我叫什么"}], "completion": [{"role": "assistant", "content": "林"}]}
    _, found, _ = read({**row, "history": [["我叫小林", "你好"]]}, adapter)
    assert [turn["content"] for turn in found["messages"]] == ["我叫小林", "你好", "我叫什么", "林"]
    with pytest.raises(ValueError, match="column thinking stands beside turns; write it into them"):
        read({**row, "thinking": "想"}, adapter)


@pytest.mark.parametrize("column", ["history", "reasoning_content"])
def test_columns_beside_messages_are_refused_by_the_adapter_of_pairs_too(column: str) -> None:
    for adapter in ("auto", "query_response"):
        with pytest.raises(ValueError, match=f"column {column}"):
            read({"query": "问", "response": "答", **chat(USER, SAID), column: [["a", "b"]]}, adapter)


@pytest.mark.parametrize("nothing", ["", None, [], float("nan")])
def test_a_row_without_turns_is_read_by_its_other_columns(nothing: Any) -> None:
    assert read({"messages": nothing, "query": "问", "response": "答"})[0] == "query_response"
    assert read({"conversations": nothing, "instruction": "问", "output": "答"})[0] == "alpaca"


def test_turns_of_moss_are_in_order_of_their_numbers() -> None:
    turns = {f"turn_{n}": {"Human": f"问{n}", "MOSS": f"答{n}"} for n in sorted(range(1, 13), key=str)}
    texts = [turn["content"] for turn in read({"chat": turns})[1]["messages"]]
    assert texts == [text for n in range(1, 13) for text in (f"问{n}", f"答{n}")]
    with pytest.raises(ValueError, match="chat: turn_x is not turn_1"):
        read({"chat": {"turn_x": turns["turn_1"]}})


CALL = {"name": "天气", "arguments": {"城市": "北京"}}
TOOLS = [{"type": "function", "function": {"name": "天气", "parameters": {}}}]
CALLED = json.dumps([{"type": "function", "function": CALL}], ensure_ascii=False)


@pytest.mark.parametrize(
    "turns",
    [
        [
            {"role": "user", "content": "北京天气"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": CALL}]},
            {"role": "tool", "name": "天气", "content": "晴"},
            {"role": "assistant", "content": "晴天"},
        ],
        [
            {"role": "user", "content": "北京天气"},
            {"role": "assistant", "content": "", "function_call": {**CALL, "arguments": json.dumps(CALL["arguments"])}},
            {"role": "function", "content": "晴"},
            {"role": "assistant", "content": "晴天"},
        ],
        [
            {"from": "human", "value": "北京天气"},
            {"from": "function_call", "value": json.dumps(CALL)},
            {"from": "observation", "value": "晴"},
            {"from": "gpt", "value": "晴天"},
        ],
        [
            {"role": "user", "content": "北京天气"},
            {"role": "tool_call", "content": json.dumps(CALL)},
            {"role": "tool_response", "content": "晴"},
            {"role": "assistant", "content": "晴天"},
        ],
    ],
)
def test_tools_are_read_however_they_are_called(turns: list[Row]) -> None:
    for tools in (TOOLS, json.dumps(TOOLS)):
        row = {"messages": turns, "tools": tools}
        assert said(row) == [
            ("user", "北京天气"),
            ("assistant", "", {"tool_calls": CALLED}),
            ("tool", "晴"),
            ("assistant", "晴天"),
        ]
        assert json.loads(read(row)[1]["tools"]) == TOOLS


def test_two_turns_of_one_speaker_are_joined_and_counted() -> None:
    _, row, counts = read(chat(USER, {"role": "user", "content": "再问"}, SAID, {"role": "assistant", "content": "完"}))
    assert (row["query"], row["response"]) == ("问\n再问", "答\n完")
    assert counts.total() == 2


def test_a_dialogue_may_be_opened_by_the_assistant() -> None:
    assert [turn[0] for turn in said(chat(SAID, USER, SAID))] == ["assistant", "user", "assistant"]


@pytest.mark.parametrize(
    ("turn", "why"),
    [
        ({**SAID, "loss_scale": 0.5}, "loss_scale, which is not read"),
        ({**SAID, "weight": 0.5}, "weight 0.5"),
        ({**SAID, "loss": "no"}, "loss 'no'"),
        ({**SAID, "loss": False, "weight": 1}, "contradict"),
        ({**SAID, "name": "小王"}, "name '小王'"),
        (
            {"role": "system", "content": "S", "reasoning": "想"},
            "reasoning, which is not read in a turn of role system",
        ),
        ({**USER, "tool_calls": [{"name": "f"}]}, "tool_calls, which is not read in a turn of role user"),
        ({**SAID, "tool_call_id": "1"}, "tool_call_id, which is not read in a turn of role assistant"),
        ({"role": "tool", "name": ["f"], "content": "晴"}, r"name \['f'\], which is not read"),
        ({"role": "tool_call", "content": "{}", "tool_calls": [{"name": "f"}]}, "tool_calls, which is not read"),
        ({**SAID, "tool_calls": [{"name": "f", "args": {"a": 1}}]}, "a tool call has args"),
        ({**SAID, "tool_calls": [{"function": {"name": "f", "result": "晴"}}]}, "a tool call has result"),
        ({**SAID, "tool_calls": [{"name": "f", "arguments": {"a": 1}, "parameters": {"b": 2}}]}, "which differ"),
        ({**SAID, "tool_calls": [{"name": "f", "arguments": {"a": b"x"}}]}, "what JSON has not"),
        ({**SAID, "audio": {"id": "a"}}, "audio, which is not read"),
        ({**SAID, "value": "别的"}, "which differ"),
        ({"role": "assistant", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "not text"),
        ({"role": "assistant", "content": [{"type": "text", "text": "答", "cache": True}]}, "cache, which is not read"),
        ({"role": "assistant", "content": 5}, "is int, not text"),
        ({"role": ["assistant"], "content": "答"}, "unknown role"),
        ({"role": "assistant", "content": "", "tool_calls": "no"}, "are not JSON"),
        ({"role": "assistant", "tool_calls": [{"function": {}}]}, "no function's name"),
        ({"role": "assistant"}, "no text"),
    ],
)
def test_what_is_not_read_in_a_turn_refuses_the_row(turn: Row, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        read(chat(USER, turn))


@pytest.mark.parametrize("mark", ["loss", "weight", "train"])
def test_a_system_prompt_that_is_to_be_trained_refuses_the_row(mark: str) -> None:
    with pytest.raises(ValueError, match="a turn of the system is marked to be trained"):
        read(chat({"role": "system", "content": "S", mark: True}, USER, SAID))
    assert read(chat({"role": "system", "content": "S", mark: False}, USER, SAID))[1]["system"] == "S"


@pytest.mark.parametrize("nothing", [None, "", [], {}])
def test_keys_that_say_nothing_refuse_nothing(nothing: Any) -> None:
    assert (
        read(chat(USER, {**SAID, "refusal": nothing, "annotations": nothing, "name": nothing}))[1]["response"] == "答"
    )


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("label", True, "preference tuning"),
        ("label", "False", "preference tuning"),
        ("kto_tag", True, "preference tuning"),
        ("rejected_response", "坏", "preference tuning"),
        ("rejectedResponse", "坏", "preference tuning"),
        ("non_preferred_output", [SAID], "preference tuning"),
        ("images", ["a.jpg"], "only text is trained"),
        ("audios", ["a.wav"], "only text is trained"),
        ("history", [["a", "b"]], "does not read it"),
        ("functions", [{"name": "f"}], "does not read it"),
        ("systemPrompt", "S", "does not read it"),
        ("query_role", "tool", "does not read it"),
        ("tool_calls", [{"name": "f"}], "does not read it"),
        ("context", "一段文字", "does not read it"),
        ("input", "补充", "does not read it"),
        ("pos", 3, "order of the rows"),
    ],
)
def test_columns_with_a_meaning_refuse_the_row(column: str, value: Any, why: str) -> None:
    with pytest.raises(ValueError, match=rf"column {column}.*{why}"):
        read(chat(USER, SAID, **{column: value}))
    assert read(chat(USER, SAID, **{column: None}))[1]["response"] == "答"


@pytest.mark.parametrize(
    "row", [{"prompt": "问", "chosen": "好", "rejected": "坏"}, {"chosen": "好", "rejected": "坏"}]
)
def test_preferences_are_refused_by_name(row: Row) -> None:
    with pytest.raises(ValueError, match=r"column chosen: .*preference tuning"):
        read(row)


@pytest.mark.parametrize(
    ("row", "query", "response"),
    [
        ({"prompt": "问", "completion": "答"}, "问", "答"),
        ({"prompt": [USER], "completion": [SAID]}, "问", "答"),
        ({"question": "问", "answer": "答"}, "问", "答"),
        ({"system_prompt": "S", "question": "问", "response": "答"}, "问", "答"),
        ({"instruction": "", "input": "问", "output": "答"}, "问", "答"),
        ({"instruction": "问", "context": "文", "response": "答"}, "问\n文", "答"),
        ({"instruction": "问", "input": "文", "response": "答"}, "问\n文", "答"),
        ({"conversation": [USER, SAID]}, "问", "答"),
        ({"conversations": [USER, SAID]}, "问", "答"),
        ({"conversations": [{"question": "问", "answer": "答"}]}, "问", "答"),
        ({"conversation": [{"human": "问", "assistant": "答"}]}, "问", "答"),
        ({"conversations": json.dumps([USER, SAID])}, "问", "答"),
        ({"chat": {"turn_1": {"Human": "<|Human|>: 问<eoh>\n", "MOSS": "<|MOSS|>: 答<eom>\n"}}}, "问", "答"),
        ({"text": "一段"}, None, "一段"),
    ],
)
def test_further_schemas(row: Row, query: str | None, response: str) -> None:
    _, found, _ = read(row)
    assert (found["query"], found["response"]) == (query, response)
    assert found.get("system") == row.get("system_prompt")


@pytest.mark.parametrize("names", [("question", "answer"), ("query", "response"), ("prompt", "completion")])
def test_what_a_question_is_asked_about_is_not_passed_over(names: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="column context: it changes what the row says"):
        read({"context": "一段文字", names[0]: "问", names[1]: "答"})
    assert read({"context": "", names[0]: "问", names[1]: "答"})[1]["query"] == "问"


def test_trl_s_prompt_is_context_and_its_completion_trained() -> None:
    row = {"prompt": [USER, SAID, USER, {**SAID, "loss": True}, USER], "completion": [SAID]}
    assert [turn.get("loss") for turn in read(row)[1]["messages"]] == [None, False, None, True, None, None]


def test_texts_are_replaced_in_tools_and_their_calls_too() -> None:
    call = {"role": "tool_call", "content": '{"name": "f", "arguments": {"to": ["{{N}}"], "days": 2}}'}
    tools = [{"name": "f", "description": "as {{N}} asks"}]
    row = chat(USER, call, {"role": "tool", "content": "{{N}}"}, SAID, tools=tools)
    found = replaced(read(row)[1], {"{{N}}": '"爱莉"'})
    (called,) = json.loads(found["messages"][1]["tool_calls"])
    assert called["function"]["arguments"] == {"to": ['"爱莉"'], "days": 2}
    assert json.loads(found["tools"]) == [{"name": "f", "description": 'as "爱莉" asks'}]
    assert found["messages"][2]["content"] == '"爱莉"'


def test_moss_s_instruction_is_the_system_prompt() -> None:
    chat_of_moss = {"turn_1": {"Human": "<|Human|>: 问<eoh>", "MOSS": "<|MOSS|>: 答<eom>"}}
    assert read({"meta_instruction": "你是 MOSS。", "chat": chat_of_moss})[1]["system"] == "你是 MOSS。"
    with pytest.raises(ValueError, match="columns system and meta_instruction differ"):
        read({"meta_instruction": "你是 MOSS。", "system": "S", "chat": chat_of_moss})


def test_every_adapter_says_what_it_needs() -> None:
    for name, adapter in ADAPTERS.items():
        with pytest.raises(ValueError, match=r"missing|not a list|not \{turn"):
            adapter.read(dict.fromkeys(adapter.needs, None), Counter())
        assert adapter.needs <= adapter.uses, name
