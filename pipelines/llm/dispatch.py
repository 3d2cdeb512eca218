"""Asking: send the requests that the ledger has no answer to, and wait until each has its record.

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
from pipelines.errors import DanluError, Problem, RecipeError, StageError
from pipelines.llm.coordinator import Desk, Progress
from pipelines.llm.ledger import Index, Kind, Record, Writer, read_index, read_payloads
from pipelines.llm.requests import Questions, Request
from pipelines.llm.worker import Worker
from pipelines.progress import say, steady_line
from pipelines.recipe.llm import Asking

Positions = np.ndarray[Any, np.dtype[np.int64]]

CHUNK = 8192
"""Positions whose keys are looked up together."""
RESTARTS = 3
"""Workers that may die, on a lost machine for example, before the run stops."""
POLL_SECONDS = 0.5


@dataclass
class State:
    """What the ledger knows of questions: positions to be asked, those that failed, and the tokens paid for."""

    pending: Positions
    failed: Positions
    tokens: tuple[int, int] = (0, 0)


def look_up(workspace: Workspace, questions: Questions) -> State:
    """Compare questions with the ledger; reads keys only, and holds the keys of one chunk at a time."""
    index = read_index(workspace)
    state = State(np.empty(0, np.int64), np.empty(0, np.int64))
    for positions, keys in _keys(questions):
        kinds = index.kinds(keys)
        state.pending = np.concatenate([state.pending, positions[kinds == 0]])
        state.failed = np.concatenate([state.failed, positions[kinds == Kind.FAILURE]])
        read, written = index.tokens(keys)
        state.tokens = (state.tokens[0] + read, state.tokens[1] + written)
    return state


def is_complete(workspace: Workspace, questions: Questions) -> bool:
    """Whether every position has a record."""
    index = read_index(workspace)
    return all((index.kinds(keys) != 0).all() for _, keys in _keys(questions))


def _keys(questions: Questions) -> Iterator[tuple[Positions, list[bytes]]]:
    for start in range(0, questions.size, CHUNK):
        positions = list(questions.positions(start, min(start + CHUNK, questions.size)))
        yield np.array(positions, np.int64), [questions.request(pos).key for pos in positions]


def read_keys(section: Asking, section_key: str) -> list[SecretStr | None]:
    """Each endpoint's key from its environment variable; RecipeError naming all that are not set."""
    problems = [
        Problem(f"{section_key}.endpoints[{number}].api_key_env", f"the environment variable {name} is not set")
        for number, name in enumerate(endpoint.api_key_env for endpoint in section.endpoints)
        if name and not os.environ.get(name)
    ]
    if problems:
        raise RecipeError("the environment", problems)
    names = [endpoint.api_key_env for endpoint in section.endpoints]
    return [SecretStr(os.environ[name]) if name else None for name in names]


def ask(workspace: Workspace, questions: Questions, choose: Callable[[State], Positions]) -> Positions:
    """Send requests for the pending positions that `choose` takes; returns them when each has its record.

    What is pending is looked up when no other run can write any more, such as one that is just being killed.
    StageError where the run is stopped: by its budget, by endpoints that refuse, or by nothing but errors.
    """
    import ray

    section = questions.section
    keys = read_keys(section, questions.section_key)
    actor: Any = ray.remote(Desk)
    desk = actor.options(num_cpus=0, max_concurrency=1000).remote(section)
    pool = _Pool(desk, questions, keys)
    try:
        ray.get(desk.open.remote(workspace))
        state = look_up(workspace, questions)
        chosen = choose(state)
        ray.get(desk.begin.remote(chosen, state.tokens, _mean_prompt(questions, chosen)))
        pool.start()
        with steady_line() as show:
            while pool.is_working():
                show(line(ray.get(desk.progress.remote()), questions))
        progress: Progress = ray.get(desk.progress.remote())
        ray.get(desk.close.remote())
    except ray.exceptions.RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, ray.exceptions.RayTaskError):  # a worker passes on what the desk raised
            cause = cause.cause
        if isinstance(cause, DanluError):
            raise cause from None
        raise
    finally:
        pool.stop()
        ray.kill(desk)
    if progress.stop:
        raise _stopped(progress, questions)
    return chosen


