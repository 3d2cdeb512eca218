"""What evalscope left, as numbers: per-row scores, their means, and how sure a difference is."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import StageError
from pipelines.evaluate.evalscope.job import ScoringJob
from pipelines.metrics.rouge import words

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


def read_scored(job: ScoringJob, references: Sequence[str]) -> Scored:
    """The answers and scores of a question-answering job, one per reference in order.

    StageError where an answer is missing or a metric was not computed.
    """
    rows = {row.index: row for row in _scored_rows(job)}
    missing = [index for index in range(len(references)) if index not in rows]
    if missing:
        raise StageError(f"{job.folder}: evalscope left no score for {len(missing)} of {len(references)} rows")
    ordered = [rows[index] for index in range(len(references))]
    for row, reference in zip(ordered, references, strict=True):
        if not row.values["Rouge-1-F"] and set(words(row.answer)) & set(words(reference)):
            # rouge-chinese's exceptions become zeros; a shared word with a score of zero is one of those
            where = f"{job.model}, row {row.index + 1}"
            raise StageError(f"{where}: evalscope could not compute ROUGE; see {job.folder}/logs")
    return Scored(
        answers=[row.answer for row in ordered],
        truncated=[row.stop_reason == "max_tokens" for row in ordered],
        values={ours: [float(row.values[theirs]) for row in ordered] for ours, theirs in METRICS.items()},
    )


@dataclass(frozen=True)
class BenchmarkScores:
    """One model's result in a benchmark of evalscope's own.

    `scores` are evalscope's, by metric; `values` the same per row, as far as a row has one; `unread` counts answers
    in which evalscope found no choice or result.
    """

    rows: int
    scores: dict[str, float]
    values: dict[str, dict[tuple[str, int], float]]
    unread: int


def read_benchmark(job: ScoringJob) -> BenchmarkScores:
    """The result of a complete job; StageError where a metric was not computed."""
    report = json.loads(Path(job.folder, "reports", job.model, f"{job.benchmark}.json").read_text(encoding="utf-8"))
    rows = sorted(_scored_rows(job), key=lambda row: (row.subset, row.index))  # they lie as they arrived
    if not rows:
        raise StageError(f"{job.folder}: evalscope scored no row; are there questions in the data set?")
    values: dict[str, dict[tuple[str, int], float]] = {}
    for row in rows:
        for name, value in row.values.items():
            values.setdefault(name, {})[row.subset, row.index] = float(value)
    return BenchmarkScores(
        rows=len(rows),
        scores={_metric_name(metric["identity"]): metric["score"] for metric in report["metrics"]},
        values=values,
        unread=sum(not row.extracted for row in rows),
    )


def _metric_name(identity: dict[str, Any]) -> str:
    aggregation = [] if identity["aggregation"] == "mean" else [identity["aggregation"]]
    return "-".join([identity["name"], *aggregation, *map(str, identity["dimensions"].values())])


@dataclass(frozen=True)
class _ScoredRow:
    """One row as evalscope left it."""

    subset: str
    index: int
    answer: str
    extracted: str
    stop_reason: str
    values: dict[str, float]


def _scored_rows(job: ScoringJob) -> Iterator[_ScoredRow]:
    """Every row that has both an answer and a score; StageError where either is an error in disguise."""
    outputs = {
        (file.stem, row["index"]): row["model_output"]["choices"][0]
        for file in job.predictions()
        for row in _rows(file)
    }
    for file in job.reviews():
        for review in _rows(file):
            output, score = outputs[file.stem, review["index"]], review["sample_score"]["score"]
            answer, where = _text(output["message"]["content"]), f"{job.model}, {file.stem} row {review['index'] + 1}"
            if output["stop_reason"] in ("model_length", "content_filter"):
                # evalscope takes the server's refusal for an answer
                raise StageError(f"{where}: the endpoint refused the question: {answer}")
            if (score["metadata"] or {}).get("metric_errors"):
                raise StageError(f"{where}: evalscope could not compute {score['metadata']['metric_errors']}")
            extracted = score["extracted_prediction"] or ""
            yield _ScoredRow(file.stem, review["index"], answer, extracted, output["stop_reason"], score["value"])


def _rows(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _text(content: Any) -> str:
    """The text of a message whose content is a string or a list of parts."""
    if isinstance(content, list):
        return "".join(part.get("text", "") for part in content)
    return content or ""
