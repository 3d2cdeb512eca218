"""Where Ray ends a process to save its node, the stage says which, and who had how much."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.errors import StageError
from pipelines.out_of_memory import explained

SAID = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 127.0.0.1, ID: 65) \
was 23.1GB used / 23.54GB limit (0.98)
OOM kill reason: Memory usage 4980932608B exceeded threshold of 505519776B (2.0% of 25275990016B limit)
Eviction Stats:
(global lru) capacity: 536870912
Ray killed 1 worker(s) based on the killing policy
Considered workers: [
Selected to kill: (Task: job ID=01000000, lease ID=05, task name=Map(attempt), required resources={CPU: 1}, \
pid=6665, actual memory used=9.04GB, worker ID=340b)
]
Top 10 memory users: PID\tMEM(GB)\tCOMMAND
6665\t9.04\tray::Map(attempt)
24403\t0.63\tpython -m other program
Refer to the documentation on how to address the out of memory issue
"""
"""What Ray 2.58 says, but for its numbers."""


def raised_by_ray() -> Exception:
    from ray.exceptions import OutOfMemoryError, RayTaskError

    return RayTaskError("work", "traceback", OutOfMemoryError(SAID))


def wrapped_by_us() -> Exception:
    try:
        try:
            raise raised_by_ray()
        except Exception as error:
            raise StageError(f"training: a node's main memory ran out; lower train.max_length\n{error}") from None
    except StageError as error:
        return error


def lost_with_a_worker() -> Exception:
    from ray.train.v2.api.exceptions import WorkerGroupError

    return WorkerGroupError("a worker died", {1: raised_by_ray()})


@pytest.mark.parametrize(
    ("made", "first"),
    [
        (raised_by_ray, "clean: a node's main memory ran out"),
        (lost_with_a_worker, "clean: a node's main memory ran out"),
        (wrapped_by_us, "training: a node's main memory ran out; lower train.max_length"),
    ],
)
def test_the_killer_is_named_with_the_table_of_memory_wherever_it_stands(made: object, first: str) -> None:
    assert callable(made)
    with pytest.raises(StageError) as told, explained("clean"):
        raise made()
    assert str(told.value).splitlines() == [
        first,
        "Ray's memory monitor ended a process to save its node (23.1GB used / 23.54GB limit): Map(attempt), process "
        "6665, which had 9.04GB",
        "  process  memory, GB  command",
        "     6665        9.04  ray::Map(attempt)",
        "    24403        0.63  python -m other program",
        "stop what else takes memory, or let fewer tasks run at a time (concurrency, where the stage's section has "
        "it); what is finished is kept, and the same command goes on from there",
    ]


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(ValueError, match="a bug"), explained("clean"):
        raise ValueError("a bug")


@pytest.mark.slow
def test_a_stage_that_does_not_fit_ends_soon_and_says_who_had_the_memory(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"query": "问", "response": "答"}\n', encoding="utf-8")
    (tmp_path / "mine.yaml").write_text("name: mine\ningest: {source: rows.jsonl}\n", encoding="utf-8")
    ended = subprocess.run(
        [str(Path(sys.executable).parent / "danlu"), "ingest", "mine.yaml"],
        cwd=tmp_path,
        # memory counts as full from the beginning
        env={**os.environ, "RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "100"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert ended.returncode == 1, ended.stderr
    told = ended.stderr.partition("error: ingest: a node's main memory ran out\n")[2]
    assert "Ray's memory monitor ended a process" in told and "ray::" in told and "Traceback" not in ended.stderr
