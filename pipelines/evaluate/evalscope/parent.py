"""evalscope as a child process: what it is told, and how far it is."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict

from pipelines.artifacts.workspace import Place, to_json
from pipelines.direct_http import without_proxy
from pipelines.errors import StageError
from pipelines.evaluate.evalscope.datasets import Dataset
from pipelines.evaluate.evalscope.job import ScoringJob
from pipelines.kill_with_parent import PARENT, child_environment
from pipelines.progress import progress


def score(place: Place, jobs: list[ScoringJob], datasets: list[Dataset]) -> None:
    """Have evalscope ask and score what is missing, showing the answers as they arrive; StageError where it fails."""
    sizes = [len(dataset.questions) for dataset in datasets]
    total = sum(sizes) * len(jobs) // len(datasets) if all(sizes) else None
    done = sum(job.answered() for job in jobs)
    with progress("answers", total, "rows", done) as advance:

        def watch() -> None:
            nonlocal done
            now = sum(job.answered() for job in jobs)
            if now > done:
                advance(now - done)
                done = now

        _run(place, "pipelines.evaluate.evalscope.child", jobs, datasets, watch)


def list_prompts(place: Place, jobs: list[ScoringJob], datasets: list[Dataset]) -> None:
    """Have evalscope write what it would ask, each job to its own file; StageError where it fails."""
    _run(place, "pipelines.evaluate.evalscope.list_prompts", jobs, datasets, lambda: None)


def _run(place: Place, module: str, jobs: list[ScoringJob], datasets: list[Dataset], watch: Callable[[], None]) -> None:
    path, log = place.local("jobs.json"), place.local("evalscope.log")
    path.write_bytes(to_json([asdict(job) for job in jobs]))
    local = all(dataset.is_local for dataset in datasets)
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"} if local else {}
    environment = {
        **without_proxy(child_environment()),
        **offline,
        "TOKENIZERS_PARALLELISM": "false",
        PARENT: str(os.getpid()),
    }
    command = [sys.executable, "-P", "-m", module, str(path)]
    with open(log, "ab") as sink:
        process = subprocess.Popen(command, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL, env=environment)
        try:
            while process.poll() is None:
                time.sleep(0.3)
                watch()
            watch()
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        said = lines[-1].strip() if lines else "no message"
        raise StageError(f"evalscope stopped: {said}; its log: {log}. Run again to go on from here")
