"""The group of training workers on Ray: what it needs, and going on when one of them is lost."""

import math
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from itertools import count
from typing import Any

from pipelines.errors import DanluError, HardwareError, StageError
from pipelines.progress import say
from pipelines.train.checkpoint import complete_checkpoints, step_of
from pipelines.train.journal import read_journal
from pipelines.train.loop import train_loop
from pipelines.train.memory import advice, free_memory, uses_gpu
from pipelines.train.run import Run
from pipelines.train.section import Train

START_SECONDS = "300"
FREE_SECONDS = 60
"""How long resources that exist may be in use by something else; what ended just now is given back in that time."""


def check_resources(workers: int, each: Mapping[str, float]) -> None:
    """HardwareError where the cluster does not have what all workers need, or where it does not become free."""
    import ray

    library: Any = ray
    needed = {name: amount * workers for name, amount in each.items()}
    there = library.cluster_resources()
    if lacking := _lacking(needed, there):
        raise HardwareError(
            f"training needs {workers} workers of {dict(each)}; the cluster lacks {lacking}; "
            "lower train.num_workers or train.resources_per_worker, or add nodes"
        )
    deadline = time.monotonic() + FREE_SECONDS
    while lacking := _lacking(needed, library.available_resources()):
        if time.monotonic() > deadline:
            raise HardwareError(
                f"training needs {workers} workers of {dict(each)}; something else on the cluster holds {lacking}; "
                "stop it, or lower train.num_workers or train.resources_per_worker"
            )
        time.sleep(0.5)


def memory_found(section: Train) -> int:
    """Free bytes for one worker, on a node of the cluster where one would run; HardwareError where a GPU is missing."""
    import ray

    library: Any = ray
    each = dict(section.resources_per_worker)
    nodes = sum(node["Alive"] for node in library.nodes())
    task = library.remote(num_cpus=each.pop("CPU", 1), num_gpus=each.pop("GPU", 0), resources=each)(free_memory)
    found: int | None = library.get(task.remote(math.ceil(section.num_workers / nodes), uses_gpu(section)))
    if found is None:
        raise HardwareError("train.zero_stage auto: nvidia-smi shows no GPU where workers run; give a number")
    return found


def fit(run: Run) -> dict[str, Any]:
    """Run the workers until they are done; returns what rank 0 returned.

    Where a worker is lost, new ones go on from the last complete checkpoint, at most `max_failures` times, and only
    while there is progress. Errors of our own that a worker raises are raised here as they were.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_SECONDS)
    from ray.train.v2.api.exceptions import TrainingFailedError

    for failures in count():
        saved = max(map(step_of, complete_checkpoints(run.checkpoints)), default=0)
        try:
            return _attempt(run)
        except TrainingFailedError as error:
            cause = _own(error, run)
            reached = max((entry["step"] for entry in read_journal(run.journal)), default=0)
            if cause is not None or failures >= run.section.max_failures or reached <= saved:
                raise cause or StageError(f"training failed at step {reached}:\n{error}") from error
            say(f"  training: a worker was lost at step {reached}; going on from the last checkpoint")
    raise AssertionError("count() ended")


def _attempt(run: Run) -> dict[str, Any]:
    """One group of workers, under a name of its own: Ray keeps nothing that a crash could leave half-written."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    each = run.section.resources_per_worker
    use_gpu = each.get("GPU", 0) > 0
    attempts = run.folder / "attempts"
    trainer_class: Any = TorchTrainer  # its types allow no return value; its documentation does
    failure_class: Any = FailureConfig  # typed as the one before Ray Train's second version
    trainer = trainer_class(
        train_loop,
        train_loop_config={"run": run},
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=run.section.num_workers, use_gpu=use_gpu, resources_per_worker=dict(each)
        ),
        run_config=RunConfig(
            name=uuid.uuid4().hex[:12],
            storage_path=str(attempts),
            failure_config=failure_class(max_failures=0, controller_failure_limit=2),
        ),
    )
    try:
        facts: dict[str, Any] = trainer.fit().return_value
    finally:
        shutil.rmtree(attempts, ignore_errors=True)
    return facts


def _own(error: Exception, run: Run) -> DanluError | None:
    """The first error of our family among what the workers raised, or that Ray ended one to save its node's memory."""
    from ray.exceptions import OutOfMemoryError

    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        cause: BaseException | None = failure
        while cause is not None:
            if isinstance(cause, DanluError):
                return cause
            if isinstance(cause, OutOfMemoryError):
                return StageError(f"training: a node's main memory ran out; {advice(run.section)}, or add memory")
            cause = getattr(cause, "cause", None) or cause.__cause__
    return None


def _lacking(needed: Mapping[str, float], there: Mapping[str, float]) -> str:
    """What `there` has too little of, for people; empty where it is enough."""
    short = [(name, amount) for name, amount in needed.items() if amount > there.get(name, 0)]
    return ", ".join(f"{amount:g} {name} (there: {there.get(name, 0):g})" for name, amount in short)
