"""Schema adapters: one row of a usual schema in, one canonical row out.

An adapter is a function from the source's row to the canonical columns `system`, `query`, `response`, `messages`,
`tools` and whatever it computes besides; it raises ValueError, saying why, for a row it cannot read, and counts what it
had to decide. Which other columns of a row are carried and which refuse it, `pipelines.sources.row_keys` says. Adding a
schema is one function and one line in `ADAPTERS`.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipelines.artifacts.rows import Turn
from pipelines.sources.json_text import RepeatedKey, value_of
from pipelines.sources.turns import (
    LOSS,
    canonical_tools,
    conversation_of,
    json_of,
    loss_of,
    says_nothing,
    turn_of,
)

Row = Mapping[str, Any]
Canonical = dict[str, Any]
Counts = Counter[str]
"""What was decided while reading, by what it is called in the report."""

_VOTES = re.compile(r"赞同(?:\s*([0-9][0-9,]*(?:\.[0-9]+)?)\s*(万|亿)?)?")
_UNITS = {None: 1, "万": 10_000, "亿": 100_000_000}

SYSTEM = ("system", "system_prompt", "meta_instruction")
"""Columns that hold a system prompt; the last one is MOSS's."""
REASONING = ("reasoning", "reasoning_content", "thinking")
SAID_OF_ROW = (*LOSS, *REASONING)
"""Columns that say of a pair's answer what they would say in a turn."""
_BESIDE_TURNS = frozenset((*SYSTEM, "tools", *LOSS))
_BESIDE_PAIRS = _BESIDE_TURNS | {"history", *REASONING}
"""Columns that are read beside turns, and beside a question and its answer."""


@dataclass(frozen=True)
class Adapter:
    """How one schema is read: `needs` every column named there, and consumes `uses`."""

    read: Callable[[Row, Counts], Canonical]
    needs: frozenset[str]
    uses: frozenset[str]


def _pair(query: str, response: str) -> Callable[[Row, Counts], Canonical]:
    """Reads a question and its answer from the columns of those names; either may be a list of turns, as TRL has it.

    TRL trains the completion alone: answers among the turns of the question are context.
    """

    def read(row: Row, counts: Counts) -> Canonical:
        asked, said = row.get(query), row.get(response)
        if isinstance(asked, list) or isinstance(said, list):
            _require_in_turns(row, REASONING)
            before = _turns_or_text(asked, "user", query)
            context = [{"loss": False, **turn} if turn["role"] in ("assistant", "call") else turn for turn in before]
            chat = [*_history(row), *context, *_turns_or_text(said, "assistant", response)]
            return _conversation(row, chat, counts)
        return _exchange(row, _text(row, query), _text(row, response), counts)

    return read


def query_response(row: Row, counts: Counts) -> Canonical:
    """`query`, `response` and, if given, `system`: the canonical names themselves.

    A row that also has `messages`, as exports have, is read as those; ValueError where the two differ.
    """
    if says_nothing(row.get("messages")):
        return _pair("query", "response")(row, counts)
    _require_in_turns(row, ("history", *REASONING))
    return messages(row, counts)


def zhihu_kol(row: Row, counts: Counts) -> Canonical:
    """OmniData/Zhihu-KOL: INSTRUCTION, RESPONSE and the vote count inside METADATA."""
    canonical: Canonical = {"query": _text(row, "INSTRUCTION"), "response": _text(row, "RESPONSE")}
    try:
        metadata = value_of(_text(row, "METADATA"))
    except RepeatedKey as error:
        raise ValueError(f"METADATA: {error}") from None
    except ValueError:
        raise ValueError("METADATA is not JSON") from None
    if not isinstance(metadata, dict) or "upvotes" not in metadata:
        raise ValueError("METADATA has no upvotes")
    votes = metadata["upvotes"]
    if not isinstance(votes, str) and not says_nothing(votes):
        raise ValueError(f"upvotes {votes!r} is not like 赞同 15 or 赞同 1.2 万")
    if says_nothing(votes):
        counts["rows without votes, which count as 0"] += 1
        canonical["upvotes"] = 0
    else:
        canonical["upvotes"] = parse_votes(votes)
    for key in metadata:
        if key != "upvotes":
            counts[f"rows with {key} in METADATA, which is not read"] += 1
    return canonical


