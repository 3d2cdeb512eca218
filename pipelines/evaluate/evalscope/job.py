"""What evalscope is told: jobs, written by the parent to a file that its children read."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class ScoringJob:
    """One data set asked of one model.

    `folder` is evalscope's work folder, `benchmark` and `arguments` evalscope's name of the data set and what it needs
    to know about it, `limit` the most rows of a subset, `generation` sampling parameters by OpenAI's names, `timeout`
    the seconds one answer may take, `prompts` where the messages of its questions are listed, a JSON list a line, and
    `answers` a file of `EvaluationAnswer`s: where there is one, answers are taken from it and nothing is asked.
    """

    model: str
    url: str
    folder: str
    benchmark: str
    arguments: dict[str, Any]
    limit: int | None
    generation: dict[str, Any]
    eval_batch_size: int
    timeout: float
    prompts: str
    answers: str | None = None

    def predictions(self) -> list[Path]:
        """Evalscope's files of answers, one JSON object a line, a file for each subset."""
        return sorted(Path(self.folder, "predictions", self.model).glob("*.jsonl"))

    def reviews(self) -> list[Path]:
        """Evalscope's files of scores, one JSON object a line, a file for each subset."""
        return sorted(Path(self.folder, "reviews", self.model).glob("*.jsonl"))

    def answered(self) -> int:
        """How many answers are on disk, complete lines only."""
        return sum(file.read_bytes().count(b"\n") for file in self.predictions())


def read_jobs(path: Path) -> list[ScoringJob]:
    """The jobs that the parent wrote to `path`."""
    return [ScoringJob(**job) for job in json.loads(path.read_text(encoding="utf-8"))]
