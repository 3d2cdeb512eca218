"""Dispatch: have the requests answered that the ledger has no answer to, by workers that Ray Data calls.

The positions of those requests are a Ray Data dataset, and asking is one `map_batches` over a pool of actors, with
several blocks in flight for each, so that no actor is idle where a block ends. Ray Data starts the actors, starts them
again where a process or a node is lost, and does the blocks again that they were at; a block that is done again asks
only for what has no record. What it knows nothing of is the coordinator's: an answer is in the ledger before it counts,
and budget, rates and requests in flight are leased for the whole cluster.
"""

import json
import logging
import math
import os
import re
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import SecretStr

from pipelines.artifacts.rows import is_text
from pipelines.artifacts.workspace import Workspace
from pipelines.clean_up import clean_up
from pipelines.errors import DanluError, Problem, RecipeError, StageError
from pipelines.llm.coordinator import Coordinator, RunProgress
from pipelines.llm.ledger import Keys, LedgerIndex, LedgerRecord, LedgerWriter, RecordKind, read_index, read_payloads
from pipelines.llm.requests import ChatRequest, Outcome, OutcomeKind, Positions, RequestSource, checked
from pipelines.progress import say, steady_line
from pipelines.recipe.keys import key_problem
from pipelines.recipe.llm import ModelRequests

CHUNK = 8192
"""Positions whose keys are looked up together."""
MANY_CHUNKS = 32
"""From so many chunks on, keys are made by Ray tasks, each of which makes `CHUNKS_OF_A_TASK`."""
CHUNKS_OF_A_TASK = 16
POLL_SECONDS = 0.5
BLOCKS_IN_FLIGHT = 8
"""Blocks that a worker has at the same time."""
BLOCK = 64
"""Positions in a block, at least where there are enough of them."""
MAX_BLOCKS = 4096
"""Blocks in all: each costs Ray Data a moment."""
DAMAGED = "damaged"
"""The class of answers that were there and cannot be read any more; `forget_failures` has them asked again."""
STOP_SECONDS = 15
"""What Ray may take to end an actor."""


@dataclass
class LedgerState:
    """What the ledger knows of requests: positions without a record, those that failed, and the tokens paid for."""

    pending: Positions
    failed: Positions
    tokens: tuple[int, int] = (0, 0)


def look_up(workspace: Workspace, source: RequestSource) -> LedgerState:
    """Look requests up in the ledger, by their keys, a chunk at a time; no prompt is made, no answer is read."""
    index = read_index(workspace, with_places=False)
    pending, failed, tokens = [np.empty(0, np.int64)], [np.empty(0, np.int64)], (0, 0)
    for positions, keys in _keys(source):
        kinds = index.kinds(keys)
        pending.append(positions[kinds == 0])
        failed.append(positions[kinds == RecordKind.FAILURE])
        read, written = index.tokens(keys)
        tokens = tokens[0] + read, tokens[1] + written
    return LedgerState(np.concatenate(pending), np.concatenate(failed), tokens)


def has_every_record(workspace: Workspace, source: RequestSource) -> bool:
    """Whether the ledger has a record of every position."""
    index = read_index(workspace, with_places=False)
    return all((index.kinds(keys) != 0).all() for _, keys in _keys(source))


def _keys(source: RequestSource) -> Iterator[tuple[Positions, Keys]]:
    """All positions with their keys, in order; many of them are made by as many tasks as there are CPUs."""
    import ray

    ranges = [(start, min(start + CHUNK, source.size)) for start in range(0, source.size, CHUNK)]
    if len(ranges) < MANY_CHUNKS or not ray.is_initialized():
        yield from (source.keys(*part) for part in ranges)
        return
    shared = ray.put(source)
    make: Any = ray.remote(num_cpus=1)(_keys_of)
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    under_way: deque[Any] = deque()
    for start in range(0, len(ranges), CHUNKS_OF_A_TASK):
        part = ranges[start : start + CHUNKS_OF_A_TASK]
        under_way.append(make.remote(shared, part[0][0], part[-1][1]))
        if len(under_way) > 2 * cpus:
            yield ray.get(under_way.popleft())
    while under_way:
        yield ray.get(under_way.popleft())


