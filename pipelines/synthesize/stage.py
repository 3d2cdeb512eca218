"""Synthesize: ask a model for every cell of the grid, and make conversations of the answers.

Requests are sent by plain Ray actors that fetch their work, not by Ray Data: a block that is handed to a Ray Data actor
leaves it idle at its end until the slowest request is back, answers would wait in a block before they are on disk,
and a budget or a rate that the whole cluster shares has no place there. The conversations are then written by Ray Data
tasks, shard by shard, from the ledger.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import SecretStr

from pipelines.errors import DanluError, Problem, RecipeError, StageError
from pipelines.progress import say, steady_line
from pipelines.recipe import Recipe
from pipelines.records import DROPPED, ROW, RowDigest
from pipelines.shards import Attempt, Commit, Shard, run_shards
from pipelines.synthesize.desk import Desk, Progress, cost_of
from pipelines.synthesize.grid import Grid
from pipelines.synthesize.ledger import Index, Kind, Record, Writer, read_index, read_payloads
from pipelines.synthesize.section import Synthesize
from pipelines.synthesize.worker import Worker
from pipelines.workspace import Place, Workspace

Positions = np.ndarray[Any, np.dtype[np.int64]]

VERSION = 1
CHUNK = 8192
"""Positions whose keys are looked up together, and written to one file."""
UNPAID = ("endpoints", "timeout", "max_attempts", "circuit_breaker", "price", "budget", "workers")
"""Keys of the section that do not change what is asked."""
RESTARTS = 3
"""Workers that may die, on a lost machine for example, before the run stops."""
POLL_SECONDS = 0.5


def determinants(recipe: Recipe) -> dict[str, Any]:
    """What decides the prompts and the training inputs; not where they are asked, how fast, or at what price."""
    assert recipe.synthesize
    return {"section": recipe.synthesize.model_dump(mode="json", exclude=set(UNPAID)), "seed": recipe.seed}


def synthesize(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Ask what the ledger does not know yet, then write one conversation per answer.

    RecipeError where a key is missing; StageError where the run was stopped, with all answers kept.
    """
    section = recipe.synthesize
    assert section
    grid = Grid(section, recipe.seed)
    if not _is_complete(place.workspace, grid):
        ask(place.workspace, grid, lambda state: state.pending)
    shards = [{"index": number, "start": start} for number, start in enumerate(range(0, grid.size, CHUNK))]
    work = _writer(place.workspace, section, recipe.seed)
    commits = run_shards(place, "rows", lambda: shards, work, concurrency=None, title="conversations")
    return _report(place, section, commits)


@dataclass
class State:
    """What the ledger knows of a grid: positions still to be asked, those that failed, and the tokens paid for."""

    pending: Positions
    failed: Positions
    tokens: tuple[int, int] = (0, 0)


def look_up(workspace: Workspace, grid: Grid) -> State:
    """Compare a grid with the ledger; reads keys only, and holds the keys of one chunk at a time."""
    index = read_index(workspace)
    state = State(np.empty(0, np.int64), np.empty(0, np.int64))
    for positions, keys in _keys(grid):
        kinds = index.kinds(keys)
        state.pending = np.concatenate([state.pending, positions[kinds == 0]])
        state.failed = np.concatenate([state.failed, positions[kinds == Kind.FAILURE]])
        read, written = index.tokens(keys)
        state.tokens = (state.tokens[0] + read, state.tokens[1] + written)
    return state


def _is_complete(workspace: Workspace, grid: Grid) -> bool:
    index = read_index(workspace)
    return all((index.kinds(keys) != 0).all() for _, keys in _keys(grid))


def _keys(grid: Grid) -> Iterator[tuple[Positions, list[bytes]]]:
    for start in range(0, grid.size, CHUNK):
        positions = list(grid.positions(start, min(start + CHUNK, grid.size)))
        yield np.array(positions, np.int64), [grid.request(pos).key for pos in positions]


