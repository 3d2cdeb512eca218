"""The fine-tuned model at a grid of sampling settings, and every checkpoint that training kept.

Loops are how a small fine-tune fails; another setting or an earlier checkpoint may be free of them.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import TypeVar

from pipelines.artifacts.reports.evaluate import (
    CheckpointQuality,
    CheckpointsResult,
    Quality,
    SettingQuality,
    SweepResult,
)
from pipelines.evaluate.answers import EvaluationAnswer, EvaluationRequest
from pipelines.evaluate.questions import Question
from pipelines.metrics.rouge import rouge_l_f
from pipelines.metrics.style import loops, repetition
from pipelines.recipe.base import Generation
from pipelines.recipe.evaluate import Sweep

Q = TypeVar("Q", bound=Quality)


def sweep_requests(
    sweep: Sweep, model: str, questions: Sequence[Question], generation: Generation, seed: int
) -> list[EvaluationRequest]:
    """The questions at every setting; `seed` is that of the sampling unless `generation` has its own."""
    seed = seed if generation.seed is None else generation.seed
    requests = []
    for temperature, penalty in _settings(sweep):
        changed = {"temperature": temperature, "repetition_penalty": penalty, "seed": seed}
        setting = generation.model_copy(update=changed)
        for question in questions:
            key = _setting_key(temperature, penalty, question)
            requests.append(EvaluationRequest(key, model, question.messages, setting))
    return requests


def sweep_result(
    sweep: Sweep, questions: Sequence[Question], answers: Mapping[str, EvaluationAnswer], max_loop_share: float
) -> SweepResult:
    """Quality and loops at every setting, and which is recommended: see `recommended`."""
    rows = []
    for temperature, penalty in _settings(sweep):
        texts = [answers[_setting_key(temperature, penalty, question)].answer for question in questions]
        means = quality(texts, questions)
        rows.append(SettingQuality(temperature=temperature, repetition_penalty=penalty, **means))
    return SweepResult(rows=rows, questions=len(questions), recommended=recommended(rows, max_loop_share))


def checkpoint_requests(
    names: Sequence[str], questions: Sequence[Question], generation: Generation
) -> list[EvaluationRequest]:
    """The questions to every checkpoint, by the names under which they are served."""
    return [
        EvaluationRequest(_checkpoint_key(name, question), name, question.messages, generation)
        for name in names
        for question in questions
    ]


def checkpoint_result(
    steps: Mapping[int, str],
    questions: Sequence[Question],
    answers: Mapping[str, EvaluationAnswer],
    max_loop_share: float,
) -> CheckpointsResult:
    """Quality at every step, and which step is recommended: see `recommended`."""
    rows = []
    for step, name in steps.items():
        texts = [answers[_checkpoint_key(name, question)].answer for question in questions]
        rows.append(CheckpointQuality(step=step, model=name, **quality(texts, questions)))
    return CheckpointsResult(rows=rows, questions=len(questions), recommended=recommended(rows, max_loop_share))


def quality(texts: Sequence[str], questions: Sequence[Question]) -> dict[str, float]:
    """Means over answers to questions with references, by the fields of `Quality`."""
    scores = [rouge_l_f(text, question.reference) for text, question in zip(texts, questions, strict=True)]
    count = len(texts)
    return {
        "rouge_l_f": sum(scores) / count,
        "loop": sum(map(loops, texts)) / count,
        "rep_4": sum(repetition(text, 4) for text in texts) / count,
        "length": sum(map(len, texts)) / count,
    }


def recommended(rows: Sequence[Q], max_loop_share: float) -> Q:
    """The row of the best ROUGE-L F1 among those that loop no more than allowed; where all do, of the fewest loops."""
    calm = [row for row in rows if row.loop <= max_loop_share]
    if calm:
        return max(calm, key=lambda row: row.rouge_l_f)
    return min(rows, key=lambda row: (row.loop, -row.rouge_l_f))


def recommendation(setting: SettingQuality) -> str:
    """A sweep's recommendation as a command takes it: the sampling that the merged model gets for its own."""
    temperature, penalty = setting.temperature, setting.repetition_penalty
    return f"'merge.generation={{temperature: {temperature:g}, repetition_penalty: {penalty:g}}}'"


def _settings(sweep: Sweep) -> list[tuple[float, float]]:
    """Temperature and repetition penalty at every point of the grid."""
    return list(itertools.product(sweep.temperature, sweep.repetition_penalty))


def _setting_key(temperature: float, penalty: float, question: Question) -> str:
    return f"sweep/temperature={temperature:g}/repetition_penalty={penalty:g}/{question.row_id}"


def _checkpoint_key(name: str, question: Question) -> str:
    return f"{name}/{question.row_id}"