def _keys_of(source: RequestSource, start: int, stop: int) -> tuple[Positions, Keys]:
    positions, keys = source.keys(start, stop)
    return positions, np.array(keys, "V16")


def missing_keys(section: ModelRequests, section_key: str) -> list[Problem]:
    """A problem for each endpoint whose key's environment variable is not set, or holds what cannot be a key."""
    return [
        Problem(f"{section_key}.endpoints[{number}].api_key_env", said)
        for number, endpoint in enumerate(section.endpoints)
        if endpoint.api_key_env and (said := key_problem(endpoint.api_key_env))
    ]


def read_keys(section: ModelRequests, section_key: str) -> list[SecretStr | None]:
    """Each endpoint's key from its environment variable; RecipeError naming all that cannot be used."""
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
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    section = source.section
    keys = read_keys(section, source.section_key)
    actor: Any = ray.remote(Coordinator)
    # here, where the workspace is, and where the run ends anyway if the machine is lost
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    coordinator = actor.options(num_cpus=0, max_concurrency=1000, scheduling_strategy=here).remote(section)
    try:
        ray.get(coordinator.open.remote(workspace))
        state = look_up(workspace, source)
        chosen = choose(state)
        ray.get(coordinator.begin.remote(chosen, state.tokens, _mean_prompt(source, chosen)))
        with _progress_shown(coordinator, source) as said:
            unasked = _ask(coordinator, source, keys, chosen)
        if (failure := ray.get(coordinator.failure.remote())) is not None:
            raise failure
        progress: RunProgress = ray.get(coordinator.progress.remote())
        ray.get(coordinator.close.remote())
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, DanluError):
            raise error.cause from None
        raise
    finally:
        clean_up("stopping the coordinator", lambda: ray.kill(coordinator), STOP_SECONDS)
    is_stopped = progress.stop or unasked
    for note in progress.notes:
        if not is_stopped or _kind(note) not in said:
            say(f"  {source.section_key}: {note}")
    if is_stopped:
        raise _stopped(progress, source)
    return chosen


