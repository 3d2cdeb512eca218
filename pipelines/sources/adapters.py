"""Schema adapters: one row of a usual schema in, one canonical row out.

An adapter is a function from the source's row to the canonical columns `system`, `query`, `response`, `messages`
and whatever it computes besides; it raises ValueError, saying why, for a row it cannot read. The source's columns that
an adapter does not consume are carried along. Adding a schema is one function and one line in `ADAPTERS`.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Canonical = dict[str, Any]

_VOTES = re.compile(r"赞同(?:\s*([0-9][0-9,]*(?:\.[0-9]+)?)\s*(万|亿)?)?")
_UNITS = {None: 1, "万": 10_000, "亿": 100_000_000}
_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
}


@dataclass(frozen=True)
class Adapter:
    """How one schema is read: `needs` every column named there, and consumes `uses`."""

    read: Callable[[Row], Canonical]
    needs: frozenset[str]
    uses: frozenset[str]


def query_response(row: Row) -> Canonical:
    """`query`, `response` and, if given, `system`: the canonical names themselves."""
    return {"system": _optional(row, "system"), "query": _text(row, "query"), "response": _text(row, "response")}


def zhihu_kol(row: Row) -> Canonical:
    """OmniData/Zhihu-KOL: INSTRUCTION, RESPONSE and the vote count inside METADATA."""
    canonical = {"query": _text(row, "INSTRUCTION"), "response": _text(row, "RESPONSE")}
    try:
        metadata = json.loads(_text(row, "METADATA"))
    except ValueError:
        raise ValueError("METADATA is not JSON") from None
    if not isinstance(metadata, dict) or not isinstance(metadata.get("upvotes"), str):
        raise ValueError("METADATA has no upvotes")
    return {**canonical, "upvotes": parse_votes(metadata["upvotes"])}


def parse_votes(text: str) -> int:
    """Zhihu's vote string as a number: `赞同` is 0, `赞同 15` is 15, `赞同 1.2 万` is 12000."""
    match = _VOTES.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"upvotes {text!r} is not like 赞同 15 or 赞同 1.2 万")
    number, unit = match.groups()
    return round(float(number.replace(",", "")) * _UNITS[unit]) if number else 0


def alpaca(row: Row) -> Canonical:
    """Alpaca: `instruction`, `input`, `output`; the input, if any, follows the instruction on a line of its own."""
    given = _optional(row, "input")
    instruction = _text(row, "instruction")
    query = f"{instruction}\n{given}" if given else instruction
    return {"system": _optional(row, "system"), "query": query, "response": _text(row, "output")}


def sharegpt(row: Row) -> Canonical:
    """ShareGPT: `conversations` as a list of {from, value}."""
    return from_turns(
        _optional(row, "system"), [(turn.get("from"), turn.get("value")) for turn in _turns(row, "conversations")]
    )


def messages(row: Row) -> Canonical:
    """OpenAI: `messages` as a list of {role, content}."""
    return from_turns(
        _optional(row, "system"), [(turn.get("role"), turn.get("content")) for turn in _turns(row, "messages")]
    )


def conversation(row: Row) -> Canonical:
    """xtuner: `conversation` as a list of {system, input, output}, one entry per turn."""
    turns = _turns(row, "conversation")
    pairs = [(role, turn.get(key)) for turn in turns for role, key in (("user", "input"), ("assistant", "output"))]
    return from_turns(turns[0].get("system") or None, pairs)


def advertisegen(row: Row) -> Canonical:
    """AdvertiseGen: attributes in `content`, the advertisement in `summary`."""
    return {"query": _text(row, "content"), "response": _text(row, "summary")}


def counseling(row: Row) -> Canonical:
    """Counseling conversations: `Context` and `Response`."""
    return {"query": _text(row, "Context"), "response": _text(row, "Response")}


def from_turns(system: str | None, turns: Iterable[tuple[Any, Any]]) -> Canonical:
    """A canonical row from (role, text) pairs; `messages` is filled only where there is more than one exchange."""
    chat = [(_role(role), text) for role, text in turns]
    if any(not isinstance(text, str) for _, text in chat):
        raise ValueError("a turn has no text")
    if chat and chat[0][0] == "system":
        system, chat = chat[0][1], chat[1:]
    roles = [role for role, _ in chat]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"turns must alternate user and assistant and end with an answer, not {roles}")
    row: Canonical = {"system": system, "query": chat[-2][1], "response": chat[-1][1]}
    if len(chat) > 2:
        head = [{"role": "system", "content": system}] if system else []
        row["messages"] = head + [{"role": role, "content": text} for role, text in chat]
    return row


def with_system(row: Canonical, system: str | None) -> Canonical:
    """A canonical row with a system prompt, where it brings none: also at the head of its `messages`."""
    if row.get("system") or not system:
        return {**row, "system": row.get("system")}
    turns = row.get("messages")
    head = {"messages": [{"role": "system", "content": system}, *turns]} if turns else {}
    return {**row, "system": system, **head}


def replaced(row: Canonical, texts: Mapping[str, str]) -> Canonical:
    """A canonical row with some texts in the place of others, in all that is said: names in place of placeholders."""

    def filled(text: str | None) -> str | None:
        for old, new in texts.items():
            text = text.replace(old, new) if text else text
        return text

    if not texts:
        return row
    said: Canonical = {name: filled(row[name]) for name in ("system", "query", "response") if name in row}
    if row.get("messages"):
        said["messages"] = [{**turn, "content": filled(turn["content"])} for turn in row["messages"]]
    return {**row, **said}


def _role(name: Any) -> str:
    if name not in _ROLES:
        raise ValueError(f"unknown role {name!r}")
    return _ROLES[name]


def _turns(row: Row, column: str) -> list[Mapping[str, Any]]:
    turns = row.get(column)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, Mapping) for turn in turns):
        raise ValueError(f"{column} is not a list of turns")
    return turns


def _text(row: Row, column: str) -> str:
    if row.get(column) is None:
        there = f"; the row has {', '.join(map(str, row))}" if column not in row else ""
        raise ValueError(f"column {column} is missing{there}")
    if not isinstance(row[column], str):
        raise ValueError(f"column {column} holds {type(row[column]).__name__}, not text")
    text: str = row[column]
    return text


def _optional(row: Row, column: str) -> str | None:
    return _text(row, column) if row.get(column) else None


def _adapter(read: Callable[[Row], Canonical], needs: str, also: str = "") -> Adapter:
    columns = frozenset(needs.split())
    return Adapter(read, columns, columns | frozenset(also.split()))


ADAPTERS: dict[str, Adapter] = {
    "query_response": _adapter(query_response, "query response", "system"),
    "zhihu_kol": _adapter(zhihu_kol, "INSTRUCTION RESPONSE METADATA"),
    "alpaca": _adapter(alpaca, "instruction output", "input system"),
    "sharegpt": _adapter(sharegpt, "conversations", "system"),
    "messages": _adapter(messages, "messages", "system"),
    "conversation": _adapter(conversation, "conversation"),
    "advertisegen": _adapter(advertisegen, "content summary"),
    "counseling": _adapter(counseling, "Context Response"),
}


def recognise(columns: Iterable[str]) -> str | None:
    """The first adapter whose needed columns are all there, or None."""
    there = set(columns)
    return next((name for name, adapter in ADAPTERS.items() if adapter.needs <= there), None)
