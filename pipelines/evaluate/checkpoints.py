"""Which checkpoint: every one that training kept, asked the same questions."""

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluate.ask import Answer, Request
from pipelines.evaluate.questions import Question
from pipelines.evaluate.sweep import quality, recommended
from pipelines.recipe.evaluate import Compare


def checkpoint_requests(section: Compare, names: Sequence[str], questions: Sequence[Question]) -> list[Request]:
    """The questions to every checkpoint, at the settings of the comparison."""
    return [
        Request(_key(name, question), name, question.messages, section.generation)
        for name in names
        for question in questions
    ]


def checkpoint_result(
    section: Compare, steps: Mapping[int, str], questions: Sequence[Question], answers: Mapping[str, Answer]
) -> dict[str, Any]:
    """Quality at every step, and which step is recommended, by the rule of `sweep.recommended`."""
    rows = [
        {"step": step, "model": name, **quality([answers[_key(name, q)].answer for q in questions], questions)}
        for step, name in steps.items()
    ]
    return {"rows": rows, "questions": len(questions), "recommended": recommended(rows, section.max_loop_share)}


def _key(model: str, question: Question) -> str:
    return f"{model}/{question.row_id}"
