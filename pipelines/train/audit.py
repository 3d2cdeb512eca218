"""A row as it is trained, token by token, beside what a server sends for the same conversation: `danlu template`."""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from rich.table import Table
from rich.text import Text

from pipelines.models.tokenizer import control_tokens
from pipelines.recipe.train import Train
from pipelines.train.loss_mask import IGNORE_INDEX, Encoded, encode, encode_text, has_loss, require_texts, turns_for
from pipelines.train.marked_chat import Turn, for_template
from pipelines.train.proof import TrainingRow

PROMPT, CONTROL, LOSS, END, DIFFERENT = "dim", "cyan", "green", "bold green", "bold red"
"""Styles of tokens; every second token is underlined, so that one sees where they end."""


def audit(tokenizer: Any, section: Train, row: TrainingRow) -> Iterator[Text | Table]:
    """What is trained of a row, sample by sample, for a terminal; DataError where its mask cannot be proven."""
    control = control_tokens(tokenizer)
    yield Text.assemble(
        *(("prompt", PROMPT), "  ", ("control token", CONTROL), "  ", ("loss", LOSS), "  ", ("what ends a turn", END)),
        *("  ", ("differs", DIFFERENT), "  ⟦loss⟧  on a terminal every second token is underlined"),
    )
    if row.text is not None:
        sample = encode_text(tokenizer, control, row.text)
        yield Text(f"plain text: {_counts(section, sample)}", style="bold")
        yield _coloured(tokenizer, control, sample)
        return
    require_texts(row.chat)
    encoder = partial(encode, tokenizer, control, tools=row.tools, mask_empty=section.thinking == "mask_empty")
    parts = list(_parts(encoder, row.chat))
    for number, (turns, places, sample) in enumerate(parts, 1):
        yield Text(f"sample {number} of {len(parts)}: {_counts(section, sample)}", style="bold")
        table = Table(box=None, pad_edge=False, padding=(0, 2))
        for title in ("trained", "sent by a server, for each answer"):
            table.add_column(title, overflow="fold")
        told = [
            _told(tokenizer, control, place, sent_for(tokenizer, turns, place, row.tools), sample) for place in places
        ]
        table.add_row(_coloured(tokenizer, control, sample), Text("\n\n").join(told))
        yield table


def _counts(section: Train, sample: Encoded) -> str:
    with_loss = sum(label != IGNORE_INDEX for label in sample.labels)
    counts = f"{len(sample.tokens)} tokens, {with_loss} with loss"
    if len(sample.tokens) > section.max_length:
        counts += f"; train.max_length {section.max_length} is less: {section.overlong}"
    return counts


def sent_for(tokenizer: Any, turns: Sequence[Turn], place: int, tools: str | None = None) -> list[int]:
    """The tokens that a server sends to the model for the answer at a place: the turns before it, by the template."""
    sent = tokenizer.apply_chat_template(
        for_template(turns[:place]),
        tools=json.loads(tools) if tools else None,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
    )
    tokens: list[int] = sent["input_ids"]
    return tokens


def _parts(
    encoder: Callable[[Sequence[Turn]], Encoded], chat: Sequence[Turn]
) -> Iterator[tuple[Sequence[Turn], list[int], Encoded]]:
    """The samples of a chat, with the places of the turns that are trained in each."""
    sample = encoder(chat)
    if sample.apart:
        yield from _parts(encoder, turns_for(chat, sample.apart))
    yield chat, [n for n, turn in enumerate(chat) if has_loss(turn) and n not in sample.apart], sample


def _told(tokenizer: Any, control: "re.Pattern[str]", place: int, sent: list[int], sample: Encoded) -> Text:
    """The server's tokens for one answer, and whether training has the same before what has loss."""
    has_loss_here = [label != IGNORE_INDEX for label in sample.labels]
    pairs = zip(sent, sample.tokens, strict=False)
    same = next((n for n, (one, other) in enumerate(pairs) if one != other), None)
    if same is None and (len(sent) > len(sample.tokens) or has_loss_here[len(sent) - 1]):
        same = len(sent) - 1  # what a server sends would be trained
    text = Text.assemble((f"turn {place + 1}: ", "bold"))
    if same is None:
        before = has_loss_here[len(sent) :].index(True)
        more = f", then {before} of the template's without loss" if before else ""
        text.append(f"{len(sent)} tokens, the same as trained{more}\n", style=LOSS)
    else:
        wanted, got = (repr(tokenizer.decode(ids[same : same + 5])) for ids in (sample.tokens, sent))
        text.append(f"token {same + 1} differs: trained {wanted}, sent {got}\n", style=DIFFERENT)
    shown = sent if same is None else sent[:same]
    text.append_text(
        _tokens(tokenizer, [(ids, _style(tokenizer, control, ids, PROMPT)) for ids in _whole(tokenizer, shown)])
    )
    if same is not None:
        text.append_text(_tokens(tokenizer, [(ids, DIFFERENT) for ids in _whole(tokenizer, sent[same:])]))
    return text


def _coloured(tokenizer: Any, control: "re.Pattern[str]", sample: Encoded) -> Text:
    """The sample's text: what has loss in brackets, control tokens and ends in colours of their own."""
    text = Text()
    begin = 0
    bounds = [n for n in range(1, len(sample.labels)) if _differ(sample.labels[n - 1], sample.labels[n])]
    for end in [*bounds, len(sample.tokens)]:
        has_loss_here = sample.labels[begin] != IGNORE_INDEX
        pieces = _whole(tokenizer, sample.tokens[begin:end])
        base = LOSS if has_loss_here else PROMPT
        part = _tokens(tokenizer, [(ids, _style(tokenizer, control, ids, base)) for ids in pieces])
        text.append_text(Text.assemble(("⟦", base), part, ("⟧", base)) if has_loss_here else part)
        begin = end
    return text


def _differ(one: int, other: int) -> bool:
    return (one == IGNORE_INDEX) != (other == IGNORE_INDEX)


def _style(tokenizer: Any, control: "re.Pattern[str]", ids: list[int], base: str) -> str:
    if control.fullmatch(tokenizer.decode(ids)):
        return END if base == LOSS else CONTROL
    return base


def _whole(tokenizer: Any, tokens: Sequence[int]) -> Iterator[list[int]]:
    """Tokens one by one; those that are parts of one character together."""
    held: list[int] = []
    for token in tokens:
        held.append(token)
        if not tokenizer.decode(held).endswith("\ufffd") or len(held) == 4:
            yield held
            held = []
    if held:
        yield held


def _tokens(tokenizer: Any, pieces: Sequence[tuple[list[int], str]]) -> Text:
    text = Text()
    for number, (ids, style) in enumerate(pieces):
        said = _said(tokenizer, ids).replace("\n", "⏎\n")
        text.append(said, style=f"{style} underline" if number % 2 else style)
    return text


def _said(tokenizer: Any, ids: list[int]) -> str:
    """A token's text with the space before it, which decoding takes away from the first."""
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    first: str = tokenizer.convert_ids_to_tokens(ids[0])
    return f" {text}" if first.startswith("▁") and not text.startswith(" ") else text
