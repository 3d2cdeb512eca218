"""Turns of a conversation: what each key of a source's turn means, and how turns become a canonical row.

A key is read, or says nothing (it is null or empty), or refuses the row by its name.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from pipelines.artifacts.rows import Turn
from pipelines.sources.json_text import RepeatedKey, value_of

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function_call": "call",
    "tool_call": "call",
    "tool": "tool",
    "tool_response": "tool",
    "function": "tool",
    "observation": "tool",
}
"""What a source calls a speaker; a `call` is an assistant's turn whose text is JSON."""

MARKS = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
"""Marks of loss in a file of texts."""
_ROLE = ("role", "from")
_CONTENT = ("content", "value", "text")
LOSS = ("loss", "weight", "train", "training")
"""Keys of turns, and columns of rows, that say whether what is said is trained."""
_REASONING = ("reasoning", "reasoning_content", "thinking")
_READ = frozenset((*_ROLE, *_CONTENT, *LOSS, *_REASONING, "tool_calls", "tool_call_id", "function_call", "name"))
_OF_ROLES = {"reasoning": ("assistant", "call"), "tool_calls": ("assistant",), "tool_call_id": ("tool",)}
"""Whose turns say what beside their text: a turn of another has no place for it."""
_PLAIN = (("role", "content"), ("from", "value"))
"""All that most turns have."""

FOLLOWS = {
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("tool", "assistant"),
}
"""Who may speak after whom."""


def says_nothing(value: Any) -> bool:
    """Whether a value is null, empty, or the NaN that tables have in place of null."""
    return value is None or value == "" or value == [] or value == {} or (isinstance(value, float) and value != value)


def turn_of(given: Mapping[Any, Any], number: int) -> Turn:
    """One turn of a source as role, content and what else it says; ValueError for what is not read.

    Its role may be `call`; see `ROLES`.
    """
    if len(given) == 2:
        for role, content in _PLAIN:
            if role in given and isinstance(given.get(content), str):
                return {"role": role_of(given[role], number), "content": given[content]}
    for key in given.keys() - _READ:
        if not says_nothing(given[key]):
            raise ValueError(f"turn {number} has {key}, which is not read: {_shown(given[key])}")
    turn: Turn = {"role": role_of(_one(given, _ROLE, number), number)}
    text, thoughts = _text_of(_one(given, _CONTENT, number), number)
    reasoning = _one(given, _REASONING, number)
    if not says_nothing(reasoning) and not isinstance(reasoning, str):
        raise ValueError(f"turn {number}: its reasoning is {type(reasoning).__name__}, not text")
    if thoughts and reasoning:
        raise ValueError(f"turn {number} has reasoning twice, in its content and beside it")
    calls = _calls_of(given, number)
    if calls:
        turn["tool_calls"] = calls
    if text is None and (calls is None or turn["role"] != "assistant"):
        raise ValueError(f"turn {number} has no text")
    turn["content"] = text or ""
    if reasoning or thoughts:
        turn["reasoning"] = reasoning or thoughts
    if (loss := loss_of(given, f"turn {number}")) is not None:
        turn["loss"] = loss
    if not says_nothing(given.get("tool_call_id")):
        turn["tool_call_id"] = str(given["tool_call_id"])
    if not says_nothing(given.get("name")):
        turn["name"] = given["name"]
    if more := [key for key, roles in _OF_ROLES.items() if key in turn and turn["role"] not in roles]:
        raise ValueError(f"turn {number} has {more[0]}, which is not read in a turn of role {turn['role']}")
    return turn


def role_of(name: Any, number: int) -> str:
    """The canonical role; ValueError for one that is not known."""
    if not isinstance(name, str) or name not in ROLES:
        raise ValueError(f"unknown role {_shown(name)} in turn {number}")
    return ROLES[name]


def loss_of(given: Mapping[Any, Any], what: str) -> bool | None:
    """Whether what is said is trained, as ms-swift (`loss`), OpenAI (`weight`) or axolotl (`train`) mark it."""
    found = set()
    for key in LOSS:
        value = given.get(key)
        if says_nothing(value):
            continue
        if isinstance(value, str):  # a CSV file has nothing else
            value = MARKS.get(value.strip().lower(), value)
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise ValueError(f"{what} has {key} {_shown(value)}; true or 1 (trained) and false or 0 (context) are read")
        found.add(bool(value))
    if len(found) > 1:
        raise ValueError(f"{what} has marks of loss that contradict each other")
    return found.pop() if found else None


