"""Chats to tokens and labels, by the model's own chat template: loss on the assistant's turns only."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from pipelines.artifacts.rows import Turn
from pipelines.errors import DataError

IGNORE_INDEX = -100
"""Label of a token without loss, as PyTorch's cross entropy has it."""

PRIVATE_USE = range(0xE000, 0xF8FF)
"""Code points that no text uses; one of them marks where control tokens in data are broken up."""


@dataclass(frozen=True)
class Encoded:
    """One chat: `tokens`, and `labels` of equal length, each the token itself or IGNORE_INDEX."""

    tokens: list[int]
    labels: list[int]


def with_system(messages: list[Turn], system: str | None) -> list[Turn]:
    """The messages with a system prompt before them, where they bring none."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def encode(tokenizer: Any, control: "re.Pattern[str]", messages: Sequence[Turn], tools: str | None = None) -> Encoded:
    """One chat as the model's template renders it.

    Loss is on what the assistant writes, with the token that ends its turn; a turn whose `loss` is false has none. A
    control token that stands in a message stays text. `tools` is JSON, as a row has it. Raises DataError where the
    template does not render turn by turn, or leaves out tools, tool calls or reasoning that the row has.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "train.model: its tokenizer has no chat template; "
            "use an instruction-tuned model, or give train.chat_template"
        )
    mark = _unused_mark(messages, tools)
    safe = [_for_template(turn, control, mark) for turn in messages]
    known = {"tools": json.loads(_broken_up(tools, control, mark))} if tools else {}
    text = _render(tokenizer, safe, **known)
    _require_all_rendered(tokenizer, safe, known, text)
    text, spans = _assistant_spans(tokenizer, control, safe, text, known)
    spans = [span for span, turn in zip(spans, _assistants(messages), strict=True) if turn.get("loss") is not False]
    tokens: list[int] = []
    labels: list[int] = []
    begin = 0
    for piece in text.split(mark):
        encoded = tokenizer(piece, add_special_tokens=False, return_offsets_mapping=True)
        tokens += encoded["input_ids"]
        for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            inside = any(first <= begin + start and begin + end <= last for first, last in spans)
            labels.append(token if inside else IGNORE_INDEX)
        begin += len(piece) + len(mark)
    return Encoded(tokens, labels)


def encode_text(tokenizer: Any, control: "re.Pattern[str]", text: str) -> Encoded:
    """Plain text with the end-of-sequence token after it, and loss on all of it; a control token in it stays text."""
    mark = _unused_mark([{"content": text}], None)
    pieces = _broken_up(text, control, mark).split(mark)
    tokens = [token for piece in pieces for token in tokenizer(piece, add_special_tokens=False)["input_ids"]]
    tokens.append(tokenizer.eos_token_id)
    return Encoded(tokens, tokens)


def _unused_mark(messages: Sequence[Turn], tools: str | None) -> str:
    texts = [text for turn in messages for text in turn.values() if isinstance(text, str)]
    used = {character for text in (*texts, tools or "") for character in text}
    return next(mark for mark in map(chr, PRIVATE_USE) if mark not in used)


def _broken_up(content: str, control: "re.Pattern[str]", mark: str) -> str:
    """`content` with the mark inside each control token, so that the tokenizer reads it as text."""
    return control.sub(lambda match: match[0][0] + mark + match[0][1:], content)


def _for_template(turn: Turn, control: "re.Pattern[str]", mark: str) -> Turn:
    """A turn as chat templates read it, with the mark in its control tokens."""
    safe = {name: _broken_up(value, control, mark) for name, value in turn.items() if isinstance(value, str)}
    if "reasoning" in safe:
        safe["reasoning_content"] = safe.pop("reasoning")
    return {**safe, "tool_calls": json.loads(safe["tool_calls"])} if "tool_calls" in safe else safe


def _assistants(messages: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in messages if turn["role"] == "assistant"]


def _require_all_rendered(tokenizer: Any, messages: Sequence[Turn], known: dict[str, Any], text: str) -> None:
    """DataError where the text is the same without the tools, the tool calls or the last turn's reasoning."""
    less: dict[str, tuple[Sequence[Turn], dict[str, Any]]] = {}
    if known:
        less["tools"] = messages, {}
    if any("tool_calls" in turn for turn in messages):
        less["tool calls"] = [{k: v for k, v in turn.items() if k != "tool_calls"} for turn in messages], known
    if "reasoning_content" in messages[-1]:
        last = {name: value for name, value in messages[-1].items() if name != "reasoning_content"}
        less["reasoning"] = [*messages[:-1], last], known
    for what, (turns, tools) in less.items():
        if _render(tokenizer, turns, **tools) == text:
            raise DataError(
                f"train.model: its chat template leaves out {what}, which the row has; train a model whose template "
                f"writes {what}, give train.chat_template, or remove {what} from the data"
            )


def _render(tokenizer: Any, messages: Sequence[Turn], prompt: bool = False, **known: Any) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt, **known)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in messages)
        raise DataError(f"the chat template does not render its turns ({roles}): {error}") from None
    return text


def _assistant_spans(
    tokenizer: Any, control: "re.Pattern[str]", messages: Sequence[Turn], text: str, known: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    """Where in `text` the assistant's turns stand, each to the end of the control token that ends it.

    A template that ends the last turn with no control token gets the tokenizer's end-of-sequence token.
    """
    spans = []
    for number, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:number], prompt=True, **known)
        if not text.startswith(before):
            raise DataError(
                f"train.model: its chat template renders the turns before turn {number + 1} differently once there "
                "are more, so the assistant's part cannot be told from the rest"
            )
        stop = control.search(text, len(before))
        if stop is None:
            text += tokenizer.eos_token
        spans.append((len(before), stop.end() if stop else len(text)))
    return text, spans
