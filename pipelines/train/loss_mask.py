"""Chats to tokens and labels, by the model's own chat template: loss on what the assistant writes, and proof of it.

A turn is trained as inference asks for it. Its prompt is the rendering of the turns before it with the generation
prompt, tokenized by itself, because that is what a server sends. The loss begins where the prompt ends, and ends with
the control tokens that end the turn. Marks in the texts, characters that no text has, tell where the template put them.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from pipelines.errors import DataError
from pipelines.train.marked_chat import OWN_TEMPLATE, MarkedChat, Turn, broken_up, unused

IGNORE_INDEX = -100
"""Label of a token without loss, as PyTorch's cross entropy has it."""


@dataclass(frozen=True)
class Encoded:
    """One chat: `tokens`, and `labels` of equal length, each the token itself or IGNORE_INDEX."""

    tokens: list[int]
    labels: list[int]
    apart: tuple[int, ...] = ()
    """Places of assistant's turns without loss here, because inference sends another prompt for them than stands
    here, or ends them otherwise: templates that leave thoughts out of the history do that."""


def with_system(messages: list[Turn], system: str | None) -> list[Turn]:
    """The messages with a system prompt before them, where they bring none."""
    if system is None or (messages and messages[0]["role"] == "system"):
        return messages
    return [{"role": "system", "content": system}, *messages]


def require_texts(messages: Sequence[Turn]) -> None:
    """DataError for an empty question or answer, which no one asks or gives."""
    if not any(turn["role"] == "user" for turn in messages):
        raise DataError("it has no question; remove the row, or clean with text_length_filter: {min_len: 1}")
    for number, turn in enumerate(messages, 1):
        if turn["role"] in ("user", "assistant") and not _content(turn).strip() and not turn.get("tool_calls"):
            what = "question" if turn["role"] == "user" else "answer"
            raise DataError(f"turn {number}, {what}, is empty; remove the row, or the turn with its neighbour")


def turns_for(messages: Sequence[Turn], places: Sequence[int]) -> list[Turn]:
    """The chat up to the last of some assistant's turns, with loss on those alone."""
    return [
        turn if turn["role"] != "assistant" or place in places else {**turn, "loss": False}
        for place, turn in enumerate(messages[: places[-1] + 1])
    ]


def encode(
    tokenizer: Any,
    control: "re.Pattern[str]",
    messages: Sequence[Turn],
    tools: str | None = None,
    mask_empty: bool = False,
) -> Encoded:
    """One chat as the model's template renders it, up to the last turn that has loss.

    Loss is on the assistant's turns but those whose `loss` is false. A control token that stands in a text stays text.
    `tools` is JSON, as a row has it. `mask_empty`: what the template writes before the text of an answer without
    reasoning has no loss, be it an empty thought or the name of another channel than that of thoughts. DataError where
    the mask cannot be proven: where a template leaves a text out or changes it, or renders the turns before an answer
    differently once it is there.
    """
    _require_template(tokenizer)
    messages = [_thought_apart(turn, control) for turn in messages]
    trained = [place for place, turn in enumerate(messages) if has_loss(turn)]
    if not trained:
        return Encoded([], [])
    if trained[0] == 0:
        raise DataError("turn 1 is an answer that nobody asked for; remove the turn, or give it loss: false")
    *earlier, last = trained
    whole = _encode_turn(tokenizer, control, messages[: last + 1], tools, mask_empty)
    labels = [IGNORE_INDEX] * len(whole.tokens)
    labels[whole.begin : whole.end] = whole.tokens[whole.begin : whole.end]
    apart = []
    for place in earlier:
        alone = _encode_turn(tokenizer, control, messages[: place + 1], tools, mask_empty)
        if _stands_in(tokenizer, control, alone, whole):
            labels[alone.begin : alone.end] = whole.tokens[alone.begin : alone.end]
        else:
            apart.append(place)
    return Encoded(whole.tokens, labels, tuple(apart))


def encode_text(tokenizer: Any, control: "re.Pattern[str]", text: str) -> Encoded:
    """Plain text with the end-of-sequence token after it, and loss on all of it; a control token in it stays text."""
    gap = next(unused([{"content": text}], None))
    broken = broken_up(text, control, gap)
    tokens, spans = _tokenize(tokenizer, broken, gap)
    _require_text(tokenizer, control, tokens, broken, spans)
    _require_end(tokenizer, "plain text")
    tokens.append(tokenizer.eos_token_id)
    return Encoded(tokens, tokens)


