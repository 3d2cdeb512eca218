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
from pipelines.errors import DataError, InputError, Problem
from pipelines.models.tokenizer import control_tokens, open_tokenizer, with_merged_system
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.train import Train, further_source, parse_data
from pipelines.sources.read import first_rows
from pipelines.train.loss_mask import Turn, encode, require_texts, with_system
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
        """A canonical row, with the system prompt of the section where it brings none."""
        row_id = str(row["row_id"])
        if is_plain_text(row):
            return cls(row_id, [], text=row["response"])
        return cls(row_id, with_system(turns_said(row), section.system), row.get("tools"))


def unproven(section: Train, ingest: Ingest | None, model: Path) -> list[Problem]:
    """Why masks of the section's rows cannot be proven with the model in a folder; nothing where they can.

    Empty questions and answers are passed over, since cleaning may remove them. Hubs are not asked for rows.
    """
    if find_spec("transformers") is None:
        return []
    tokenizer = open_tokenizer(model)
    tokenizer.chat_template = template_of(section, tokenizer) or tokenizer.chat_template
    control = control_tokens(tokenizer)
    for row in _first_rows(section, ingest):
        try:
            require_texts(row.chat)
        except DataError:
            continue
        encoder = partial(encode, tokenizer, control, tools=row.tools)
        try:
            encode_within(TokenLimits(section.max_length), encoder, tokenizer, row.chat)
        except DataError as error:
            message = str(error).removeprefix("train.model: ")
            where = f"; seen in row {row.row_id}" if row.row_id else ""
            return [Problem("train.model" if message != str(error) else "train.data", f"{message}{where}")]
    return []


def template_of(section: Train, tokenizer: Any) -> str | None:
    """The chat template that takes the place of the tokenizer's own; None where that stays."""
    if not section.merge_system:
        return section.chat_template
    own = tokenizer.chat_template
    return with_merged_system(section.chat_template or (own["default"] if isinstance(own, dict) else own or ""))


def _first_rows(section: Train, ingest: Ingest | None) -> Iterator[TrainingRow]:
    """The first chats of each source that lies in files here; an example where there are none."""
    found = False
    for item in section.data:
        source = further_source(section, ingest, parse_data(item)[0]) or ingest
        rows: list[dict[str, Any]] = []
        with suppress(InputError):  # what is wrong with the source, the stage that reads it says
            rows = first_rows(source, PROVEN_ROWS) if source else []
        for row in rows:
            if not is_plain_text(row):  # which has no mask to prove
                found = True
                yield TrainingRow.of(section, row)
    if not found:
        yield TrainingRow(None, with_system(EXAMPLE, section.system))


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
        return TrainingRow(None, with_system(EXAMPLE, section.system))
    if number >= len(rows):
        raise InputError(f"--row {number + 1}: there are {len(rows)} rows to train on")
    return TrainingRow.of(section, rows[number])
