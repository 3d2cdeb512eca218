"""Rows that are too long: cut at the end, left out, or split; question and answer may have limits of their own."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.train.loss_mask import IGNORE_INDEX, Encoded, turns_for
from pipelines.train.marked_chat import Turn

Messages = Sequence[Turn]


@dataclass(frozen=True)
class TokenLimits:
    """Most tokens of a sample, of all before its last answer, and of that answer; what happens to rows above them."""

    max_length: int
    overlong: str = "truncate"
    max_input_length: int | None = None
    max_output_length: int | None = None

    def __str__(self) -> str:
        """For messages: the limits that are set, by the recipe's keys."""
        names = ("max_length", "max_input_length", "max_output_length")
        return ", ".join(f"train.{name} {getattr(self, name)}" for name in names if getattr(self, name) is not None)


@dataclass(frozen=True)
class Fitted:
    """What a row gives: its samples, those without an answer left out, and whether it was longer than a limit."""

    samples: list[Encoded]
    too_long: bool


def encode_within(
    limits: TokenLimits, encode: Callable[[Messages], Encoded], tokenizer: Any, messages: Messages
) -> Fitted:
    """Encode a chat within the limits; turns that cannot be trained in the same sample as the last have their own.

    A prompt above `max_input_length` first loses its oldest exchanges, then the end of its question; its system
    prompt and the template around it stay. An answer above `max_output_length` is cut, and is not taught to end there.
    """
    whole = encode(messages)
    before = Fitted([], False)
    if whole.apart:
        before = encode_within(limits, encode, tokenizer, turns_for(messages, whole.apart))
    sample = _within_input(encode, tokenizer, messages, whole, limits.max_input_length)
    if sample is not None and limits.max_output_length is not None:
        end = answer_begin(sample) + limits.max_output_length
        sample = Encoded(sample.tokens[:end], sample.labels[:end])
    too_long = sample is None or len(sample.tokens) < len(whole.tokens) or len(whole.tokens) > limits.max_length
    if sample is None or (too_long and limits.overlong == "drop"):
        return Fitted(before.samples, before.too_long or too_long)
    return Fitted([*before.samples, *_cut(sample, limits)], before.too_long or too_long)


def text_within(limits: TokenLimits, whole: Encoded) -> Fitted:
    """Plain text within `max_length`; the limits of questions and answers say nothing of it."""
    too_long = len(whole.tokens) > limits.max_length
    return Fitted([] if too_long and limits.overlong == "drop" else _cut(whole, limits), too_long)


def answer_begin(sample: Encoded) -> int:
    """The place of the first token of the last answer: how many tokens its prompt has."""
    place = len(sample.labels)
    while place and sample.labels[place - 1] == IGNORE_INDEX:
        place -= 1
    while place and sample.labels[place - 1] != IGNORE_INDEX:
        place -= 1
    return place


def loss_tokens(sample: Encoded) -> int:
    """Tokens with loss; the first has no token before it that it could be told from."""
    return sum(label != IGNORE_INDEX for label in sample.labels[1:])


def _within_input(
    encode: Callable[[Messages], Encoded], tokenizer: Any, messages: Messages, sample: Encoded, limit: int | None
) -> Encoded | None:
    """The chat with a prompt of at most `limit` tokens; None where not even an empty question would fit."""
    if limit is None:
        return sample
    first = 1 if messages[0]["role"] == "system" else 0
    while answer_begin(sample) > limit and (nexts := _users(messages[first + 1 :])):
        messages = [*messages[:first], *messages[first + 1 + nexts[0] :]]
        sample = encode(messages)
    asked = _users(messages)[-1]
    question = messages[asked]["content"]
    offsets = tokenizer(question, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    kept = len(offsets)
    while (over := answer_begin(sample) - limit) > 0:
        if kept == 0:
            return None
        kept = max(0, kept - over)
        shorter = {**messages[asked], "content": question[: offsets[kept - 1][1]] if kept else ""}
        sample = encode([*messages[:asked], shorter, *messages[asked + 1 :]])
    return sample


def _users(messages: Messages) -> list[int]:
    """The places of the user's turns: each begins an exchange."""
    return [place for place, turn in enumerate(messages) if turn["role"] == "user"]


def _cut(sample: Encoded, limits: TokenLimits) -> list[Encoded]:
    """Samples of at most `max_length` tokens."""
    size, length = limits.max_length, len(sample.tokens)
    ends = range(size, length + size, size) if limits.overlong == "split" else [size]
    parts = [Encoded(sample.tokens[end - size : end], sample.labels[end - size : end]) for end in ends]
    return [part for part in parts if loss_tokens(part)]
