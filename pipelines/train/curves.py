"""The journal's numbers as TensorBoard event files, where the package tensorboardX is."""

import time
from collections.abc import Mapping
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any


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


def _curve(name: str) -> str:
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


@lru_cache(maxsize=1)
def _writer(folder: Path) -> Any:
    """A writer without the queue that the package's usual one has, which a killed process would lose."""
    from tensorboardX.event_file_writer import EventsWriter

    folder.mkdir(parents=True, exist_ok=True)
    return EventsWriter(str(folder / "events"))