@lru_cache(maxsize=1 << 14)  # most answers have few votes, so that the same texts come again and again
def parse_votes(text: str) -> int:
    """Zhihu's vote string as a number: `赞同` is 0, `赞同 15` is 15, `赞同 1.2 万` is 12000.

    Digits may be of full width, and characters of no width may stand between them.
    """
    match = _VOTES.fullmatch(text.strip())
    if match is None:
        plain = unicodedata.normalize("NFKC", text)
        match = _VOTES.fullmatch("".join(c for c in plain if unicodedata.category(c) != "Cf").strip())
    if match is None:
        raise ValueError(f"upvotes {text!r} is not like 赞同 15 or 赞同 1.2 万")
    number, unit = match.groups()
    return round(float(number.replace(",", "")) * _UNITS[unit]) if number else 0


def alpaca(row: Row, counts: Counts) -> Canonical:
    """Alpaca: `instruction`, `input`, `output`; the input, if any, follows the instruction on a line of its own."""
    query = "\n".join(filter(None, (_text(row, "instruction"), _optional(row, "input"))))
    return _exchange(row, query, _text(row, "output"), counts)


def dolly(row: Row, counts: Counts) -> Canonical:
    """Dolly: `instruction`, `context` (or alpaca's `input`) and `response`, as alpaca's three."""
    query = "\n".join(filter(None, (_text(row, "instruction"), _optional(row, "input"), _optional(row, "context"))))
    return _exchange(row, query, _text(row, "response"), counts)


def coig(row: Row, counts: Counts) -> Canonical:
    """COIG: `conversations` as a list of {question, answer}, whose first question comes after `instruction`."""
    instruction = _optional(row, "instruction")
    if not instruction:
        return sharegpt(row, counts)
    chat = list(_asked_and_answered(_turns(row, "conversations"), "conversations"))
    chat[0]["content"] = "\n".join(filter(None, (instruction, chat[0]["content"])))
    return _conversation(row, chat, counts)


def coig_exam(row: Row, counts: Counts) -> Canonical:
    """COIG's exams and human values: the question after its instruction and text, the answer after its analysis."""
    asked = (
        _optional(row, "textbox_q_instruction"),
        _optional(row, "textbox_q_context"),
        _text(row, "textbox_question"),
    )
    said = (_optional(row, "textbox_answer_analysis"), _text(row, "textbox_answer"))
    return {"query": "\n".join(filter(None, asked)), "response": "\n".join(dict.fromkeys(filter(None, said)))}


def coig_translated(row: Row, counts: Counts) -> Canonical:
    """COIG's translated instructions: alpaca's three with `trans_` before their names, and the originals beside."""
    if any(not says_nothing(row.get(name)) for name in ("instruction", "input", "output")):
        counts["rows read in translation, whose originals are left out"] += 1
    query = "\n".join(filter(None, (_text(row, "trans_instruction"), _optional(row, "trans_input"))))
    return {"query": query, "response": _text(row, "trans_output")}


def sharegpt(row: Row, counts: Counts) -> Canonical:
    """ShareGPT: `conversations` as a list of {from, value} or {role, content}, or of {question, answer}."""
    turns = _turns(row, "conversations")
    if all("question" in turn and "answer" in turn for turn in turns):
        return _conversation(row, _asked_and_answered(turns, "conversations"), counts)
    return _conversation(row, [turn_of(turn, number) for number, turn in enumerate(turns, start=1)], counts)


