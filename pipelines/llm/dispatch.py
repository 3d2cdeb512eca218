"""Dispatch: send the requests that the ledger has no answer to, and wait until each has its record.

Requests are sent by plain Ray actors that fetch their work, not by Ray Data: a block that is handed to a Ray Data actor
leaves it idle at its end until the slowest request is back, answers would wait in a block before they are on disk,
and a budget or a rate that the whole cluster shares has no place there.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pydantic import SecretStr

from pipelines.artifacts.rows import is_text
from pipelines.artifacts.workspace import Workspace
from pipelines.clean_up import clean_up
from pipelines.errors import DanluError, Problem, RecipeError, StageError
from pipelines.llm.coordinator import Coordinator, RunProgress
from pipelines.llm.ledger import LedgerIndex, LedgerRecord, LedgerWriter, RecordKind, read_index, read_payloads
from pipelines.llm.requests import ChatRequest, RequestSource
from pipelines.progress import say, steady_line
from pipelines.recipe.llm import ModelRequests

Positions = np.ndarray[Any, np.dtype[np.int64]]

CHUNK = 8192
"""Positions whose keys are looked up together."""
RESTARTS = 3
"""Workers that may die, on a lost machine for example, before the run stops."""
POLL_SECONDS = 0.5
STOP_SECONDS = 15
"""What Ray may take to end the actors."""


@dataclass
class LedgerState:
    """What the ledger knows of requests: positions without a record, those that failed, and the tokens paid for."""

    pending: Positions
    failed: Positions
    tokens: tuple[int, int] = (0, 0)


def look_up(workspace: Workspace, source: RequestSource) -> LedgerState:
    """Look requests up in the ledger; reads keys only, and holds the keys of one chunk at a time."""
    index = read_index(workspace)
    state = LedgerState(np.empty(0, np.int64), np.empty(0, np.int64))
    for positions, keys in _keys(source):
        kinds = index.kinds(keys)
        state.pending = np.concatenate([state.pending, positions[kinds == 0]])
        state.failed = np.concatenate([state.failed, positions[kinds == RecordKind.FAILURE]])
        read, written = index.tokens(keys)
        state.tokens = (state.tokens[0] + read, state.tokens[1] + written)
    return state


def has_every_record(workspace: Workspace, source: RequestSource) -> bool:
    """Whether the ledger has a record of every position."""
    index = read_index(workspace)
    return all((index.kinds(keys) != 0).all() for _, keys in _keys(source))


def _keys(source: RequestSource) -> Iterator[tuple[Positions, list[bytes]]]:
    for start in range(0, source.size, CHUNK):
        positions = list(source.positions(start, min(start + CHUNK, source.size)))
        yield np.array(positions, np.int64), [source.request(pos).key for pos in positions]


def missing_keys(section: ModelRequests, section_key: str) -> list[Problem]:
    """A problem for each endpoint whose key's environment variable is not set."""
    return [
        Problem(f"{section_key}.endpoints[{number}].api_key_env", f"the environment variable {name} is not set")
        for number, name in enumerate(endpoint.api_key_env for endpoint in section.endpoints)
        if name and not os.environ.get(name)
    ]


def read_keys(section: ModelRequests, section_key: str) -> list[SecretStr | None]:
    """Each endpoint's key from its environment variable; RecipeError naming all that are not set."""
    if problems := missing_keys(section, section_key):
        raise RecipeError("the environment", problems)
    names = [endpoint.api_key_env for endpoint in section.endpoints]
    return [SecretStr(os.environ[name]) if name else None for name in names]


def dispatch(workspace: Workspace, source: RequestSource, choose: Callable[[LedgerState], Positions]) -> Positions:
    """Send requests for the pending positions that `choose` takes; returns them when each has its record.

    What is pending is looked up when no other run can write any more, such as one that is just being killed.
    StageError where the run is stopped: by its budget, by endpoints that refuse, or by nothing but errors.
    """
    import ray

    section = source.section
    keys = read_keys(section, source.section_key)
    actor: Any = ray.remote(Coordinator)
    coordinator = actor.options(num_cpus=0, max_concurrency=1000).remote(section)
    pool = _WorkerPool(coordinator, source, keys)
    try:
        ray.get(coordinator.open.remote(workspace))
        state = look_up(workspace, source)
        chosen = choose(state)
        ray.get(coordinator.begin.remote(chosen, state.tokens, _mean_prompt(source, chosen)))
        pool.start()
        with steady_line() as show:
            while pool.is_working():
                show(progress_line(ray.get(coordinator.progress.remote()), source))
        progress: RunProgress = ray.get(coordinator.progress.remote())
        ray.get(coordinator.close.remote())
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError):  # a worker passes on what the coordinator raised
            cause = cause.cause
        if isinstance(cause, DanluError):
            raise cause from None
        raise
    finally:
        clean_up("stopping the workers", pool.stop, STOP_SECONDS)
        clean_up("stopping the coordinator", lambda: ray.kill(coordinator), STOP_SECONDS)
    if progress.stop:
        raise _stopped(progress, source)
    return chosen


