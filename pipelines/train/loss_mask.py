"""Chats to tokens and labels, by the model's own chat template: loss on the assistant's turns only."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

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


def with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    """The messages with a system prompt before them, where they bring none."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def encode(tokenizer: Any, control: "re.Pattern[str]", messages: Sequence[dict[str, str]]) -> Encoded:
    """One chat as the model's template renders it.

    Loss is on what the assistant writes, with the token that ends its turn. A control token that stands in a
    message stays text. Raises DataError where the template does not render turn by turn.
    """
    if tokenizer.chat_template is None:
        raise DataError(
            "train.model: its tokenizer has no chat template; "
            "use an instruction-tuned model, or give train.chat_template"
        )
    mark = _unused_mark(messages)
    safe = [{**turn, "content": _broken_up(turn["content"], control, mark)} for turn in messages]
    text = _render(tokenizer, safe)
    text, spans = _assistant_spans(tokenizer, control, safe, text)
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


def _unused_mark(messages: Sequence[dict[str, str]]) -> str:
    used = {character for turn in messages for character in turn["content"]}
    return next(mark for mark in map(chr, PRIVATE_USE) if mark not in used)


def _broken_up(content: str, control: "re.Pattern[str]", mark: str) -> str:
    """`content` with the mark inside each control token, so that the tokenizer reads it as text."""
    return control.sub(lambda match: match[0][0] + mark + match[0][1:], content)


def _render(tokenizer: Any, messages: Sequence[dict[str, str]], prompt: bool = False) -> str:
    try:
        text: str = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=prompt)
    except TemplateError as error:
        roles = ", ".join(turn["role"] for turn in messages)
        raise DataError(f"the chat template does not render its turns ({roles}): {error}") from None
    return text


def _assistant_spans(
    tokenizer: Any, control: "re.Pattern[str]", messages: Sequence[dict[str, str]], text: str
) -> tuple[str, list[tuple[int, int]]]:
    """Where in `text` the assistant's turns stand, each to the end of the control token that ends it.

    A template that ends the last turn with no control token gets the tokenizer's end-of-sequence token.
    """
    spans = []
    for number, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:number], prompt=True)
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
