"""Disks that fail at any call: ingest and clean leave the same rows, or say what failed and leave nothing that counts.

Shards run in this process, where every call of a run can be counted, and on Ray, where those of a shard can.
`Workspace` is all that writes here.
"""

import errno
import io
import itertools
import json
import os
import random
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pyarrow.parquet as pq
import pytest

from pipelines.artifacts import shards, workspace
from pipelines.artifacts.reports.clean import CleanReport
from pipelines.artifacts.shards import _attempt
from pipelines.artifacts.stage import Inputs
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.clean.stage import CleanInputs, CleanStage
from pipelines.errors import DanluError
from pipelines.ingest.stage import IngestStage
from pipelines.recipe.clean import Clean
from pipelines.recipe.ingest import Ingest
from tests.outputs import finished, rows_of
from tests.pipelines.sources.samples import write_lines

TEXTS = [f"第{number}个回答，说的是第{number}件事情，与别的都不相同。" for number in range(24)]
LINES = [{"query": f"问{number}", "response": text} for number, text in enumerate([*TEXTS, TEXTS[3], "短"])]
"""Of which one is there twice, and one is short."""
PROCESS = ["document_deduplicator", {"text_length_filter": {"min_len": 5}}]
FAULTS = ("fsync", "short", "ENOSPC", "EIO", "EINTR")
KTH = 200
BUFFER = 64
"""Bytes of a file's buffer: little, so that a small run makes many calls."""
SEED, DRAWN = 20261202, 20
"""Of the faults that are tried on Ray."""


