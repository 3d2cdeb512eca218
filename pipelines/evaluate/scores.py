"""What evalscope left, as numbers: per-row scores, their means, and how sure a difference is."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipelines.errors import StageError
from pipelines.evaluate.scoring import Job

METRICS = {
    **{f"rouge-{order}-{stat}": f"Rouge-{order.upper()}-{stat.upper()}" for order in "12l" for stat in "prf"},
    **{f"bleu-{order}": f"bleu-{order}" for order in range(1, 5)},
}
"""Our names of the metrics to evalscope's. p, r, f: precision, recall, F1."""

HEADLINE = "rouge-l-f"
"""F1 rather than evalscope's recall, which rewards long answers."""

HOW = {
    "rouge-1": "share of distinct words (jieba's) that answer and reference have in common; p of the answer's words, "
    "r of the reference's, f their harmonic mean (Lin 2004, rouge-chinese)",
    "rouge-2": "the same over pairs of adjacent words",
    "rouge-l": "the same over the longest common subsequence of words",
    "bleu-n": "share of the answer's word n-grams found in the reference, each at most as often as there, times "
    "exp(1 - reference/answer) for shorter answers; one order at a time, unsmoothed (Papineni 2002, nltk)",
}
"""How each metric is computed, for the report."""


@dataclass(frozen=True)
class Scored:
    """One model's answers to the questions in order, and evalscope's score of each under the names of `METRICS`."""

    answers: list[str]
    truncated: list[bool]
    values: dict[str, list[float]]

    @property
    def empty(self) -> int:
        """How many answers hold no text; they score zero."""
        return sum(not answer.strip() for answer in self.answers)


def read_scored(job: Job, references: Sequence[str]) -> Scored:
    """The answers and scores of a complete job; StageError where an answer is missing or a metric was not computed."""
    outputs = {row["index"]: row["model_output"]["choices"][0] for row in _rows(job.predictions)}
    scores = {row["index"]: row["sample_score"]["score"] for row in _rows(job.reviews)}
    missing = [index for index in range(len(references)) if index not in outputs or index not in scores]
    if missing:
        raise StageError(f"{job.folder}: evalscope left no score for {len(missing)} of {len(references)} rows")
    answers = []
    for index, reference in enumerate(references):
        answer = _text(outputs[index]["message"]["content"])
        _check(job, index, outputs[index]["stop_reason"], answer, reference, scores[index])
        answers.append(answer)
    order = range(len(references))
    return Scored(
        answers=answers,
        truncated=[outputs[index]["stop_reason"] == "max_tokens" for index in order],
        values={ours: [float(scores[i]["value"][theirs]) for i in order] for ours, theirs in METRICS.items()},
    )


def _rows(path: Any) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _text(content: Any) -> str:
    """The text of a message whose content is a string or a list of parts."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""


def _check(job: Job, index: int, stop_reason: str, answer: str, reference: str, score: dict[str, Any]) -> None:
    where = f"{job.model}, test row number {index + 1}"
    if stop_reason in ("model_length", "content_filter"):  # evalscope takes the server's refusal for an answer
        raise StageError(f"{where}: the endpoint refused the question: {answer}")
    errors = score["metadata"].get("metric_errors")
    if errors:
        raise StageError(f"{where}: evalscope could not compute {errors}")
    if not score["value"]["Rouge-1-F"] and _shares_a_word(answer, reference):
        # rouge-chinese's exceptions become zeros; a shared word with a score of zero is one of those
        raise StageError(f"{where}: evalscope could not compute ROUGE; see its log in {job.folder}/logs")


def _shares_a_word(answer: str, reference: str) -> bool:
    import jieba

    jieba.setLogLevel("WARNING")

    def words(text: str) -> set[str]:
        return set((" ".join(jieba.cut(text)) if re.search("[\u4e00-\u9fa5]", text) else text).split())

    return bool(words(answer) & words(reference))


@dataclass(frozen=True)
class Interval:
    """A difference of means and the 95 % interval that resampling the rows gives it."""

    value: float
    low: float
    high: float


def bootstrap(differences: Sequence[float], seed: int, resamples: int = 2000) -> Interval:
    """The mean of per-row differences with its percentile bootstrap interval (Efron 1979; Koehn 2004 for text)."""
    values = np.asarray(differences, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.concatenate(
        [values[rng.integers(0, len(values), (100, len(values)))].mean(axis=1) for _ in range(resamples // 100)]
    )
    low, high = np.quantile(means, [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))
