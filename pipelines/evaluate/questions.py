"""The held-out rows as questions: what every model is asked, and the answer a person gave."""

from dataclasses import dataclass
from typing import Any

from pipelines.errors import DataError
from pipelines.recipe import Recipe
from pipelines.records import messages_of
from pipelines.shards import read_tables
from pipelines.workspace import Place


@dataclass(frozen=True)
class Question:
    """One question: its chat up to the answer, and the reference answer, empty for a probe."""

    row_id: str
    messages: list[dict[str, str]]
    reference: str

    @property
    def query(self) -> str:
        """What the person asks in the last turn."""
        return self.messages[-1]["content"]


def held_out_questions(recipe: Recipe, place: Place, limit: int | None) -> list[Question]:
    """The first `limit` rows of the test split in data-set order.

    Rows without a system prompt get the one that training gave them, so that models are asked as they were taught.
    DataError where there are none, or where a row has nothing to ask or to compare with.
    """
    questions: list[Question] = []
    for table in read_tables(place.workspace, place.inputs["split"].outputs("test")):
        for row in table.to_pylist():
            if limit is not None and len(questions) == limit:
                return questions
            questions.append(_question(row, recipe))
    if not questions:
        raise DataError(f"{place.inputs['split'].path()}: the test split is empty; raise split.test_ratio")
    return questions


def probe_questions(recipe: Recipe, probes: list[str]) -> list[Question]:
    """Questions of the recipe itself, without a reference."""
    return [
        Question(f"probe-{index}", _with_system([_turn("user", probe)], recipe), "")
        for index, probe in enumerate(probes)
    ]


def _question(row: dict[str, Any], recipe: Recipe) -> Question:
    messages = messages_of(row)
    reference = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else ""
    row_id = str(row["row_id"])
    if not reference.strip():
        raise DataError(f"test row {row_id}: no reference answer; drop such rows with clean's text_length_filter")
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"test row {row_id}: no question before the answer")
    return Question(row_id, _with_system(messages, recipe), reference)


def _with_system(messages: list[dict[str, str]], recipe: Recipe) -> list[dict[str, str]]:
    system = recipe.train.system if recipe.train else None
    if system and messages[0]["role"] != "system":
        return [_turn("system", system), *messages]
    return messages


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