@dataclass(frozen=True)
class AnsweredTurn:
    """A chat up to one answer: its tokens, the first `prompt` of which a server would send, and where loss is."""

    tokens: list[int]
    prompt: int
    begin: int
    end: int
    ended_by_us: bool
    """Whether its last token with loss is the tokenizer's end of sequence, because the template writes none."""


def has_loss(turn: Turn) -> bool:
    return turn["role"] == "assistant" and turn.get("loss") is not False


def _content(turn: Turn) -> str:
    """What a turn says; one that calls tools may say nothing."""
    return turn.get("content") or ""


def _require_end(tokenizer: Any, what: str) -> None:
    if tokenizer.eos_token is None:
        raise DataError(
            f"train.model: nothing ends {what}, and its tokenizer has no eos_token; write one into its "
            "tokenizer_config.json, or give a train.chat_template that ends answers"
        )


def _require_template(tokenizer: Any) -> None:
    if tokenizer.chat_template is None:
        raise DataError(
            "train.model: its tokenizer has no chat template; "
            "use an instruction-tuned model, or give train.chat_template"
        )
    if not tokenizer.is_fast:
        raise DataError(
            "train.model: its tokenizer does not say where in a text its tokens stand, so no mask can be proven; "
            "give a folder with tokenizer.json"
        )


def _thought_apart(turn: Turn, control: "re.Pattern[str]") -> Turn:
    """An answer that begins with `<think>…</think>` as answer and reasoning, where these are control tokens.

    Else the tags would be broken up as any control token in a text.
    """
    if turn["role"] != "assistant" or turn.get("reasoning") or not control.fullmatch("</think>"):
        return turn
    found = re.fullmatch(r"\s*(?:<think>)?(.*?)</think>\s*(.*)", _content(turn), re.DOTALL)
    if found is None or not _content(turn).lstrip().startswith("<think>"):
        return turn
    return {**turn, "content": found[2], "reasoning": found[1].strip("\n")}


def _stands_in(tokenizer: Any, control: "re.Pattern[str]", alone: AnsweredTurn, whole: AnsweredTurn) -> bool:
    """Whether a longer chat has the tokens of a turn and its prompt, so that it can be trained there.

    Where the template writes no end, the control token that follows at once ends the turn: GLM's models end theirs with
    the next role.
    """
    end = alone.end - alone.ended_by_us
    if whole.tokens[:end] != alone.tokens[:end]:
        return False
    return not alone.ended_by_us or bool(control.fullmatch(tokenizer.convert_ids_to_tokens(whole.tokens[end])))


def _encode_turn(
    tokenizer: Any, control: "re.Pattern[str]", messages: Sequence[Turn], tools: str | None, mask_empty: bool
) -> AnsweredTurn:
    """A chat up to its last turn, an answer, with loss on it; DataError where the mask cannot be proven."""
    chat = MarkedChat.of(tokenizer, control, messages, tools)
    chat.require_tools()
    prompt = chat.prompt()
    text, spots = chat.answered(prompt)
    begin, spoken = len(prompt), spots[len(messages) - 1]
    end = _end_of_turn(tokenizer, control, messages[-1], text, max([begin, *(stop for _, stop in spoken)]))
    ended_by_us = end is None
    if end is None:
        _require_end(tokenizer, "an answer")
        text += tokenizer.eos_token
        end = len(text)
    if any(start < begin for start, _ in spoken) or any(
        stop > begin for place, others in spots.items() if place != len(messages) - 1 for _, stop in others
    ):
        raise DataError(f"train.model: its chat template mixes an answer with the turns before it; {OWN_TEMPLATE}")
    prompt_tokens, prompt_spans = _tokenize(tokenizer, prompt, chat.gap)
    tokens, spans = _tokenize(tokenizer, text, chat.gap)
    count = len(prompt_tokens)
    if tokens[:count] != prompt_tokens or count == len(tokens) or spans[count][0] < begin:
        # the tokenizer would join the prompt's end with the answer's beginning, which a server cannot
        rest, places = _tokenize(tokenizer, text[begin:], chat.gap, continued=True)
        tokens = prompt_tokens + rest
        spans = prompt_spans + [(begin + start, begin + stop) for start, stop in places]
    _require_text(tokenizer, control, tokens, text, spans)
    tagged = chat.tagged(text, begin, spoken)
    if mask_empty and not messages[-1].get("reasoning"):
        tagged = max(tagged, _after_empty_thought(text, begin, spoken))
    first = next((number for number in range(count, len(tokens)) if spans[number][1] > tagged), count)
    last = next((number for number in range(first, len(tokens)) if spans[number][0] >= end), len(tokens))
    _prove(tokenizer, tokens[first:last], text[max(begin, spans[first][0]) : end].replace(chat.gap, ""))
    return AnsweredTurn(tokens, count, first, last, ended_by_us)


