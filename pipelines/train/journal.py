"""The run's journal, `metrics.jsonl`: one JSON object per logged step and per evaluation.

    {"step": 10, "loss": 2.1, "grad_norm": 0.8, "lr": 0.001, "tokens": 1400, "loss_tokens": 600, "seconds": 3.5,
     "memory_bytes": 2147483648, "mfu": 0.41}
    {"step": 10, "eval_loss": 2.3, "eval_loss_by_row": [2.1, 2.6]}

`tokens` and `loss_tokens` are those of all ranks since the entry before, and `seconds` the time they took.
`memory_bytes`: the most that rank 0 held so far, on its GPU or else in main memory. `mfu`: the share of the devices'
peak that the model's own work makes up, where that peak is known; see flops.py.
"""

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.beside import beside
from pipelines.progress import LOG_INTERVAL, console, say
from pipelines.train.checkpoint import replace_text

Entry = dict[str, Any]

BY_ROW = "eval_loss_by_row"


def read_journal(path: Path) -> list[Entry]:
    """The entries; a last line that a crash cut short is left out."""
    if not path.is_file():
        return []
    whole, _, _ = path.read_text(encoding="utf-8").rpartition("\n")
    return [json.loads(line) for line in whole.splitlines()]


def rewind(path: Path, step: int | None) -> None:
    """Drop the entries behind `step`, which training will write again; None: all of them."""
    kept = [entry for entry in read_journal(path) if step is not None and entry["step"] <= step]
    replace_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))


def append(path: Path, entry: Entry) -> None:
    """Add one entry."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")


def best_step(entries: Iterable[Entry], steps: Iterable[int]) -> int | None:
    """Which of `steps` has the lowest held-out loss, the earliest of equals; None where none was evaluated."""
    wanted = set(steps)
    losses = [(entry["eval_loss"], entry["step"]) for entry in entries if "eval_loss" in entry]
    return min(((loss, step) for loss, step in losses if step in wanted), default=(0, None))[1]


@contextmanager
def shown(path: Path, total: int) -> Iterator[None]:
    """Show the journal on the terminal while it grows: step, loss, learning rate, speed, time left."""
    with beside(partial(_watch, path, total)):
        yield


def _watch(path: Path, total: int, stop: threading.Event) -> None:
    seen = len(read_journal(path))
    told = time.monotonic()
    say(f"  training: {total} steps; starting workers and loading the model …")
    with console.status("training") as status:
        while not stop.wait(0.5):
            entries = read_journal(path)
            if len(entries) < seen:  # rewound by a worker that was started again
                seen = len(entries)
            for entry in entries[seen:]:
                if "eval_loss" in entry:
                    say(f"  training: step {entry['step']}/{total}  held-out loss {entry['eval_loss']:.4f}")
                    continue
                line = progress_line(entries, entry, total)
                status.update(line)
                if time.monotonic() - told >= LOG_INTERVAL and not console.is_terminal:
                    told = time.monotonic()
                    say(f"  training: {line}")
            seen = len(entries)


def progress_line(entries: list[Entry], entry: Entry, total: int) -> str:
    """What an entry says of the run, for people; speeds and time left are those of the last twenty entries."""
    recent = [other for other in entries if "loss" in other][-20:]
    seconds = sum(other["seconds"] for other in recent)
    steps = recent[-1]["step"] - recent[0]["step"] + 1
    left = (total - entry["step"]) * seconds / steps
    speed, useful = (sum(other[name] for other in recent) / seconds for name in ("tokens", "loss_tokens"))
    parts = [f"step {entry['step']}/{total}", f"loss {entry['loss']:.4f}", f"lr {entry['lr']:.2e}"]
    if entry["grad_norm"] is not None:
        parts.append(f"grad norm {entry['grad_norm']:.2f}")
    parts.append(f"{speed:.0f} tokens/s, {useful:.0f} with loss")
    if "mfu" in entry:
        parts.append(f"{entry['mfu']:.0%} of the peak")
    return "  ".join([*parts, f"{entry['memory_bytes'] / 2**30:.1f} GiB", f"{left / 60:.1f} min left"])
