"""Sweep: the fine-tuned model at a grid of sampling settings, since loops are how a small fine-tune fails."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.evaluate.ask import Answer, Request
from pipelines.evaluate.questions import Question
from pipelines.metrics.rouge import rouge_l_f
from pipelines.metrics.style import loops, repetition
from pipelines.recipe.base import Generation
from pipelines.recipe.evaluate import Compare

Setting = tuple[float, float]
"""Temperature and repetition penalty."""


def settings(section: Compare) -> list[Setting]:
    """Every point of the grid."""
    assert section.sweep
    return list(itertools.product(section.sweep.temperature, section.sweep.repetition_penalty))


def sweep_requests(section: Compare, model: str, questions: Sequence[Question], seed: int) -> list[Request]:
    """The questions at every setting; sampling follows from the recipe's seed."""
    return [
        Request(_key(setting, question), model, question.messages, _generation(section, setting, seed))
        for setting in settings(section)
        for question in questions
    ]


def sweep_result(section: Compare, questions: Sequence[Question], answers: Mapping[str, Answer]) -> dict[str, Any]:
    """Quality and loops at every setting, and which is recommended: see `recommended`."""
    rows = []
    for setting in settings(section):
        texts = [answers[_key(setting, question)].answer for question in questions]
        rows.append({"temperature": setting[0], "repetition_penalty": setting[1], **quality(texts, questions)})
    best = recommended(rows, section.max_loop_share)
    return {"rows": rows, "questions": len(questions), "recommended": best}


def quality(texts: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Means over answers to questions with references: ROUGE-L F1, share that loops, rep-4, characters."""
    scores = [rouge_l_f(text, question.reference) for text, question in zip(texts, questions, strict=True)]
    count = len(texts)
    return {
        "rouge-l-f": sum(scores) / count,
        "loop": sum(map(loops, texts)) / count,
        "rep-4": sum(repetition(text, 4) for text in texts) / count,
        "length": sum(map(len, texts)) / count,
    }


def recommended(rows: Sequence[dict[str, Any]], max_loop_share: float) -> dict[str, Any]:
    """The row of the best ROUGE-L F1 among those that loop no more than allowed; where all do, of the fewest loops."""
    calm = [row for row in rows if row["loop"] <= max_loop_share]
    if calm:
        return max(calm, key=lambda row: float(row["rouge-l-f"]))
    return min(rows, key=lambda row: (row["loop"], -row["rouge-l-f"]))


def recommendation(setting: Mapping[str, float]) -> str:
    """A sweep's recommendation as a command takes it: the sampling that the merged model gets for its own."""
    temperature, penalty = setting["temperature"], setting["repetition_penalty"]
    return f"'merge.generation={{temperature: {temperature:g}, repetition_penalty: {penalty:g}}}'"


def _generation(section: Compare, setting: Setting, seed: int) -> Generation:
    own_seed = section.generation.seed
    changed = {
        "temperature": setting[0],
        "repetition_penalty": setting[1],
        "seed": seed if own_seed is None else own_seed,
    }
    return section.generation.model_copy(update=changed)


def _key(setting: Setting, question: Question) -> str:
    return f"sweep/temperature={setting[0]:g}/repetition_penalty={setting[1]:g}/{question.row_id}"
