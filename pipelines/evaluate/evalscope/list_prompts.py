"""What evalscope would ask, without asking it; like scoring, in a process of its own.

    python -m pipelines.evaluate.evalscope.list_prompts JOBS.json

JOBS.json is a list of `ScoringJob`s; each says where its prompts are to be written.
"""

import json
import sys
from pathlib import Path

from pipelines.evaluate.evalscope.child import own_caches, run_no_code_of_datasets, task_config
from pipelines.evaluate.evalscope.job import ScoringJob, read_jobs
from pipelines.kill_with_parent import die_with_parent


def write_prompts(job: ScoringJob) -> None:
    """Write the messages of every question of a job."""
    from evalscope.api.registry import get_benchmark  # not before the caches are set, which it reads when imported

    from pipelines.evaluate.evalscope.replay_model import plain  # imports evalscope too

    subsets = get_benchmark(job.benchmark, task_config(job, "none")).load_dataset()
    asked = (plain(sample.input) for samples in subsets.values() for sample in samples)
    Path(job.prompts).write_text("".join(json.dumps(m, ensure_ascii=False) + "\n" for m in asked), encoding="utf-8")


def main(path: Path) -> None:
    """Write the prompts of every job of the file at `path`."""
    die_with_parent()
    with own_caches(path.parent / "scratch"):
        run_no_code_of_datasets()
        for job in read_jobs(path):
            write_prompts(job)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