def messages(row: Row, counts: Counts) -> Canonical:
    """OpenAI: `messages` as a list of {role, content}; their last pair may stand in `query` and `response` too."""
    turns = _turns(row, "messages")
    read = _conversation(row, [turn_of(turn, number) for number, turn in enumerate(turns, start=1)], counts)
    for name in ("query", "response"):
        if name in row and not says_nothing(row[name]) and row[name] != read[name]:
            raise ValueError(f"{name} is not what the messages end with; delete {name} or the messages")
    return read


def conversation(row: Row, counts: Counts) -> Canonical:
    """xtuner: `conversation` as a list of {system, input, output}, an entry a turn; ms-swift: of {human, assistant}.

    Others: of {role, content}, as in `messages`.
    """
    chat: list[Turn] = []
    given = _turns(row, "conversation")
    if all("role" in turn or "from" in turn for turn in given):
        return _conversation(row, [turn_of(turn, number) for number, turn in enumerate(given, start=1)], counts)
    if all(turn.keys() == {"human", "assistant"} for turn in given):
        return _conversation(
            row, _exchanges([[turn["human"], turn["assistant"]] for turn in given], "conversation"), counts
        )
    for number, turn in enumerate(given, start=1):
        read = ("system", "input", "output", "output_with_loss")
        if more := [key for key in turn if key not in read and not says_nothing(turn[key])]:
            raise ValueError(f"turn {number} has {more[0]}, which is not read")
        if not says_nothing(turn.get("system")):
            if chat:
                raise ValueError(f"turn {number} has a system prompt, which only the first may have")
            chat.append(_turn("system", turn["system"], "conversation"))
        if chat and chat[-1]["role"] == "assistant" and turn.get("input") == "":
            raise ValueError(f"turn {number} has an empty input")
        if turn.get("input") != "" or chat:
            chat.append(_turn("user", turn.get("input"), "conversation"))
        answer = _turn("assistant", turn.get("output"), "conversation")
        loss = loss_of({"loss": turn.get("output_with_loss")}, f"turn {number}")
        chat.append(answer if loss is None else {**answer, "loss": loss})
    return _conversation(row, chat, counts)


def moss(row: Row, counts: Counts) -> Canonical:
    """MOSS: `chat` as {turn_1: {Human, MOSS, …}, …}, with its marks of who speaks taken off."""
    turns = row.get("chat")
    if not isinstance(turns, Mapping) or not turns:
        raise ValueError("chat is not {turn_1: {Human, MOSS}, …}")
    pairs = []
    if odd := [name for name in turns if not re.fullmatch(r"turn_[0-9]{1,9}", name)]:
        raise ValueError(f"chat: {odd[0]} is not turn_1, turn_2 or so on")
    for name in sorted(turns, key=lambda name: int(name.removeprefix("turn_"))):  # files may have turn_10 before turn_2
        turn = turns[name]
        if says_nothing(turn):  # tables fill up the turns that shorter conversations do not have
            continue
        if (
            not isinstance(turn, Mapping)
            or not isinstance(turn.get("Human"), str)
            or not isinstance(turn.get("MOSS"), str)
        ):
            raise ValueError(f"chat: {name} has no Human and MOSS")
        for key, value in turn.items():
            if key not in ("Human", "MOSS") and not says_nothing(value) and _unmarked(str(value)) not in ("", "None"):
                raise ValueError(f"chat: {name} has {key}, which is not read")
        pairs.append((_unmarked(turn["Human"]), _unmarked(turn["MOSS"])))
    return _conversation(row, _exchanges(pairs, "chat"), counts)


def _unmarked(text: str) -> str:
    """A text of MOSS without `<|Human|>:` before it and `<eoh>` after it."""
    return re.sub(r"^\s*<\|[^|]*\|>:\s*|\s*<eo[a-z]+>\s*$", "", text)


def text(row: Row, counts: Counts) -> Canonical:
    """Plain text in `text`: a row without a question, of which all is trained."""
    return {"query": None, "response": _text(row, "text")}


