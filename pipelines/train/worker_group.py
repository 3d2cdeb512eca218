"""The group of training workers on Ray: what it needs, and going on when one of them is lost."""

import math
import os
import re
import shutil
import signal
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from pipelines import placement
from pipelines.artifacts.workspace import FULL
from pipelines.clean_up import clean_up
from pipelines.errors import INTERRUPTED, TERMINATED, DanluError, HardwareError, StageError
from pipelines.progress import say
from pipelines.recipe.train import Train, numbers_of_workers
from pipelines.train.checkpoint import step_of
from pipelines.train.journal import read_journal
from pipelines.train.memory import advice, free_memory, uses_gpu
from pipelines.train.nodes import begin_again, followed, on_this_node, saved_checkpoints
from pipelines.train.preemption import note_sigterm_in_worker, told_to_end, wait_until_gone
from pipelines.train.run import Preempted, Run, WorkerFacts

Loop = Callable[[Run, Callable[[], Any]], WorkerFacts | Preempted]
"""What each worker runs, as `train_loop` of loop.py."""

START_SECONDS = "300"
STOP_SECONDS = 30
_LOST_PEER = re.compile(
    r"gloo|NCCL|DistBackendError|DistNetworkError|DistStoreError|Connection (?:closed|reset) by peer|Broken pipe"
)
"""What a worker raises because another one is gone."""

_DISK_FULL = re.compile(r"No space left on device|Disk quota exceeded|PytorchStreamWriter failed writing file")
FREE_SECONDS = 60
"""How long resources that exist may be in use by something else; what ended just now is given back in that time."""


def check_resources(section: Train, *, patience: float = 0) -> None:
    """HardwareError where the cluster neither has nor gets what the fewest workers need, or does not have it free.

    A cluster that can grow is asked to, and waited for; one that lost nodes is waited for `patience` seconds.
    """
    fewest, each = numbers_of_workers(section)[-1], section.resources_per_worker
    wanted = f"training needs {fewest} worker{'s' if fewest > 1 else ''} of {dict(each)}"
    lower = (
        "lower train.num_workers or train.resources_per_worker" if fewest > 1 else "lower train.resources_per_worker"
    )
    bundles = [each] * fewest
    if lacking := placement.lacking_for_good(bundles, wanted, patience=patience):
        raise HardwareError(f"{wanted}; the cluster lacks {lacking}; {lower}, or add nodes")
    lacking = _lacking_after_a_wait(fewest, each)
    if lacking and placement.can_grow():
        lacking = placement.wait_for_growth(bundles, wanted, patience=patience)
    if lacking:
        raise HardwareError(f"{wanted}; something else on the cluster holds {lacking}; stop it, or {lower}")


def room_for(section: Train, *, patience: float = 0) -> int:
    """How many workers find room: all that the cluster could hold, or, after a wait, as many as it can; see above."""
    import ray

    library: Any = ray
    check_resources(section, patience=patience)
    each, there = section.resources_per_worker, library.cluster_resources()
    numbers = [number for number in numbers_of_workers(section) if not _lacking(number, each, there)]
    if not _lacking_after_a_wait(numbers[0], each):
        return numbers[0]
    free = library.available_resources()
    return next((number for number in numbers if not _lacking(number, each, free)), numbers[-1])


def _lacking_after_a_wait(workers: int, each: Mapping[str, float]) -> str:
    """What is still in use by something else when FREE_SECONDS are over; empty as soon as all of it is free."""
    import ray

    library: Any = ray
    deadline = time.monotonic() + FREE_SECONDS
    while (lacking := _lacking(workers, each, library.available_resources())) and time.monotonic() < deadline:
        time.sleep(0.5)
    return lacking


def memory_found(section: Train) -> int:
    """Free bytes for one worker, on a node of the cluster where one would run; HardwareError where a GPU is missing."""
    import ray

    library: Any = ray
    each = dict(section.resources_per_worker)
    nodes = max(1, placement.nodes_for(each))
    task = library.remote(num_cpus=each.pop("CPU", 1), num_gpus=each.pop("GPU", 0), resources=each)(free_memory)
    found: int | None = library.get(task.remote(math.ceil(section.num_workers / nodes), uses_gpu(section)))
    if found is None:
        raise HardwareError("train.zero_stage auto: nvidia-smi shows no GPU where workers run; give a number")
    return found


