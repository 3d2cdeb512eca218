"""Proof of masks before anything runs: the first rows that would be trained, through the model's own chat template."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.rows import is_plain_text, turns_said
from pipelines.artifacts.stage import Output
from pipelines.errors import DataError, InputError, Problem, RecipeError
from pipelines.models.tokenizer import (
    control_tokens,
    default_template,
    open_tokenizer,
    template_source,
    with_merged_system,
    with_template_arguments,
)
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.train import Train, further_source, parse_data
from pipelines.sources.read import first_rows
from pipelines.train.chats import chat_of, require_plain_text
from pipelines.train.ends import embedding_rows, require_embeddings
from pipelines.train.loss_mask import encode, require_texts, with_system
from pipelines.train.marked_chat import TEMPLATE_ERRORS, Turn, for_template
from pipelines.train.truncation import TokenLimits, encode_within

PROVEN_ROWS = 100
"""Rows of each source whose masks are proven before anything runs; the others are when they are tokenized."""

EXAMPLE: list[Turn] = [
    {"role": "user", "content": "你是谁？"},
    {"role": "assistant", "content": "我是一位老师。"},
    {"role": "user", "content": "What is 1 and 2?"},
    {"role": "assistant", "content": "It is 3."},
]
"""What is proven where no row can be read yet."""


THOUGHT = "one after the other"
"""Reasoning that shows whether a chat template writes any."""


@dataclass(frozen=True)
class TrainingRow:
    """A row as it is trained; without an id it is the example."""

    row_id: str | None
    chat: list[Turn]
    tools: str | None = None
    text: str | None = None
    """Plain text, which stands for itself; then there is no chat."""

    @classmethod
    def of(cls, section: Train, row: Mapping[str, Any]) -> "TrainingRow":
        """A canonical row as the section has it trained; DataError where it cannot be."""
        row_id = str(row["row_id"])
        require_plain_text(section, row)
        if is_plain_text(row):
            return cls(row_id, [], text=row["response"])
        return cls(row_id, chat_of(section, turns_said(row)), row.get("tools"))


def unproven(section: Train, ingest: Ingest | None, arguments: Mapping[str, Any], model: Path) -> list[Problem]:
    """Why masks of the section's rows cannot be proven with the model in a folder; nothing where they can.

    Empty questions and answers are passed over, since cleaning may remove them. Hubs are not asked for rows.
    """
    if find_spec("transformers") is None:
        return []
    tokenizer = open_tokenizer(model)
    try:
        tokenizer.chat_template = template_of(section, arguments, tokenizer) or tokenizer.chat_template
    except RecipeError as error:
        return error.problems
    if problem := unknown_thinking(section, tokenizer):
        return [problem]
    embeddings = embedding_rows(model)
    encoder = partial(encode, tokenizer, control_tokens(tokenizer), mask_empty=section.thinking == "mask_empty")
    for row in _first_rows(section, ingest):
        try:
            trained = TrainingRow.of(section, row) if row else _example(section)
            if trained.text is None and not _is_empty(trained.chat):
                limits = TokenLimits(section.max_length)
                fitted = encode_within(limits, partial(encoder, tools=trained.tools), tokenizer, trained.chat)
                require_embeddings(tokenizer, fitted.samples, embeddings)
        except DataError as error:
            key, _, message = str(error).partition(": ")
            if not key.startswith("train."):
                key, message = "train.data", str(error)
            where = f"; seen in row {row['row_id']}" if row else ""
            return [Problem(key, f"{message}{where}")]
    return []


def _is_empty(chat: list[Turn]) -> bool:
    try:
        require_texts(chat)
    except DataError:
        return True
    return False


def unknown_thinking(section: Train, tokenizer: Any) -> Problem | None:
    """Why the section's `thinking` cannot be had from the chat template; None where it can."""
    if section.thinking not in ("mask_empty", "keep") or "think>" in template_source(tokenizer):
        return None
    probe = [EXAMPLE[0], {**EXAMPLE[1], "reasoning": THOUGHT}]
    with suppress(*TEMPLATE_ERRORS):
        if THOUGHT in tokenizer.apply_chat_template(for_template(probe), tokenize=False):
            return None
    message = f"{section.thinking}: the model's chat template has no place for reasoning; leave the key out"
    return Problem("train.thinking", message)


def template_of(section: Train, arguments: Mapping[str, Any], tokenizer: Any) -> str | None:
    """The chat template that takes the place of the tokenizer's own; None where that stays.

    `arguments`: the recipe's `chat_template_kwargs`. RecipeError where the template reads no such variables.
    """
    if not section.merge_system and not arguments:
        return section.chat_template
    template = with_template_arguments(section.chat_template or default_template(tokenizer), arguments)
    return with_merged_system(template) if section.merge_system else template


def _first_rows(section: Train, ingest: Ingest | None) -> Iterator[dict[str, Any] | None]:
    """The first chats of each source that lies in files here; None, for an example, where there are none."""
    found = False
    for item in section.data:
        source = further_source(section, ingest, parse_data(item)[0]) or ingest
        rows: list[dict[str, Any]] = []
        with suppress(InputError):  # what is wrong with the source, the stage that reads it says
            rows = first_rows(source, PROVEN_ROWS) if source else []
        for row in rows:
            if not is_plain_text(row):  # which has no mask to prove
                found = True
                yield row
    if not found:
        yield None


def _example(section: Train) -> TrainingRow:
    if section.objective == "pretrain":
        return TrainingRow(None, [], text=EXAMPLE[1]["content"])
    return TrainingRow(None, with_system(EXAMPLE, section.system))


def row_at(section: Train, ingest: Ingest | None, split: Output[SplitReport] | None, number: int) -> TrainingRow:
    """A row to train on, counted from 0: of the finished split, else of the source as it is read.

    An example where neither is there; InputError where there are fewer rows.
    """
    rows: list[dict[str, Any]] = []
    if split is not None and split.is_complete:
        for path in split.paths(split.report.outputs.train):
            with split.folder.workspace.parquet_file(path) as file:
                for batch in file.iter_batches(PROVEN_ROWS):
                    rows += batch.to_pylist()
                    if len(rows) > number:
                        break
            if len(rows) > number:
                break
    elif ingest is not None:
        rows = first_rows(ingest, number + 1)
    if not rows:
        return _example(section)
    if number >= len(rows):
        raise InputError(f"--row {number + 1}: there are {len(rows)} rows to train on")
    return TrainingRow.of(section, rows[number])
