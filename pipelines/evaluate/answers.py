"""Questions to models and the file in which their answers are kept, so that what is answered is not asked again."""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.recipe.base import Generation


@dataclass(frozen=True)
class EvaluationRequest:
    """One question to one model at given settings; `key` names it in the file of answers."""

    key: str
    model: str
    messages: list[dict[str, str]]
    generation: Generation


@dataclass(frozen=True)
class EvaluationAnswer:
    """What a model answered, and why it stopped: stop, or length where it hit its token limit."""

    key: str
    model: str
    query: str
    answer: str
    finish_reason: str
    reasoning: str = ""
    """What it thought before, apart from the answer."""


def kept_answers(file: Path) -> dict[str, EvaluationAnswer]:
    """The answers that earlier runs left in `file`, by key; of a torn last line nothing."""
    if not file.exists():
        return {}
    drop_torn_line(file)
    with open(file, encoding="utf-8") as lines:  # str.splitlines would cut an answer at U+2028
        answers = [EvaluationAnswer(**json.loads(line)) for line in lines]
    return {answer.key: answer for answer in answers}


def unanswered(requests: Sequence[EvaluationRequest], file: Path) -> list[EvaluationRequest]:
    """The requests whose answer is not in `file` yet."""
    kept = kept_answers(file)
    return [request for request in requests if request.key not in kept]


def key_of(model: str, messages: list[dict[str, str]]) -> str:
    """The name of a question to a model in a file of answers; the same question twice has one answer."""
    asked = [model, *([message["role"], message["content"]] for message in messages)]
    return hashlib.sha256(json.dumps(asked, ensure_ascii=False).encode()).hexdigest()


def drop_torn_line(path: Path) -> None:
    """Cut off what a killed process left of its last line, lest the next record be appended to it."""
    if path.exists():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(path, end)