def run_workers(loop: Loop, run: Run) -> WorkerFacts:
    """Run the loop in every worker until it is done; returns what rank 0 returned.

    Where Ray says that a worker was lost, new ones go on from the last complete checkpoint, at most `max_failures`
    times, and only while there is progress; where workers were told to leave, they saved before, and that is no
    failure. Errors of our own that a worker raises are raised here as they were, and any other exception of the loop
    as StageError at once. SystemExit once all is saved where this process is told to end.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", START_SECONDS)
    from ray.train.v2.api.exceptions import TrainingFailedError

    failures = 0
    patience = 0
    if saved := _saved(run):
        say(f"  training: going on from step {saved}")
    with told_to_end(run.leave) as told:
        while True:
            begin_again(run)
            saved = _saved(run)
            if told.by is not None:
                word, code = ("stopped", INTERRUPTED) if told.by == signal.SIGINT else ("terminated", TERMINATED)
                say(f"{word}; training saved step {saved}, and the same command goes on from there")
                raise SystemExit(code)
            try:
                outcome = _attempt(loop, _as_wide_as_possible(run, patience))
            except TrainingFailedError as error:
                reached = max((entry["step"] for entry in read_journal(run.journal)), default=0)
                cause = _own(error, run) or _of_loop(error, reached)
                if cause is not None or failures >= run.section.max_failures or reached <= saved:
                    raise cause or StageError(f"training failed at step {reached}:\n{error}") from error
                failures += 1
                patience = placement.RETURN_SECONDS
                say(f"  training: a worker was lost at step {reached}; going on from the last checkpoint")
            else:
                if told.by is not None:
                    continue
                if isinstance(outcome, WorkerFacts):
                    return outcome
                say(f"  training: workers were told to leave; saved at step {outcome.step}")
                wait_until_gone(outcome.nodes)
                patience = placement.RETURN_SECONDS


def _saved(run: Run) -> int:
    """The step of the last complete checkpoint."""
    return max(map(step_of, saved_checkpoints(run)), default=0)


def _work(config: dict[str, Any]) -> WorkerFacts | Preempted:
    """What Ray Train runs in each worker."""
    from ray.train import get_preemption_info

    loop: Loop = config["loop"]
    with on_this_node(config["run"], config["attempt"]) as run:
        note_sigterm_in_worker(run.leave)
        return loop(run, get_preemption_info)


def _as_wide_as_possible(run: Run, patience: float) -> Run:
    """The run with as many workers as find room now; with fewer each has more to do, and the result is the same."""
    number = room_for(run.section, patience=patience)
    if number < run.section.num_workers:
        say(f"  training: {number} of {run.section.num_workers} workers find room")
    return replace(run, section=run.section.model_copy(update={"num_workers": number}))


def _attempt(loop: Loop, run: Run) -> WorkerFacts | Preempted:
    """One group of workers, under a name of its own: Ray keeps nothing that a crash could leave half-written."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.train.process_group import ReachableConfig  # torch stands behind it

    each = run.section.resources_per_worker
    use_gpu = each.get("GPU", 0) > 0
    attempts, name = run.folder / "attempts", uuid.uuid4().hex[:12]
    controllers: list[Any] = []

    class Trainer(TorchTrainer):
        def _register_sigint_handler(self, controller: Any) -> None:
            """Ray's handler would end this process without a word; Ctrl-C is for whoever called."""
            controllers.append(controller)

    trainer_class: Any = Trainer  # its types allow no return value; its documentation does
    failure_class: Any = FailureConfig  # typed as the one before Ray Train's second version
    trainer = trainer_class(
        _work,
        train_loop_config={"loop": loop, "run": run, "attempt": name},
        torch_config=ReachableConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=run.section.num_workers, use_gpu=use_gpu, resources_per_worker=dict(each)
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(attempts),
            failure_config=failure_class(max_failures=0, controller_failure_limit=2),
        ),
    )
    try:
        with followed(run):
            outcome: WorkerFacts | Preempted = trainer.fit().return_value
    except KeyboardInterrupt:
        for controller in controllers:
            clean_up("ending the training workers", partial(_abort, controller), STOP_SECONDS)
        raise
    finally:
        shutil.rmtree(attempts, ignore_errors=True)
    return outcome


def _abort(controller: Any) -> None:
    """Have Ray Train's controller end its workers and itself."""
    import ray

    with suppress(ray.exceptions.RayActorError):
        ray.get(controller.abort.remote())


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


def _of_loop(error: Exception, step: int) -> StageError | None:
    """What an exception that the loop itself raised ends training with; None where all follow from a lost worker."""
    from ray.exceptions import RayError
    from ray.train.v2._internal.exceptions import RayTrainError

    failures: dict[int, Exception] = getattr(error, "worker_failures", {})
    for failure in failures.values():
        if isinstance(failure, RayError | RayTrainError) or _LOST_PEER.search(f"{type(failure).__name__}: {failure}"):
            continue
        if _DISK_FULL.search(str(failure)) or getattr(failure, "errno", None) in FULL:
            return StageError(
                f"training: a disk is full at step {step} ({failure}); the checkpoints before it are kept. Free some "
                "space, or lower train.save_total_limit, and run again"
            )
        return StageError(f"training failed at step {step}:\n{error}")
    return None


def _lacking(workers: int, each: Mapping[str, float], there: Mapping[str, float]) -> str:
    """What `there` has too little of for so many workers, for people; empty where it is enough."""
    needed = {name: amount * workers for name, amount in each.items()}
    short = [(name, amount) for name, amount in needed.items() if amount > there.get(name, 0)]
    return ", ".join(f"{amount:g} {name} (there: {there.get(name, 0):g})" for name, amount in short)