def _exchange(row: Row, query: str, response: str, counts: Counts) -> Canonical:
    """A canonical row of a question and its answer, after what `history` says."""
    if _BESIDE_PAIRS.isdisjoint(row):  # as most rows: nothing below would find anything
        return {"system": None, "query": query, "response": response}
    system = _system(row)
    history, tools = _history(row), canonical_tools(row.get("tools"))
    marks = {name: row[name] for name in SAID_OF_ROW if not says_nothing(row.get(name))}
    if not history and not tools and not marks:
        return {"system": system, "query": query, "response": response}
    answer = {"role": "assistant", "content": response, **{k: marks[k] for k in marks if k in REASONING}}
    chat = [*history, {"role": "user", "content": query}, turn_of(answer, len(history) + 2)]
    return _conversation(row, chat, counts)


def _conversation(row: Row, chat: Iterable[Turn], counts: Counts) -> Canonical:
    """A canonical row of turns and of what the row's columns say of all of them."""
    if _BESIDE_TURNS.isdisjoint(row):
        read, joined = conversation_of(chat, None)
    else:
        read, joined = conversation_of(chat, _system(row), canonical_tools(row.get("tools")), loss_of(row, "the row"))
    if joined:
        counts["turns joined to the one before, of the same speaker"] += joined
    return read


def _require_in_turns(row: Row, columns: Iterable[str]) -> None:
    """ValueError where a column says what, in a row of turns, a turn has to say."""
    for name in columns:
        if not says_nothing(row.get(name)):
            raise ValueError(f"column {name} stands beside turns; write it into them")


def _system(row: Row) -> str | None:
    found = {name: row[name] for name in SYSTEM if not says_nothing(row.get(name))}
    if any(said != next(iter(found.values())) for said in found.values()):
        raise ValueError(f"columns {' and '.join(found)} differ; delete one")
    return _text(found, next(iter(found))) if found else None


def _history(row: Row) -> list[Turn]:
    """The exchanges before the row's own, as pairs of texts or as turns."""
    given = row.get("history")
    if says_nothing(given):
        return []
    history = json_of(given, "history")
    if not isinstance(history, list):
        raise ValueError(f"history is not a list of [question, answer]: {history!r:.80}")
    if all(isinstance(turn, Mapping) for turn in history):
        return [turn_of(turn, number) for number, turn in enumerate(history, start=1)]
    return list(_exchanges(history, "history"))


def _exchanges(pairs: Iterable[Any], column: str) -> Iterator[Turn]:
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{column} has an entry that is no pair of question and answer: {pair!r:.80}")
        yield _turn("user", pair[0], column)
        yield _turn("assistant", pair[1], column)


def _asked_and_answered(turns: Iterable[Mapping[str, Any]], column: str) -> Iterator[Turn]:
    for number, turn in enumerate(turns, start=1):
        if more := [key for key in turn if key not in ("question", "answer") and not says_nothing(turn[key])]:
            raise ValueError(f"turn {number} has {more[0]}, which is not read")
        yield _turn("user", turn.get("question"), column)
        yield _turn("assistant", turn.get("answer"), column)


def _turn(role: str, said: Any, column: str) -> Turn:
    if not isinstance(said, str):
        raise ValueError(f"{column}: a turn has no text")
    return {"role": role, "content": said}


def _turns_or_text(given: Any, role: str, column: str) -> list[Turn]:
    if isinstance(given, str):
        return [{"role": role, "content": given}]
    return [turn_of(turn, number) for number, turn in enumerate(_turns({column: given}, column), start=1)]


def with_system(row: Canonical, system: str | None) -> Canonical:
    """A canonical row with a system prompt, where it brings none: also at the head of its `messages`."""
    if not system or row.get("system"):
        return row
    turns = row.get("messages")
    head = {"messages": [{"role": "system", "content": system}, *turns]} if turns else {}
    return {**row, "system": system, **head}


