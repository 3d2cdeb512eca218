"""Time and memory of a command with all its descendants, and the environment it was measured in."""

import os
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

SAMPLE_SECONDS = 0.5


@dataclass(frozen=True)
class Measured:
    """One finished command: wall and CPU seconds, peak memory in bytes, and what it said.

    `samples` are its memory in bytes by the time of day, twice a second.
    """

    seconds: float
    cpu_seconds: float
    peak_bytes: int
    returncode: int
    output: str
    samples: tuple[tuple[float, int], ...] = ()


def measure(command: Sequence[str], cwd: Path | None = None, env: dict[str, str] | None = None) -> Measured:
    """Run a command to its end.

    Memory is the largest sum, over the command and its descendants, of proportional set sizes (shared pages
    are counted once), sampled twice a second. Ray's processes are descendants too, also where they left the session.
    """
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    began = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, **(env or {}), "DANLU_BENCHMARK": mark},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    samples: list[tuple[float, int]] = []
    cpu: dict[int, float] = {}
    ended = threading.Event()
    sampler = threading.Thread(target=_sample, args=(mark, ended, samples, cpu))
    sampler.start()
    output, _ = process.communicate()
    seconds = time.monotonic() - began
    ended.set()
    sampler.join()
    peak = max((size for _, size in samples), default=0)
    return Measured(seconds, sum(cpu.values()), peak, process.returncode, output, tuple(samples))


def _sample(mark: str, ended: threading.Event, samples: list[tuple[float, int]], cpu: dict[int, float]) -> None:
    ours: dict[int, bool] = {}
    while not ended.wait(SAMPLE_SECONDS):
        total = 0
        for process in psutil.process_iter():
            try:
                if process.pid not in ours:
                    ours[process.pid] = process.environ().get("DANLU_BENCHMARK") == mark
                if ours[process.pid]:
                    total += proportional_set_size(process.pid)
                    times = process.cpu_times()
                    cpu[process.pid] = times.user + times.system
            except (psutil.NoSuchProcess, psutil.AccessDenied, FileNotFoundError, ProcessLookupError):
                continue
        samples.append((time.time(), total))


def proportional_set_size(pid: int) -> int:
    """Resident bytes of a process, of which those it shares count in parts."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0
