"""A worker that ran out of memory says which part of the estimate was wrong, and what to lower.

Imported in training workers only.
"""

import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager

import psutil
import torch

from pipelines.errors import StageError
from pipelines.train.memory import GIB, Estimate, advice, estimate, gib, shapes_of
from pipelines.train.run import Run

_REFUSED = re.compile(
    r"out of memory|can't allocate memory|not enough memory|bad allocation|std::bad_alloc|ALLOC_FAILED", re.I
)
_WANTED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) ?(bytes|KiB|MiB|GiB)")
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": GIB}


class MemoryMeter:
    """What this process holds: before the model, and, once `mark` is called, with model and optimizer made."""

    def __init__(self) -> None:
        self.before = memory_held()
        self.made: int | None = None

    def mark(self) -> None:
        """Model and optimizer are there; what comes now are steps."""
        self.made = memory_held()


def memory_held() -> int:
    """Bytes that this process holds: on its GPU, or else in main memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.memory_allocated())
    return int(psutil.Process().memory_info().rss)


def peak_memory() -> int:
    """The most bytes that this process ever held: on its GPU, or else in main memory."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def explained(run: Run, meter: MemoryMeter) -> Iterator[None]:
    """Turn an allocation that failed in here into a StageError that compares the estimate with what was held."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not (isinstance(error, MemoryError) or _REFUSED.search(str(error))):
            raise
        raise StageError(explanation(run, meter, memory_held() + _wanted(str(error)))) from error


def explanation(run: Run, meter: MemoryMeter, needed: int) -> str:
    """What to say when `needed` bytes could not be had."""
    shapes = shapes_of(run.model)
    said = estimate(run.section, shapes, run.zero_stage) if shapes else None
    compared = _compared(said, meter, needed) if said else "there was no estimate"
    return f"training ran out of memory: {compared}. To need less, {advice(run.section)}"


def _compared(said: Estimate, meter: MemoryMeter, needed: int) -> str:
    """Which of two groups was estimated too low: what is made once, and what each step adds."""
    if meter.made is None:
        parts, told, seen = "weights", said.weights, needed - meter.before
    else:
        parts = "gradients, optimizer and activations"
        told, seen = said.gradients + said.optimizer + said.activations, needed - meter.made
    if seen <= told:
        return f"the estimate of {said} was not exceeded, but so much was not free"
    return (
        f"{parts} took at least {gib(seen)} GiB, estimated {gib(told)}; in all the estimate was {said}, and "
        f"{gib(needed)} GiB were held or asked for"
    )


def _wanted(message: str) -> int:
    """Bytes of the allocation that failed, where its message says them."""
    match = _WANTED.search(message)
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0