def replaced(row: Canonical, texts: Mapping[str, str]) -> Canonical:
    """A canonical row with some texts in the place of others, in all that is said: names in place of placeholders."""

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(inner) for inner in value]
        if isinstance(value, dict):
            return {name: filled(inner) for name, inner in value.items()}
        for old, new in texts.items():
            value = value.replace(old, new) if isinstance(value, str) else value
        return value

    def filled_json(text: str) -> str:
        return json.dumps(filled(json.loads(text)), ensure_ascii=False)

    if not texts:
        return row
    said: Canonical = {name: filled(row[name]) for name in ("system", "query", "response") if name in row}
    if row.get("tools"):
        said["tools"] = filled_json(row["tools"])
    if row.get("messages"):
        fill = {"content": filled, "reasoning": filled, "tool_calls": filled_json}
        said["messages"] = [
            {name: fill[name](value) if name in fill else value for name, value in turn.items()}
            for turn in row["messages"]
        ]
    return {**row, **said}


def _turns(row: Row, column: str) -> list[dict[str, Any]]:
    turns = json_of(row.get(column), column) if isinstance(row.get(column), str) else row.get(column)
    if not isinstance(turns, list) or {*map(type, turns)} != {dict}:
        raise ValueError(f"{column} is not a list of turns")
    return turns


def _text(row: Row, column: str) -> str:
    found = row.get(column)
    if isinstance(found, str):
        return found
    if found is not None:
        raise ValueError(f"column {column} holds {type(found).__name__}, not text")
    there = f"; the row has {', '.join(map(str, row))}" if column not in row else ""
    raise ValueError(f"column {column} is missing{there}")


def _optional(row: Row, column: str) -> str | None:
    return None if says_nothing(row.get(column)) else _text(row, column)


def _adapter(read: Callable[[Row, Counts], Canonical], needs: str, also: str = "") -> Adapter:
    columns = frozenset(needs.split())
    return Adapter(read, columns, columns | frozenset(also.split()))


_PAIR = " ".join(_BESIDE_PAIRS)
_CHAT = " ".join(_BESIDE_TURNS)

ADAPTERS: dict[str, Adapter] = {
    "messages": _adapter(messages, "messages", f"query response {_CHAT}"),
    "coig": _adapter(coig, "instruction conversations", _CHAT),
    "sharegpt": _adapter(sharegpt, "conversations", _CHAT),
    "conversation": _adapter(conversation, "conversation", _CHAT),
    "query_response": _adapter(query_response, "query response", f"messages {_PAIR}"),
    "zhihu_kol": _adapter(zhihu_kol, "INSTRUCTION RESPONSE METADATA"),
    "coig_translated": _adapter(
        coig_translated, "trans_instruction trans_output", "trans_input instruction input output"
    ),
    "coig_exam": _adapter(
        coig_exam,
        "textbox_question textbox_answer",
        "textbox_q_instruction textbox_q_context textbox_answer_analysis",
    ),
    "alpaca": _adapter(alpaca, "instruction output", f"input {_PAIR}"),
    "dolly": _adapter(dolly, "instruction response", f"context input {_PAIR}"),
    "prompt_completion": _adapter(_pair("prompt", "completion"), "prompt completion", _PAIR),
    "prompt_response": _adapter(_pair("prompt", "response"), "prompt response", _PAIR),
    "question_answer": _adapter(_pair("question", "answer"), "question answer", _PAIR),
    "question_response": _adapter(_pair("question", "response"), "question response", _PAIR),
    "advertisegen": _adapter(_pair("content", "summary"), "content summary", _PAIR),
    "counseling": _adapter(_pair("Context", "Response"), "Context Response", _PAIR),
    "moss": _adapter(moss, "chat", " ".join(SYSTEM)),
    "text": _adapter(text, "text"),
}
"""The schemas, those first that say more of a row that has several."""


def recognise(columns: Iterable[str]) -> str | None:
    """The first adapter whose needed columns are all there, or None."""
    there = set(columns)
    return next((name for name, adapter in ADAPTERS.items() if adapter.needs <= there), None)