def read_keys(section: Synthesize) -> list[SecretStr | None]:
    """Each endpoint's key from its environment variable; RecipeError naming all that are not set."""
    problems = [
        Problem(f"synthesize.endpoints[{number}].api_key_env", f"the environment variable {name} is not set")
        for number, name in enumerate(endpoint.api_key_env for endpoint in section.endpoints)
        if name and not os.environ.get(name)
    ]
    if problems:
        raise RecipeError("the environment", problems)
    names = [endpoint.api_key_env for endpoint in section.endpoints]
    return [SecretStr(os.environ[name]) if name else None for name in names]


def ask(workspace: Workspace, grid: Grid, choose: Callable[[State], Positions]) -> Positions:
    """Send requests for the pending positions that `choose` takes; returns them when each has its record.

    What is pending is looked up when no other run can write any more, such as one that is just being killed.
    StageError where the run is stopped: by its budget, by endpoints that refuse, or by nothing but errors.
    """
    import ray

    section = grid.section
    keys = read_keys(section)
    actor: Any = ray.remote(Desk)
    desk = actor.options(num_cpus=0, max_concurrency=1000).remote(section)
    pool = _Pool(desk, grid, keys)
    try:
        ray.get(desk.open.remote(workspace))
        state = look_up(workspace, grid)
        chosen = choose(state)
        ray.get(desk.begin.remote(chosen, state.tokens, _mean_prompt(grid, chosen)))
        pool.start()
        with steady_line() as show:
            while pool.is_working():
                show(line(ray.get(desk.progress.remote()), section))
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
        raise _stopped(progress, section)
    return chosen