def answers_to(workspace: Workspace, questions: Questions) -> Iterator[tuple[Request, dict[str, Any]]]:
    """Each request with what the ledger keeps of it, after asking what it does not have yet."""
    if not is_complete(workspace, questions):
        ask(workspace, questions, lambda state: state.pending)
    requests = list(map(questions.request, questions.positions()))
    return read_answers(workspace, read_index(workspace), requests)


def read_answers(
    workspace: Workspace, index: Index, requests: Sequence[Request]
) -> Iterator[tuple[Request, dict[str, Any]]]:
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


def _mean_prompt(questions: Questions, positions: Positions) -> float:
    """Characters of a prompt, about as many as its tokens."""
    sample = [questions.request(int(pos)).messages for pos in positions[:: max(1, len(positions) // 50)]]
    return sum(len(turn["content"]) for messages in sample for turn in messages) / max(1, len(sample))


class _Pool:
    """The workers of a run; one that dies is replaced, and its work handed out again."""

    def __init__(self, desk: Any, questions: Questions, keys: list[SecretStr | None]) -> None:
        self._desk, self._questions, self._keys = desk, questions, keys
        self._restarts = 0
        self._runs: dict[Any, tuple[str, Any]] = {}

    def start(self) -> None:
        """Start as many as the recipe says."""
        for number in range(self._questions.section.workers):
            self._start(f"worker-{number}")

    def _start(self, name: str) -> None:
        import ray

        actor: Any = ray.remote(Worker)
        spread = actor.options(num_cpus=0.1, scheduling_strategy="SPREAD", max_concurrency=10)
        worker = spread.remote(name, self._desk, self._questions, self._keys)
        self._runs[worker.run.remote()] = (name, worker)

    def is_working(self) -> bool:
        """Wait a moment; whether any worker goes on. Raises what a worker raised."""
        import ray

        done, _ = ray.wait(list(self._runs), num_returns=len(self._runs), timeout=POLL_SECONDS)
        for run in done:
            key = self._questions.section_key
            name, worker = self._runs.pop(run)
            try:
                ray.get(run)
            except (ray.exceptions.RayActorError, ray.exceptions.OutOfMemoryError):
                self._restarts += 1
                if self._restarts > RESTARTS:
                    raise StageError(f"{key}: {self._restarts} workers died; answers are kept, run again") from None
                say(f"{key}: {name} died; another takes its place")
                ray.get(self._desk.forget.remote(name))
                self._start(f"{name}'")
            else:
                ray.kill(worker)
        return bool(self._runs)

    def stop(self) -> None:
        """End workers that still run, after an error."""
        import ray

        for _, worker in self._runs.values():
            ray.kill(worker)


def line(progress: Progress, questions: Questions) -> str:
    """Progress as one line for people."""
    price = questions.section.price
    parts = [f"{progress.done}/{progress.total} answered"]
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    parts.append(f"{progress.in_flight} in flight")
    parts.append(f"{progress.requests:.0f} requests/min, {progress.tokens:.0f} tokens/min")
    if price is not None:
        parts.append(f"{progress.cost:.4f} of about {progress.projected:.4f} {price.currency}")
    if progress.seconds_left is not None:
        parts.append(f"{progress.seconds_left // 60:.0f}:{progress.seconds_left % 60:02.0f} left")
    return f"  {questions.section_key}: {', '.join(parts)}"


def _stopped(progress: Progress, questions: Questions) -> StageError:
    section, key = questions.section, questions.section_key
    settled = progress.done + progress.failed
    kept = f"{settled} of {progress.total} requests are settled and kept; run again to go on"
    if progress.stop == "budget":
        assert section.price
        spent = f"{progress.cost:.4f} of {section.budget} {section.price.currency}"
        return StageError(f"{key}: the budget is used up, {spent}; {kept} with a larger {key}.budget")
    return StageError(f"{key}: {progress.stop}; {kept}")


def forget_failures(workspace: Workspace, questions: Questions) -> int:
    """Let the next run ask again what failed, or was answered with what cannot be written; returns how many that is."""
    index = read_index(workspace)
    failed: list[bytes] = []
    for positions, keys in _keys(questions):
        settled = [questions.request(int(pos)) for pos in positions[index.kinds(keys) != 0]]
        failed += [request.key for request, known in read_answers(workspace, index, settled) if "reason" in known]
    writer = Writer(workspace)
    writer.append(Record(key, Kind.FORGOTTEN, b"") for key in failed)
    writer.close()
    return len(failed)
