"""Checkpoints copied to other storage while training goes on, each rank what it owns: a lost disk loses no run.

<train.checkpoint_copies>/<fingerprint>/checkpoint-<step>/
    the checkpoint's files, and the journals as they were
    complete-<rank>.json      written last by each rank: how many ranks copy, when the checkpoint was completed, and
                              the sizes of what this one copied

A copy counts once every rank has written its part of the same checkpoint; nothing else is ever restored.
"""

import json
import re
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import StageError
from pipelines.progress import say
from pipelines.train.checkpoint import MANIFEST, PREFIX, complete_checkpoints, mark_complete, step_of
from pipelines.train.run import Run

CHUNK = 16 << 20
_OWNER = re.compile(r"(?:rank|rng_state)_(\d+)")


class CheckpointUpload:
    """Copies this rank's part of one checkpoint at a time, in the background."""

    def __init__(self, run: Run, copies: str, rank: int, ranks: int) -> None:
        """`copies`: where to, as `train.checkpoint_copies` says."""
        self.run, self.rank, self.ranks = run, rank, ranks
        self.storage = _storage_of(copies, run.folder)
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint-upload")
        self.last: Future[None] | None = None

    def begin(self, checkpoint: Path) -> None:
        """Start copying a complete checkpoint."""
        self.last = self.pool.submit(_copy, self.run, self.storage, checkpoint, self.rank, self.ranks)

    def finish(self) -> None:
        """Wait until the last one is copied; StageError where that failed."""
        if self.last is not None:
            with _reaching(self.storage, self.run.checkpoints):
                self.last.result()
            self.last = None


def restore(run: Run, copies: str) -> None:
    """Fetch the newest whole copy where it is newer than what lies here; the journals too where there are none."""
    storage = _storage_of(copies, run.folder)
    with _reaching(storage, run.checkpoints):
        last = max(map(step_of, complete_checkpoints(run.checkpoints)), default=0)
        newer = sorted((name for name in _names(storage) if _step(name) > last), key=_step, reverse=True)
        whole = next(((name, files) for name in newer if (files := _files(storage, name))), None)
        if whole is None:
            return
        name, files = whole
        target = run.checkpoints / name
        shutil.rmtree(target, ignore_errors=True)
        journals = {path.name: path for path in (run.journal, run.samples)}
        for file, size in files.items():
            path = journals.get(file, target / file)
            if not (file in journals and path.exists()):
                _fetch(storage, storage.path(name, file), path, size)
        mark_complete(target)
    say(f"  training: {name} fetched from {storage.root}")


def discard(copies: str, folder: Path) -> None:
    """Delete the copies of the run in `folder`, which is to be done again; StageError where they stay."""
    storage = _storage_of(copies, folder)
    with _reaching(storage, folder):
        for name in _names(storage):
            _remove(storage, name)


@contextmanager
def _reaching(storage: Workspace, kept: Path) -> Iterator[None]:
    """What goes wrong with the storage as a StageError; each kind of storage has its own family of errors."""
    try:
        yield
    except StageError:
        raise
    except Exception as error:
        raise StageError(
            f"train.checkpoint_copies {storage.root}: {type(error).__name__}: {error}; what is in {kept} is kept. "
            "Look after the storage or leave the key out, then run again"
        ) from error


def _storage_of(copies: str, folder: Path) -> Workspace:
    return Workspace(f"{copies.rstrip('/')}/{folder.name}")


def _copy(run: Run, storage: Workspace, checkpoint: Path, rank: int, ranks: int) -> None:
    manifest = storage.path(checkpoint.name, f"complete-{rank}.json")
    if storage.exists(manifest):  # of the same step, before the run was set back
        storage.remove(manifest)
    files = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
    files = {name: path for name, path in files.items() if name != MANIFEST and _owner(name) % ranks == rank}
    if rank == 0:
        files |= {path.name: path for path in (run.journal, run.samples) if path.is_file()}
    sizes = {}
    for name, path in files.items():
        with path.open("rb") as source, storage.create(storage.path(checkpoint.name, name)) as sink:
            shutil.copyfileobj(source, sink, CHUNK)
            sizes[name] = source.tell()
    part = {"ranks": ranks, "completed": (checkpoint / MANIFEST).stat().st_mtime_ns, "files": sizes}
    storage.write(manifest, json.dumps(part).encode())
    if rank == 0:
        _remove_old(run, storage)


def _owner(name: str) -> int:
    """The rank that wrote a file, by its name; what no name says is rank 0's."""
    match = _OWNER.search(name.rpartition("/")[2])
    return int(match[1]) if match else 0


def _remove_old(run: Run, storage: Workspace) -> None:
    """Delete copies of checkpoints that are no longer here, but none as long as no newer one is whole."""
    kept = {folder.name for folder in complete_checkpoints(run.checkpoints)}
    newest_first = sorted(_names(storage), key=_step, reverse=True)
    whole = next((_step(name) for name in newest_first if _files(storage, name)), 0)
    for name in newest_first:
        if name not in kept and _step(name) < whole:
            _remove(storage, name)


def _remove(storage: Workspace, name: str) -> None:
    """Delete a copy, its manifests first, so that what a crash leaves of it does not count."""
    for path in storage.list(storage.path(name)):
        if path.rpartition("/")[2].startswith("complete-"):
            storage.remove(path)
    if storage.exists(storage.path(name)):
        storage.fs.rm(storage.path(name), recursive=True)


def _names(storage: Workspace) -> list[str]:
    names = [path.rstrip("/").rpartition("/")[2] for path in storage.list(storage.root)]
    return [name for name in names if re.fullmatch(rf"{PREFIX}\d+", name)]


def _step(name: str) -> int:
    return int(name.removeprefix(PREFIX))


def _files(storage: Workspace, name: str) -> dict[str, int]:
    """The files of a copy and their sizes; empty while a rank's part is missing, or is of another time."""
    parts: list[dict[str, Any]] = []
    while not parts or len(parts) < parts[0]["ranks"]:
        path = storage.path(name, f"complete-{len(parts)}.json")
        if not storage.exists(path):
            return {}
        parts.append(storage.read_json(path))
    if len({part["completed"] for part in parts}) > 1:
        return {}
    return {file: size for part in parts for file, size in part["files"].items()}


def _fetch(storage: Workspace, source: str, path: Path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.part")  # a journal that is there is taken for a whole one
    with storage.fs.open(source, "rb") as stream, scratch.open("wb") as sink:
        shutil.copyfileobj(stream, sink, CHUNK)
    if scratch.stat().st_size != size:
        raise StageError(f"{source}: {scratch.stat().st_size} bytes, and {size} were copied; delete its folder there")
    scratch.replace(path)