def _ask(coordinator: Any, source: RequestSource, keys: list[SecretStr | None], chosen: Positions) -> int:
    """Run the requests of positions through Ray Data; returns how many were not asked, since the run was stopped."""
    import ray.data

    from pipelines.llm.worker import NOT_ASKED, Worker  # openai, an extra, stands behind it, and loads for a second

    for name in ("ray._private.worker", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if not len(chosen):
        return 0
    workers = source.section.workers
    in_flight = sum(endpoint.max_in_flight for endpoint in source.section.endpoints)
    size = max(BLOCK, 2 * in_flight // workers // BLOCKS_IN_FLIGHT, len(chosen) // MAX_BLOCKS)
    size = max(1, min(size, math.ceil(len(chosen) / workers)))
    blocks = [pa.table({"pos": chosen[start : start + size]}) for start in range(0, len(chosen), size)]
    rows = ray.data.from_arrow(blocks)
    rows.context.op_resource_reservation_enabled = False  # workers wait, they compute little
    with warnings.catch_warnings():
        # Ray up to 2.58 has no other name for max_concurrency, and 2.60 calls it deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        asked = rows.map_batches(
            Worker,
            fn_constructor_args=(coordinator, source, keys),
            batch_size=None,
            compute=ray.data.ActorPoolStrategy(size=workers, max_tasks_in_flight_per_actor=BLOCKS_IN_FLIGHT),
            num_cpus=0.1,
            max_concurrency=BLOCKS_IN_FLIGHT,
        )
    unasked = 0
    try:
        for batch in asked.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            assert isinstance(batch, pa.Table)
            unasked += batch["outcome"].to_pylist().count(NOT_ASKED)
    except ray.exceptions.RayActorError as error:  # a lack of memory is told of in out_of_memory.py
        raise StageError(f"{source.section_key}: the workers died; answers are kept, run again\n{error}") from None
    return unasked


@contextmanager
def _progress_shown(coordinator: Any, source: RequestSource) -> Iterator[set[str]]:
    """Show how far the run is while this is open; what people must know is said at once. Yields the kinds of that."""
    import ray

    ended = threading.Event()

    said: set[str] = set()

    def follow() -> None:
        with steady_line() as show:
            while not ended.wait(POLL_SECONDS):
                try:
                    progress: RunProgress = ray.get(coordinator.progress.remote())
                except ray.exceptions.RayError:
                    return  # it is lost, which those who ask for leases find out as well
                show(progress_line(progress, source))
                for note in progress.notes:
                    if _kind(note) not in said:
                        said.add(_kind(note))
                        say(f"  {source.section_key}: {note}")

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield said
    finally:
        ended.set()
        thread.join(STOP_SECONDS)  # it may be waiting for an answer of Ray's


def _kind(note: str) -> str:
    """A note without its numbers, which change."""
    return re.sub(r"\d+", "", note)


def answers_to(workspace: Workspace, source: RequestSource) -> Iterator[tuple[ChatRequest, dict[str, Any]]]:
    """Each request with what the ledger keeps of it, after sending those that it does not have yet."""
    if not has_every_record(workspace, source):
        dispatch(workspace, source, lambda state: state.pending)
    return read_answers(workspace, source, read_index(workspace), list(source.positions()))


def read_answers(
    workspace: Workspace, source: RequestSource, index: LedgerIndex, positions: Sequence[int]
) -> Iterator[tuple[ChatRequest, dict[str, Any]]]:
    """Each request with what the ledger keeps of it: its `text`, and the `reason` of a failure.

    What earlier versions filed is held to what an answer is today: reasoning in its text is split off, and one that
    cannot be used is `malformed`; a record that the disk has damaged is `damaged`. StageError where one is missing.
    """
    requests = [source.request(int(pos)) for pos in positions]
    numbers = index.find([request.key for request in requests])
    if missing := int((numbers < 0).sum()):
        raise StageError(
            f"{workspace.path('ledger')}: {missing} answers that were there are gone; run again to ask for them"
        )
    for request, payload in zip(requests, read_payloads(workspace, index, numbers.tolist()), strict=True):
        known = {"text": "", "reason": DAMAGED} if payload is None else json.loads(payload)
        if "reason" not in known:
            filed = Outcome(OutcomeKind.ANSWERED, "", known["text"], reasoning=known.get("reasoning", ""))
            outcome = checked(source, request, filed)
            known |= {"text": outcome.text, "reasoning": outcome.reasoning}
            known |= {"reason": outcome.reason} if outcome.reason else {}
        if not is_text(known["text"]):
            known["text"] = known["text"].encode("utf-8", "backslashreplace").decode()
        yield request, known


def _mean_prompt(source: RequestSource, positions: Positions) -> float:
    """Characters of a prompt, about as many as its tokens."""
    sample = [source.request(int(pos)).messages for pos in positions[:: max(1, len(positions) // 50)]]
    return sum(len(turn["content"]) for messages in sample for turn in messages) / max(1, len(sample))


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
    parts += progress.notes
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
        recorded = positions[index.kinds(keys) != 0].tolist()
        answers = read_answers(workspace, source, index, recorded)
        failed += [request.key for request, known in answers if "reason" in known]
    writer = LedgerWriter(workspace)
    writer.append(LedgerRecord(key, RecordKind.FORGOTTEN, b"") for key in failed)
    writer.close()
    return len(failed)
