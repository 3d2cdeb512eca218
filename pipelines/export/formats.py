"""Rows as other programs read them: each format by the fields that its reader knows, and no others.

A row that a format has no place for is refused by its name, since a part of it would be trained as the whole.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipelines.artifacts.rows import Turn, turns_said
from pipelines.errors import DataError

Row = Mapping[str, Any]


def conversation_as(name: str, row: Row) -> dict[str, Any]:
    """A canonical row in the format of that name; see the recipe's key `export.format`."""
    turns = turns_said(row)
    if not any(turn["role"] == "user" for turn in turns):
        raise DataError(
            f"row {row['row_id']}: it has no question, and export.format {name} has no place for plain text"
        )
    if turns[-1]["role"] != "assistant" or not (turns[-1]["content"] or "tool_calls" in turns[-1]):
        raise DataError(f"row {row['row_id']}: its response is empty, and export.format {name} ends with an answer")
    return _FORMATS[name](row, turns)


def _messages(row: Row, turns: Sequence[Turn]) -> dict[str, Any]:
    """OpenAI's: `weight` 0 marks an answer without loss, `reasoning_content` holds what was thought."""
    said = []
    for turn in turns:
        openai = {"role": turn["role"], "content": turn["content"]}
        if "reasoning" in turn:
            openai["reasoning_content"] = turn["reasoning"]
        if "tool_calls" in turn:
            calls = json.loads(turn["tool_calls"])
            openai["tool_calls"] = [{**call, "function": _with_text_arguments(call["function"])} for call in calls]
        if "tool_call_id" in turn:
            openai["tool_call_id"] = turn["tool_call_id"]
        if "loss" in turn and turn["role"] == "assistant":
            openai["weight"] = int(turn["loss"])
        said.append(openai)
    return {"messages": said, **({"tools": json.loads(row["tools"])} if row.get("tools") else {})}


def _with_text_arguments(function: dict[str, Any]) -> dict[str, Any]:
    return {**function, "arguments": json.dumps(function["arguments"], ensure_ascii=False)}


def _alpaca(row: Row, turns: Sequence[Turn]) -> dict[str, Any]:
    """Alpaca with `history` and `system`, as ms-swift and LLaMA-Factory read them."""
    _require_plain(row, turns, "alpaca")
    system, pairs = _pairs(row, turns, "alpaca")
    *history, (query, response) = pairs
    said = {"instruction": query, "input": "", "output": response}
    return {**said, **({"system": system} if system else {}), **({"history": history} if history else {})}


def _sharegpt(row: Row, turns: Sequence[Turn]) -> dict[str, Any]:
    _require_plain(row, turns, "sharegpt")
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    return {"conversations": [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]}


def _swift(row: Row, turns: Sequence[Turn]) -> dict[str, Any]:
    """ms-swift: messages with `loss`, and tool calls as turns of their own."""
    said: list[Turn] = []
    waiting: list[str] = []
    for turn in turns:
        _require_no_reasoning(row, turn, "swift")
        if "tool_calls" in turn:
            waiting = [str(call.get("id", "")) for call in json.loads(turn["tool_calls"])]
        if turn["role"] == "tool" and (own := turn.get("tool_call_id")) in waiting and own != waiting.pop(0):
            raise DataError(f"row {row['row_id']}: export.format swift has results in the order of their calls only")
        mark = {"loss": turn["loss"]} if "loss" in turn and turn["role"] == "assistant" else {}
        if turn["content"] or "tool_calls" not in turn:
            role = "tool_response" if turn["role"] == "tool" else turn["role"]
            said.append({"role": role, "content": turn["content"], **mark})
        said += [{"role": "tool_call", "content": call, **mark} for call in _calls(turn)]
    return {"messages": said, **({"tools": row["tools"]} if row.get("tools") else {})}


def _llamafactory(row: Row, turns: Sequence[Turn]) -> dict[str, Any]:
    """LLaMA-Factory's sharegpt: system prompt and tools beside the turns, which alternate from the human on."""
    names = {"user": "human", "assistant": "gpt", "tool": "observation"}
    said: list[Turn] = []
    system = ""
    for turn in turns:
        _require_no_reasoning(row, turn, "llamafactory")
        calls = _calls(turn)
        if turn["role"] == "assistant" and turn.get("loss") is False:
            raise DataError(f"row {row['row_id']}: export.format llamafactory has no place for loss: false")
        if len(calls) > 1 or (calls and turn["content"]):
            raise DataError(f"row {row['row_id']}: export.format llamafactory has one tool call, or text, in a turn")
        if turn["role"] == "system":
            system = turn["content"]
        elif calls:
            said.append({"from": "function_call", "value": calls[0]})
        else:
            said.append({"from": names[turn["role"]], "value": turn["content"]})
    asked = {"human", "observation"}
    if any((turn["from"] in asked) != (number % 2 == 0) for number, turn in enumerate(said)):
        raise DataError(f"row {row['row_id']}: export.format llamafactory has questions and answers in turn only")
    tools = {"tools": row["tools"]} if row.get("tools") else {}
    return {"conversations": said, **({"system": system} if system else {}), **tools}


def _xtuner(row: Row, turns: Sequence[Turn]) -> dict[str, Any]:
    _require_plain(row, turns, "xtuner")
    system, pairs = _pairs(row, turns, "xtuner")
    said = [{"system": "", "input": query, "output": response} for query, response in pairs]
    said[0]["system"] = system
    return {"conversation": said}


def _calls(turn: Turn) -> list[str]:
    """Each of a turn's tool calls as JSON of its name and arguments."""
    calls = json.loads(turn["tool_calls"]) if "tool_calls" in turn else []
    return [json.dumps(call["function"], ensure_ascii=False) for call in calls]


def _pairs(row: Row, turns: Sequence[Turn], name: str) -> tuple[str, list[tuple[str, str]]]:
    """The system prompt, and the questions with their answers."""
    system = turns[0]["content"] if turns[0]["role"] == "system" else ""
    said = turns[1:] if system else turns
    if [turn["role"] for turn in said] != ["user", "assistant"] * (len(said) // 2):
        raise DataError(f"row {row['row_id']}: export.format {name} has pairs of question and answer only")
    return system, [(asked["content"], answer["content"]) for asked, answer in zip(said[::2], said[1::2], strict=True)]


def _require_plain(row: Row, turns: Sequence[Turn], name: str) -> None:
    """DataError where a turn says more than text, or the row has tools."""
    more = [field for turn in turns for field in turn if field not in ("role", "content")]
    more = [field for field in more if field != "loss"] + ["loss" for turn in turns if turn.get("loss") is False]
    if row.get("tools"):
        more.append("tools")
    if more:
        raise DataError(f"row {row['row_id']}: export.format {name} has no place for {more[0]}; messages has")


def _require_no_reasoning(row: Row, turn: Turn, name: str) -> None:
    if "reasoning" in turn:
        raise DataError(f"row {row['row_id']}: export.format {name} has no place for reasoning; messages has")


_FORMATS: dict[str, Callable[[Row, Sequence[Turn]], dict[str, Any]]] = {
    "messages": _messages,
    "alpaca": _alpaca,
    "sharegpt": _sharegpt,
    "swift": _swift,
    "llamafactory": _llamafactory,
    "xtuner": _xtuner,
}