def _one(given: Mapping[Any, Any], keys: Sequence[str], number: int) -> Any:
    """What stands under one of several names; ValueError where two of them differ."""
    found = [given[key] for key in keys if key in given and not says_nothing(given[key])]
    if any(value != found[0] for value in found[1:]):
        raise ValueError(f"turn {number} has {' and '.join(key for key in keys if key in given)}, which differ")
    if found:
        return found[0]
    return next((given[key] for key in keys if given.get(key) is not None), None)  # an empty text is a text


def _text_of(content: Any, number: int) -> tuple[str | None, str]:
    """A turn's text, None where it has none, and what it thinks; parts of text are joined as they are."""
    if content is None or isinstance(content, str):
        return content, ""
    if not isinstance(content, list):
        raise ValueError(f"turn {number}: its content is {type(content).__name__}, not text")
    texts: list[str] = []
    thoughts: list[str] = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, Mapping) else "text"
        said = part.get(kind) if isinstance(part, Mapping) and isinstance(kind, str) else part
        if kind not in ("text", "thinking") or not isinstance(said, str):
            raise ValueError(f"turn {number}: its content has a part that is not text: {_shown(part)}")
        if isinstance(part, Mapping) and (
            more := [k for k in part.keys() - {"type", kind} if not says_nothing(part[k])]
        ):
            raise ValueError(f"turn {number}: a part of its content has {more[0]}, which is not read")
        (texts if kind == "text" else thoughts).append(said)
    return "".join(texts), "".join(thoughts)


def _calls_of(given: Mapping[Any, Any], number: int) -> str | None:
    """The turn's tool calls as JSON in OpenAI's form."""
    calls = given.get("tool_calls")
    if not says_nothing(given.get("function_call")):
        if not says_nothing(calls):
            raise ValueError(f"turn {number} has tool_calls and function_call")
        calls = [given["function_call"]]
    return None if says_nothing(calls) else canonical_calls(calls, number)


def canonical_calls(given: Any, number: int) -> str:
    """Tool calls, or one, or the JSON of either, as a JSON list of {id?, type, function: {name, arguments}}."""
    calls = json_of(given, f"turn {number}: its tool calls")
    entries = []
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise ValueError(f"turn {number}: a tool call has no function's name: {_shown(call)}")
        known = {"name", "arguments", "parameters"}
        around = {"id", "type", "index", "function"} | (known if function is call else set())
        more = [key for key in call.keys() - around if not says_nothing(call[key])]
        more += [key for key in function.keys() - known - around if not says_nothing(function[key])]
        if more:
            raise ValueError(f"turn {number}: a tool call has {more[0]}, which is not read")
        arguments = _one(function, ("arguments", "parameters"), number)
        if arguments is None:
            arguments = {}
        if isinstance(arguments, str):
            arguments = json_of(arguments or "{}", f"turn {number}: the arguments of {function['name']}")
        entry = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
        entries.append({"id": str(call["id"]), **entry} if not says_nothing(call.get("id")) else entry)
    return _as_json(entries, f"turn {number}: its tool calls")


def _as_json(value: Any, what: str) -> str:
    try:
        return json.dumps(value, ensure_ascii=False)
    except TypeError as error:  # tables have dates and bytes
        raise ValueError(f"{what} hold what JSON has not: {error}") from None


def json_of(given: Any, what: str) -> Any:
    """A value that may be given as JSON text; ValueError where that is not JSON."""
    if not isinstance(given, str):
        return given
    try:
        return value_of(given)
    except RepeatedKey as error:
        raise ValueError(f"{what}: {error}") from None
    except ValueError:
        raise ValueError(f"{what} are not JSON: {_shown(given)}") from None


def canonical_tools(given: Any) -> str | None:
    """A row's tools as a JSON list, None where it has none; ValueError where it is none."""
    if says_nothing(given):
        return None
    tools = json_of(given, "tools")
    if says_nothing(tools):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise ValueError(f"tools is not a list of tools: {_shown(tools)}")
    return _as_json(tools, "tools")


