"""The journal's numbers as TensorBoard event files, where the package tensorboardX is, and its losses as a picture."""

import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.train.journal import Entry, best_step

Points = Sequence[tuple[float, float]]
"""Steps, each with its value."""

DOTTED = 30
"""Most points of a line that are shown one by one."""


def draw(folder: Path, entry: Mapping[str, Any]) -> None:
    """Add one entry of the journal at its step. A run that goes on draws repeated steps again, at the same values."""
    if find_spec("tensorboardX") is None:
        return
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.proto.summary_pb2 import Summary

    numbers = {name: value for name, value in entry.items() if name != "step" and isinstance(value, int | float)}
    values = [Summary.Value(tag=_curve(name), simple_value=value) for name, value in numbers.items()]
    writer = _writer(folder)
    writer.write_event(Event(wall_time=time.time(), step=entry["step"], summary=Summary(value=values)))
    writer.flush()


def draw_losses(path: Path, entries: Sequence[Entry]) -> None:
    """Draw the journal's training and held-out loss as PNG, the step with the lowest held-out loss ringed."""
    held_out = {entry["step"]: entry["eval_loss"] for entry in entries if "eval_loss" in entry}
    lines: dict[str, Points] = {
        "training loss": [(entry["step"], entry["loss"]) for entry in entries if "loss" in entry],
        "held-out loss": list(held_out.items()),
    }
    best = best_step(entries, held_out)
    marked = None if best is None else (f"recommended: step {best}", best, held_out[best])
    picture(path, {name: points for name, points in lines.items() if points}, marked)


def picture(path: Path, lines: Mapping[str, Points], marked: tuple[str, float, float] | None = None) -> None:
    """Draw losses by optimizer step over each other as PNG; `marked`: a point with its name, step and loss."""
    from matplotlib.figure import Figure  # without pyplot, which looks for a screen

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    for name, points in lines.items():
        axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) <= DOTTED else None)
    if marked:
        axes.plot(*marked[1:], "o", label=marked[0], markersize=12, markerfacecolor="none", color="black")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def _curve(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


@lru_cache(maxsize=1)
def _writer(folder: Path) -> Any:
    """A writer without the queue that the package's usual one has, which a killed process would lose."""
    from tensorboardX.event_file_writer import EventsWriter

    folder.mkdir(parents=True, exist_ok=True)
    return EventsWriter(str(folder / "events"))