class Disk:
    """Counts the calls that write, and lets every k-th of them fail in one way."""

    def __init__(self, fault: str, kth: int) -> None:
        self.fault, self.calls, self.failed = fault, 0, 0
        self.kth = max(kth, 2) if fault == "EINTR" else kth  # one that always interrupts would be asked for ever

    def is_due(self) -> bool:
        self.calls += 1
        due = self.calls % self.kth == 0
        self.failed += due
        return due

    def fsync(self, descriptor: int) -> None:
        if self.fault == "fsync" and self.is_due():
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    def open(self, path: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if mode != "wb":
            return open(path, mode, *arguments, **named)
        return io.BufferedWriter(FaultyFile(self, path), BUFFER)

    def fdopen(self, descriptor: int, mode: str = "r", *arguments: Any, **named: Any) -> Any:
        if mode != "wb":
            return REAL_FDOPEN(descriptor, mode, *arguments, **named)
        return io.BufferedWriter(FaultyFile(self, descriptor), BUFFER)

    def naming(self, call: Callable[..., None]) -> Callable[..., None]:
        """A call that makes a name in a folder, which needs room there too."""

        def may_fail(*arguments: Any, **named: Any) -> None:
            if self.fault in ("ENOSPC", "EIO") and self.is_due():
                raise OSError(getattr(errno, self.fault), os.strerror(getattr(errno, self.fault)))
            call(*arguments, **named)

        return may_fail

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """What this process writes meanwhile goes to this disk."""
        names = {name: self.naming(getattr(os, name)) for name in ("replace", "link", "mkdir")}
        with (
            patch.multiple(os, fsync=self.fsync, fdopen=self.fdopen, **names),
            patch.object(workspace, "open", self.open, create=True),
        ):
            yield


REAL_FDOPEN = os.fdopen


class FaultyFile(io.FileIO):
    """A file whose writes fail when the disk says so."""

    def __init__(self, disk: Disk, path: Any) -> None:
        super().__init__(path, "wb")
        self.disk = disk

    def write(self, data: Any) -> int:
        if self.disk.fault != "fsync" and self.disk.is_due():
            if self.disk.fault == "short":
                return super().write(memoryview(data)[: max(1, len(data) // 2)])
            number = getattr(errno, self.disk.fault)
            raise OSError(number, os.strerror(number))  # InterruptedError for EINTR, after which Python goes on
        return super().write(data)


def in_this_process(
    workspace: Workspace, folder: str, pending: list[Any], work: Any, concurrency: int | None, title: str, done: int
) -> None:
    """What `_run` does, without Ray."""
    import pickle

    for shard in pending:
        error = _attempt(workspace, folder, f"{shard['index']:05d}", shard, work)
        if error:
            raise pickle.loads(error)


def run(root: Path, source: Path) -> tuple[str, list[str]]:
    """Ingest and clean; the digest of what is left, and its rows."""
    place = Place(Workspace(str(root)), "ingest", "f")
    read = finished(place, IngestStage(Ingest(source=str(source), shard_bytes=600)).run(place, Inputs()))
    assert len(read.report.outputs.rows) > 4
    place = Place(Workspace(str(root)), "clean", "f")
    report: CleanReport = CleanStage(Clean(process=PROCESS)).run(place, CleanInputs(read))
    cleaned = finished(place, report)
    return report.digest, [row["row_id"] for row in rows_of(cleaned, report.outputs.rows)]


def complete(root: Path) -> Iterator[Path]:
    """What counts: everything that commits and manifests name."""
    for path in root.rglob("*.parquet"):
        commits = path.parents[1] / "commits"
        if any(path.name in commit.read_text(encoding="utf-8") for commit in commits.glob("*.json")):
            yield path


def try_all(
    tmp_path: Path, cases: list[tuple[str, int]], on_disk: Callable[[Disk], AbstractContextManager[None]]
) -> dict[str, int]:
    """Ingest and clean on disks of each kind, and once more on one that is well; returns how they ended."""
    source = write_lines(tmp_path / "rows.jsonl", LINES)
    wanted = run(tmp_path / "straight", source)
    assert len(wanted[1]) == len(TEXTS)
    counts = {"equal": 0, "refused": 0}
    for fault, kth in cases:
        root, disk = tmp_path / f"{fault}-{kth}", Disk(fault, kth)
        try:
            with on_disk(disk):
                found = run(root, source)
        except DanluError as error:
            assert fault in ("fsync", "ENOSPC", "EIO"), (fault, kth, error)
            assert str(root) in str(error) and "what is finished is kept" in str(error), error
            assert "\n" not in str(error), error
            counts["refused"] += 1
        else:
            assert found == wanted, (fault, kth)
            assert disk.failed == 0 or fault in ("short", "EINTR"), (fault, kth)
            counts["equal"] += 1
        for path in complete(root):
            pq.read_table(path)  # whole
        for path in root.rglob("*.json"):
            json.loads(path.read_bytes())
        assert run(root, source) == wanted, (fault, kth)  # on a disk that is well again
    return counts


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Callable[[Disk], AbstractContextManager[None]]:
    """Shards run in this process, and all that is written goes to the disk."""
    monkeypatch.setattr(shards, "_run", in_this_process)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no power is lost here, and each takes milliseconds
    return Disk.in_use


def test_a_disk_that_fails_now_and_then(tmp_path: Path, here: Callable[[Disk], AbstractContextManager[None]]) -> None:
    cases = [*itertools.product(FAULTS, (1, 2, 3, 5, 8, 13, 21, 34, 55, 89))]
    counts = try_all(tmp_path, cases, here)
    assert counts["equal"] >= 20 and counts["refused"] >= 10


@pytest.mark.slow
def test_a_disk_that_fails_at_every_kth_call(
    tmp_path: Path, here: Callable[[Disk], AbstractContextManager[None]]
) -> None:
    counts = try_all(tmp_path, [*itertools.product(FAULTS, range(1, KTH + 1))], here)
    print(f"{len(FAULTS)} faults x every k-th call up to {KTH}: {counts}")
    assert sum(counts.values()) == len(FAULTS) * KTH


def test_the_data_are_enough_for_every_kth_call_to_come(
    tmp_path: Path, here: Callable[[Disk], AbstractContextManager[None]]
) -> None:
    source = write_lines(tmp_path / "rows.jsonl", LINES)
    for fault in FAULTS:
        disk = Disk(fault, kth=1 << 30)
        with here(disk):
            run(tmp_path / fault, source)
        assert disk.calls >= KTH, fault


@contextmanager
def in_workers(disk: Disk) -> Iterator[None]:
    """What shards write in Ray's workers goes to a disk of that kind, a new one for each shard."""
    fault, kth = disk.fault, disk.kth

    def attempt(*arguments: Any) -> bytes:
        with Disk(fault, kth).in_use():
            return _attempt(*arguments)

    with patch.object(shards, "_attempt", attempt):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_disk_that_fails_under_ray_s_workers(tmp_path: Path) -> None:
    draw = random.Random(SEED)
    cases = draw.sample([*itertools.product(FAULTS, range(1, 31))], DRAWN)
    counts = try_all(tmp_path, cases, in_workers)
    print(f"{DRAWN} drawn, on Ray: {counts}")
    assert min(counts.values()) >= DRAWN // 5