def answers_to(workspace: Workspace, source: RequestSource) -> Iterator[tuple[ChatRequest, dict[str, Any]]]:
    """Each request with what the ledger keeps of it, after sending those that it does not have yet."""
    if not has_every_record(workspace, source):
        dispatch(workspace, source, lambda state: state.pending)
    requests = list(map(source.request, source.positions()))
    return read_answers(workspace, read_index(workspace), requests)


def read_answers(
    workspace: Workspace, index: LedgerIndex, requests: Sequence[ChatRequest]
) -> Iterator[tuple[ChatRequest, dict[str, Any]]]:
    """Each request with what the ledger keeps of it: its `text`, and the `reason` of a failure.

    An answer that cannot be written, which earlier versions filed, is `malformed`. StageError where one is missing.
    """
    numbers = index.find([request.key for request in requests])
    if missing := int((numbers < 0).sum()):
        raise StageError(
            f"{workspace.path('ledger')}: {missing} answers that were there are gone; run again to ask for them"
        )
    for request, payload in zip(requests, read_payloads(workspace, index, numbers.tolist()), strict=True):
        known = json.loads(payload)
        if not is_text(known["text"]):
            escaped = known["text"].encode("utf-8", "backslashreplace").decode()
            known = {"reason": "malformed", **known, "text": escaped}
        yield request, known


def _mean_prompt(source: RequestSource, positions: Positions) -> float:
    """Characters of a prompt, about as many as its tokens."""
    sample = [source.request(int(pos)).messages for pos in positions[:: max(1, len(positions) // 50)]]
    return sum(len(turn["content"]) for messages in sample for turn in messages) / max(1, len(sample))


class _WorkerPool:
    """The workers of a run; one that dies is replaced, and its positions are assigned again."""

    def __init__(self, coordinator: Any, source: RequestSource, keys: list[SecretStr | None]) -> None:
        self._coordinator, self._source, self._keys = coordinator, source, keys
        self._restarts = 0
        self._runs: dict[Any, tuple[str, Any]] = {}

    def start(self) -> None:
        """Start as many as the recipe says."""
        for number in range(self._source.section.workers):
            self._start(f"worker-{number}")

    def _start(self, name: str) -> None:
        import ray

        from pipelines.llm.worker import Worker  # openai, an extra, stands behind it, and takes a second to load

        actor: Any = ray.remote(Worker)
        spread = actor.options(num_cpus=0.1, scheduling_strategy="SPREAD", max_concurrency=10)
        worker = spread.remote(name, self._coordinator, self._source, self._keys)
        self._runs[worker.run.remote()] = (name, worker)

    def is_working(self) -> bool:
        """Wait a moment; whether any worker goes on. Raises what a worker raised."""
        import ray

        done, _ = ray.wait(list(self._runs), num_returns=len(self._runs), timeout=POLL_SECONDS)
        for run in done:
            key = self._source.section_key
            name, worker = self._runs.pop(run)
            try:
                ray.get(run)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
                self._restarts += 1
                if self._restarts > RESTARTS:
                    raise StageError(f"{key}: {self._restarts} workers died; answers are kept, run again") from None
                say(f"{key}: {name} died; another takes its place")
                ray.get(self._coordinator.release.remote(name))
                self._start(f"{name}'")
            else:
                ray.kill(worker)
        return bool(self._runs)

    def stop(self) -> None:
        """End workers that still run, after an error."""
        import ray

        for _, worker in self._runs.values():
            ray.kill(worker)


def progress_line(progress: RunProgress, source: RequestSource) -> str:
    """Progress as one line for people."""
    price = source.section.price
    parts = [f"{progress.done}/{progress.total} answered"]
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    parts.append(f"{progress.in_flight} in flight")
    parts.append(f"{progress.requests:.0f} requests/min, {progress.tokens:.0f} tokens/min")
    if price is not None:
        parts.append(f"{progress.cost:.4f} of about {progress.projected:.4f} {price.currency}")
    if progress.seconds_left is not None:
        parts.append(f"{progress.seconds_left // 60:.0f}:{progress.seconds_left % 60:02.0f} left")
    return f"  {source.section_key}: {', '.join(parts)}"


def _stopped(progress: RunProgress, source: RequestSource) -> StageError:
    section, key = source.section, source.section_key
    done = progress.done + progress.failed
    kept = f"{done} of {progress.total} requests are settled and kept; run again to go on"
    if progress.stop == "budget" and section.price is not None:
        spent = f"{progress.cost:.4f} of {section.budget} {section.price.currency}"
        return StageError(f"{key}: the budget is used up, {spent}; {kept} with a larger {key}.budget")
    return StageError(f"{key}: {progress.stop}; {kept}")


def forget_failures(workspace: Workspace, source: RequestSource) -> int:
    """Have the next run send again what failed, or was answered with what cannot be written; returns how many."""
    index = read_index(workspace)
    failed: list[bytes] = []
    for positions, keys in _keys(source):
        recorded = [source.request(int(pos)) for pos in positions[index.kinds(keys) != 0]]
        failed += [request.key for request, known in read_answers(workspace, index, recorded) if "reason" in known]
    writer = LedgerWriter(workspace)
    writer.append(LedgerRecord(key, RecordKind.FORGOTTEN, b"") for key in failed)
    writer.close()
    return len(failed)