def _end_of_turn(tokenizer: Any, control: "re.Pattern[str]", turn: Turn, text: str, spoken: int) -> int | None:
    """Where the control tokens that end the turn end, after its texts, which end at `spoken`; None without any.

    Those that follow each other without a gap count as one end, as Command-R's. What closes a tool call ends no turn.
    """
    found = [m for m in control.finditer(text, spoken) if m[0] == tokenizer.eos_token or not m[0].startswith("</")]
    if not found:
        return None
    if turn.get("tool_calls"):  # which have control tokens of their own; GLM's models end the turn with none
        last = found[-1].end()
        return None if text[last:].strip() else last
    end = found[0].end()
    for match in found[1:]:
        if match.start() == end:
            end = match.end()
    return end


def _tokenize(tokenizer: Any, text: str, gap: str, continued: bool = False) -> tuple[list[int], list[tuple[int, int]]]:
    """Tokens of a text, cut at the gaps, and where in it each begins and ends.

    `continued`: the text goes on from another, so that no space is put before it, as SentencePiece does.
    """
    tokens: list[int] = []
    spans: list[tuple[int, int]] = []
    begin = 0
    for number, piece in enumerate(text.split(gap)):
        anchor = "\n" if (number or continued) and _prefixes(tokenizer) else ""
        encoded = tokenizer(anchor + piece, add_special_tokens=False, return_offsets_mapping=True)
        for token, (start, stop) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
            if not anchor or stop > len(anchor):
                tokens.append(token)
                spans.append((begin + max(0, start - len(anchor)), begin + stop - len(anchor)))
        begin += len(piece) + len(gap)
    return tokens, spans


def _after_empty_thought(text: str, begin: int, spoken: Sequence[tuple[int, int]]) -> int:
    """Where an answer that begins at `begin` goes on after the thought that it does not have.

    Where it says nothing, and calls tools instead, that is after the end of the thought.
    """
    if spoken:
        return min(start for start, _ in spoken)
    found = re.compile(r"\s*(?:<think>)?\s*</think>\s*").match(text, begin)
    return found.end() if found else begin


def _prefixes(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a space before each text."""
    first = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False)["input_ids"])[0]
    return bool(first.startswith("▁"))


def _require_text(
    tokenizer: Any, control: "re.Pattern[str]", tokens: list[int], text: str, spans: list[tuple[int, int]]
) -> None:
    """DataError where a text becomes a control token that it does not spell, as a tokenizer that normalizes does."""
    names = _control_names(tokenizer, control)
    for token, (start, stop) in zip(tokens, spans, strict=True):
        if token in names and not control.fullmatch(said := text[start:stop].strip()):
            raise DataError(f"the tokenizer reads its text {said!r} as {names[token]}; remove that from the row")


@lru_cache(maxsize=1)
def _control_names(tokenizer: Any, control: "re.Pattern[str]") -> dict[int, str]:
    """The control tokens by their numbers."""
    names = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
    names |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    return {number: name for number, name in names.items() if control.fullmatch(name)}


def _prove(tokenizer: Any, tokens: list[int], expected: str) -> None:
    """DataError unless the tokens with loss say what was expected, as far as the tokenizer can say it."""

    def said(ids: list[int]) -> str:
        return unicodedata.normalize("NFKC", tokenizer.decode(ids, clean_up_tokenization_spaces=False)).strip()

    decoded = said(tokens)
    if decoded == unicodedata.normalize("NFKC", expected).strip():
        return
    if decoded != said(tokenizer(expected, add_special_tokens=False)["input_ids"]):
        raise DataError(f"its mask cannot be proven: loss would be on {decoded!r}, and the answer is {expected!r}")
