"""The chat of a row as the recipe has it trained: its system prompt, its reasoning, and which answers have loss."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.artifacts.rows import is_plain_text
from pipelines.errors import DataError
from pipelines.llm.reasoning import split_reasoning
from pipelines.recipe.train import Train
from pipelines.train.loss_mask import has_loss, with_system
from pipelines.train.marked_chat import Turn


def chat_of(section: Train, messages: Sequence[Turn]) -> list[Turn]:
    """The messages as the section trains them; DataError where it asks for reasoning that an answer does not have."""
    chat = with_system(list(messages), section.system)
    if section.loss_on == "last_turn":
        last = max((place for place, turn in enumerate(chat) if turn["role"] == "assistant"), default=None)
        chat = [_without_loss(turn) if place != last else turn for place, turn in enumerate(chat)]
    if section.thinking == "strip":
        return [_without_reasoning(turn) for turn in chat]
    if section.thinking == "keep":
        _require_reasoning(chat)
    return chat


def require_plain_text(section: Train, row: Mapping[str, Any]) -> None:
    """DataError for a canonical row that is a chat where the section trains plain text alone."""
    if section.objective == "pretrain" and not is_plain_text(row):
        raise DataError(
            "train.objective: pretrain trains plain text, and this row is a chat; set objective: sft, or read the text "
            "by ingest.columns: {text: NAME}"
        )


def _without_loss(turn: Turn) -> Turn:
    return {**turn, "loss": False} if turn["role"] == "assistant" else turn


def _without_reasoning(turn: Turn) -> Turn:
    """An answer without what was thought, whether that stands in a field of its own or between tags."""
    if turn["role"] != "assistant":
        return turn
    bare = {name: value for name, value in turn.items() if name != "reasoning"}
    return {**bare, "content": split_reasoning(turn.get("content") or "")[1]}


def _require_reasoning(chat: Sequence[Turn]) -> None:
    for number, turn in enumerate(chat, 1):
        thought = turn.get("reasoning") or split_reasoning(turn.get("content") or "")[0]
        if has_loss(turn) and not thought.strip():
            raise DataError(
                f"train.thinking: keep needs reasoning, and turn {number}, an answer, has none; remove the row, give "
                "the turn loss: false, or set train.loss_on: last_turn or train.thinking: mask_empty"
            )
