"""Leaving before a machine is taken away: training saves after the step it is in, on all ranks, and goes on elsewhere.

Who takes a machine says so first. Ray marks a node that it drains (autoscalers do, and `ray start --block` on SIGTERM),
and Ray Train passes that on. Schedulers and `ray job stop` send SIGTERM to the driver, some to workers too, and people
press Ctrl-C: whoever gets it leaves a file, for which the workers look after each step.
"""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.progress import say
from pipelines.train.nodes import is_told
from pipelines.train.run import Run

GONE_SECONDS = 60
"""How long to wait for nodes that are being taken away; a drained one ends by itself as soon as nothing runs there."""

POLL_SECONDS = 5
"""Between two questions to Ray, each of which costs every rank some milliseconds; it looks at its nodes as often."""

ONCE_SECONDS = 1.0
"""Signals so close together are one: `timeout` and programs that pass signals on send them to a group and to us."""


@dataclass
class Told:
    """Whether this process was told to end, by which signal, and when by the monotonic clock."""

    by: int | None = None
    at: float = 0.0


@contextmanager
def told_to_end(mark: Path) -> Iterator[Told]:
    """While in here SIGTERM and SIGINT write `mark` and are noted, and do not end the process where it stands.

    SIGINT raises KeyboardInterrupt where it comes ONCE_SECONDS after the first signal: a person has pressed Ctrl-C
    again. Only a main thread can; in others nothing changes.
    """
    told = Told()
    if threading.current_thread() is not threading.main_thread():
        yield told
        return

    def note(number: int, _: Any) -> None:
        now = time.monotonic()
        if told.by is not None:
            if number == signal.SIGINT and now - told.at >= ONCE_SECONDS:
                raise KeyboardInterrupt
            return
        told.by, told.at = number, now
        mark.touch()
        line = "  training: saving after this step, then stopping; Ctrl-C from now on ends it at once"
        threading.Thread(target=say, args=(line,)).start()  # what is interrupted may be writing a line itself

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def note_sigterm_in_worker(mark: Path) -> None:
    """Let SIGTERM write `mark` in this Ray actor; training runs in a thread of it, and only its main thread can."""
    import ray

    library: Any = ray
    actor = library.get_runtime_context().current_actor
    library.get(actor.__ray_call__.remote(_note_sigterm, mark))


def _note_sigterm(_: Any, mark: Path) -> None:
    signal.signal(signal.SIGTERM, lambda *_: mark.touch())


class PreemptionNotice:
    """Whether the workers were told to leave, and which nodes are being taken away, if Ray knows.

    `draining` says what Ray knows, the same on every rank: ray.train.get_preemption_info, or what stands in for it.
    """

    def __init__(self, run: Run, draining: Callable[[], Any]) -> None:
        self.run = run
        self.draining = draining
        self.nodes: list[str] = []
        self.next = 0.0  # when rank 0 wants to ask Ray again

    def given(self) -> bool:
        """Every rank asks after each step, and all get the same answer."""
        import torch
        import torch.distributed as dist

        due = dist.get_rank() == 0 and time.monotonic() >= self.next
        device = "cuda" if torch.cuda.is_available() else "cpu"
        told = self.run.leave.exists() or (due and is_told(self.run))
        seen = torch.tensor([told, due], dtype=torch.int32, device=device)
        dist.all_reduce(seen, dist.ReduceOp.MAX)
        marked, ask = seen.tolist()
        if ask:
            self.next = time.monotonic() + POLL_SECONDS
            information = self.draining()
            self.nodes = information.preempted_node_ids if information else []
        return bool(marked or self.nodes)


def wait_until_gone(nodes: list[str]) -> None:
    """Until Ray counts none of the nodes any more, or GONE_SECONDS are over."""
    import ray

    library: Any = ray
    deadline = time.monotonic() + GONE_SECONDS
    while time.monotonic() < deadline:
        if not any(node["Alive"] and node["NodeID"] in nodes for node in library.nodes()):
            return
        time.sleep(0.5)