def _mean_prompt(grid: Grid, positions: Positions) -> float:
    """Characters of a prompt, about as many as its tokens."""
    sample = [grid.request(int(pos)).messages for pos in positions[:: max(1, len(positions) // 50)]]
    return sum(len(turn["content"]) for messages in sample for turn in messages) / max(1, len(sample))


class _Pool:
    """The workers of a run; one that dies is replaced, and its work handed out again."""

    def __init__(self, desk: Any, grid: Grid, keys: list[SecretStr | None]) -> None:
        self._desk, self._grid, self._keys = desk, grid, keys
        self._restarts = 0
        self._runs: dict[Any, tuple[str, Any]] = {}

    def start(self) -> None:
        """Start as many as the recipe says."""
        for number in range(self._grid.section.workers):
            self._start(f"worker-{number}")

    def _start(self, name: str) -> None:
        import ray

        actor: Any = ray.remote(Worker)
        spread = actor.options(num_cpus=0.1, scheduling_strategy="SPREAD", max_concurrency=10)
        worker = spread.remote(name, self._desk, self._grid.section, self._grid.seed, self._keys)
        self._runs[worker.run.remote()] = (name, worker)

    def is_working(self) -> bool:
        """Wait a moment; whether any worker goes on. Raises what a worker raised."""
        import ray

        done, _ = ray.wait(list(self._runs), num_returns=len(self._runs), timeout=POLL_SECONDS)
        for run in done:
            name, worker = self._runs.pop(run)
            try:
                ray.get(run)
            except ray.exceptions.RayActorError:
                self._restarts += 1
                if self._restarts > RESTARTS:
                    raise StageError(
                        f"synthesize: {self._restarts} workers died; answers are kept, run again"
                    ) from None
                say(f"synthesize: {name} died; another takes its place")
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


def line(progress: Progress, section: Synthesize) -> str:
    """Progress as one line for people."""
    parts = [f"{progress.done}/{progress.total} answered"]
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    parts.append(f"{progress.in_flight} in flight")
    parts.append(f"{progress.requests:.0f} requests/min, {progress.tokens:.0f} tokens/min")
    if section.price is not None:
        parts.append(f"{progress.cost:.4f} of about {progress.projected:.4f} {section.price.currency}")
    if progress.seconds_left is not None:
        parts.append(f"{progress.seconds_left // 60:.0f}:{progress.seconds_left % 60:02.0f} left")
    return "  synthesize: " + ", ".join(parts)


def _stopped(progress: Progress, section: Synthesize) -> StageError:
    settled = progress.done + progress.failed
    kept = f"{settled} of {progress.total} requests are settled and kept; run again to go on"
    if progress.stop == "budget":
        assert section.price
        spent = f"{progress.cost:.4f} of {section.budget} {section.price.currency}"
        return StageError(f"synthesize: the budget is used up, {spent}; {kept} with a larger synthesize.budget")
    return StageError(f"synthesize: {progress.stop}; {kept}")


def schema(section: Synthesize) -> pa.Schema:
    """A canonical row, then the cell it answers."""
    cell = [pa.field(name, pa.string()) for name in [*section.dimensions, "style"]]
    return pa.schema([*ROW, *cell, pa.field("sample", pa.int64())])


def _writer(workspace: Workspace, section: Synthesize, seed: int) -> Callable[[Shard, Attempt], dict[str, Any]]:
    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        grid = Grid(section, seed)
        index = read_index(workspace)
        positions = list(grid.positions(shard["start"], min(shard["start"] + CHUNK, grid.size)))
        rows, failures = _rows(workspace, grid, index, positions)
        table = pa.Table.from_pylist(rows, schema=schema(section))
        digest = RowDigest()
        digest.update(table)
        with attempt.writer("rows", table.schema) as writer:
            writer.write_table(table)
        with attempt.writer("dropped", DROPPED) as writer:
            writer.write_table(pa.Table.from_pylist(failures, schema=DROPPED))
        keys = [grid.request(pos).key for pos in positions]
        return {
            "rows": digest.rows,
            "digest": digest.hexdigest(),
            "failures": dict(Counter(failure["reason"] for failure in failures)),
            "tokens": index.tokens(keys),
        }

    return work


def _rows(
    workspace: Workspace, grid: Grid, index: Index, positions: Sequence[int]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Conversations of the positions that have an answer, and what is left of the others."""
    requests = [grid.request(pos) for pos in positions]
    numbers = index.find([request.key for request in requests])
    if (numbers < 0).any():
        missing = int((numbers < 0).sum())
        raise StageError(
            f"{workspace.path('ledger')}: {missing} answers that were there are gone; run again to ask for them"
        )
    rows, failures = [], []
    for request, payload in zip(requests, read_payloads(workspace, index, numbers.tolist()), strict=True):
        known = json.loads(payload)
        place = {"row_id": request.name, "pos": request.pos}
        if "reason" in known:
            failures.append(
                {**place, "stage": "synthesize", "operator": "ask", "reason": known["reason"], "text": known["text"]}
            )
            continue
        cell = {**request.cell, "sample": request.sample}
        system = grid.section.query_system
        rows.append({**place, "system": system, "query": request.query, "response": known["text"], **cell})
    return rows, failures


def _report(place: Place, section: Synthesize, commits: list[Commit]) -> dict[str, Any]:
    digest, failures, tokens = RowDigest(), Counter[str](), [0, 0]
    for commit in commits:
        result = commit["result"]
        digest.add(result["digest"], result["rows"])
        failures.update(result["failures"])
        tokens = [total + count for total, count in zip(tokens, result["tokens"], strict=True)]
    reasons = ", ".join(f"{reason} {count}" for reason, count in failures.most_common())
    if not digest.rows:
        raise StageError(f"synthesize: no request has an answer ({reasons}); mend the cause and use --retry-failed")
    cost = cost_of(section.price, *tokens)
    paid = f", {_money(cost)} {section.price.currency}" if section.price else ""
    return {
        "summary": f"{digest.rows} conversations{f', failed: {reasons}' if reasons else ''}{paid}",
        "digest": digest.hexdigest(),
        "rows": digest.rows,
        "failed": dict(failures),
        "input_tokens": tokens[0],
        "output_tokens": tokens[1],
        "cost": str(cost) if section.price else None,
        "currency": section.price.currency if section.price else None,
        "outputs": {kind: place.relative(commit["files"][kind] for commit in commits) for kind in ("rows", "dropped")},
    }


def _money(amount: Decimal) -> str:
    return f"{amount:.4f}"


def forget_failures(workspace: Workspace, recipe: Recipe) -> int:
    """Let the next run ask again what failed; returns how many requests that is."""
    assert recipe.synthesize
    grid = Grid(recipe.synthesize, recipe.seed)
    failed = look_up(workspace, grid).failed
    writer = Writer(workspace)
    writer.append(Record(grid.request(int(pos)).key, Kind.FORGOTTEN, b"") for pos in failed)
    writer.close()
    return len(failed)