def conversation_of(
    turns: Iterable[Turn], system: str | None, tools: str | None = None, is_trained: bool | None = None
) -> tuple[dict[str, Any], int]:
    """A canonical row from turns, and how many of them were joined to the one before, of the same speaker.

    `messages` is filled only where a row says more than system, query and response do. `is_trained` false marks all
    of the assistant's turns that have no mark of their own. ValueError, saying why, for what is no conversation.
    """
    turns = [*turns]
    if len(turns) == 2 and tools is None and is_trained is None:  # as most rows: nothing below would find anything
        asked, said = turns
        if asked["role"] == "user" and said["role"] == "assistant" and len(asked) == len(said) == 2:
            return {"system": system, "query": asked["content"], "response": said["content"]}, 0
    chat: list[Turn] = []
    joined = 0
    for number, turn in enumerate(turns, start=1):
        if turn["role"] == "call":
            turn = {**turn, "role": "assistant", "tool_calls": canonical_calls(turn["content"], number), "content": ""}
        if "name" in turn:
            turn = _without_name(turn, chat, number)
        if chat and chat[-1]["role"] == turn["role"] != "tool":
            _join(chat[-1], turn, number)
            joined += 1
        else:
            chat.append(dict(turn))
    if marked := next((turn for turn in chat if turn["role"] != "assistant" and turn.get("loss")), None):
        raise ValueError(f"a turn of the {marked['role']} is marked to be trained; only an assistant's turns are")
    if chat and chat[0]["role"] == "system":
        own = chat.pop(0)
        if system and system != own["content"]:
            raise ValueError("the column system and the turn of the system differ; delete one")
        system = own["content"]
    _require_dialogue(chat)
    if is_trained is False:
        for turn in chat:
            if turn["role"] == "assistant":
                turn.setdefault("loss", False)
    queries = [turn["content"] for turn in chat if turn["role"] == "user"]
    row: dict[str, Any] = {"system": system, "query": queries[-1], "response": chat[-1]["content"]}
    if len(chat) > 2 or tools or max(map(len, chat)) > 2:
        head = [{"role": "system", "content": system}] if system else []
        row["messages"] = head + chat
    if tools:
        row["tools"] = tools
    return row, joined


def _without_name(turn: Turn, before: Sequence[Turn], number: int) -> Turn:
    """A tool's turn may say the name of the function that was called; no other turn has a name that is read."""
    name, rest = turn["name"], {key: value for key, value in turn.items() if key != "name"}
    calls = [json.loads(earlier["tool_calls"]) for earlier in before if "tool_calls" in earlier]
    called = {call["function"]["name"] for call in (calls[-1] if calls else [])}
    if turn["role"] == "tool" and isinstance(name, str) and name in called:
        return rest
    raise ValueError(f"turn {number} has name {_shown(name)}, which is not read")


def _join(before: Turn, turn: Turn, number: int) -> None:
    """Put a turn at the end of the one before it, which is the same speaker's."""
    if before.get("loss") != turn.get("loss"):
        raise ValueError(f"turns {number - 1} and {number} are one speaker's and have different marks of loss")
    if "reasoning" in turn or "tool_calls" in before:
        if "tool_calls" not in before or "tool_calls" not in turn or "reasoning" in turn or turn["content"]:
            raise ValueError(f"turns {number - 1} and {number} are one speaker's, with reasoning or calls in between")
        calls = [*json.loads(before["tool_calls"]), *json.loads(turn["tool_calls"])]
        before["tool_calls"] = json.dumps(calls, ensure_ascii=False)
        return
    if "tool_calls" in turn:
        before["tool_calls"] = turn["tool_calls"]
    before["content"] = "\n".join(filter(None, (before["content"], turn["content"])))


def _require_dialogue(chat: Sequence[Turn]) -> None:
    roles = [turn["role"] for turn in chat]
    begins_and_ends = roles and roles[0] in ("user", "assistant") and roles[-1] == "assistant" and "user" in roles
    if not begins_and_ends or any(second not in FOLLOWS.get(first, ()) for first, second in pairwise(roles)):
        raise ValueError(f"turns must alternate user and assistant and end with an answer, not {roles}")


def _shown(value: Any) -> str:
    """A value in a message, cut."""
    return f"{value!r:.80}"
