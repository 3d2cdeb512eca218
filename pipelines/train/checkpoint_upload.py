"""Checkpoints copied to other storage while training goes on, each rank what it owns: a lost disk loses no run.

<train.checkpoint_copies>/<fingerprint>/checkpoint-<step>/
    the checkpoint's files, and the journals as they were
    complete-<rank>.json      written last by each rank: how many ranks copy, when the checkpoint was completed, sizes
                              and SHA-256 of what this one copied, and an HMAC of all that by the run's key

A copy counts once every rank has written its part of the same checkpoint; nothing else is ever restored.

Checkpoints hold pickles, which run code when they are loaded, and others may be able to write to the storage. So it is
not trusted: what no key of this run signed is not read further than its signature, and a name that leads out of the
checkpoint's folder is refused even if it is signed.
"""

import hashlib
import hmac
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from pydantic import BaseModel, ConfigDict

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import InputError, StageError
from pipelines.progress import say
from pipelines.train.checkpoint import MANIFEST, PREFIX, complete_checkpoints, mark_complete, step_of
from pipelines.train.run import Run

CHUNK = 16 << 20
MAX_MANIFEST = 16 << 20
"""Bytes of a manifest that are read before it is known who wrote it."""
KEY = "DANLU_COPIES_KEY"
"""Environment variable with the secret that copies are signed with; else the workspace has one of its own."""
MIN_KEY = 16
"""Characters of a secret that is not to be guessed."""
_OWNER = re.compile(r"(?:rank|rng_state)_(\d+)")


class CopiedFile(BaseModel):
    """What a rank says of a file that it copied."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int
    sha256: str


class Part(BaseModel):
    """What one rank says of its part of a copy; its JSON text is what is signed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    run: str
    """The run's folder, so that a copy of another run does not pass for one of this."""
    checkpoint: str
    rank: int
    ranks: int
    completed: int
    """When the checkpoint was completed, nanoseconds; equal in all parts of one copy."""
    files: dict[str, CopiedFile]


def copies_key(workspace: Workspace) -> bytes:
    """The key that copies are signed with: from the environment, or else made once and kept in the workspace.

    InputError where the environment's is too short, or what the workspace keeps is no key.
    """
    if secret := os.environ.get(KEY):
        if len(secret) < MIN_KEY:
            raise InputError(f"{KEY}: a secret of {MIN_KEY} characters or more is needed")
        return hashlib.sha256(secret.encode()).digest()
    path = workspace.local("copies.key")
    path.parent.mkdir(parents=True, exist_ok=True)
    made = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    with open(os.open(made, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as stream:
        stream.write(secrets.token_hex(32))
        stream.flush()
        os.fsync(stream.fileno())
    try:
        os.link(made, path)  # whole, or not at all
    except FileExistsError:
        pass
    else:
        say(
            f"  training: copies are signed by {path}; a run whose workspace is lost goes on from them only with that "
            f"file, or with {KEY} set from the beginning"
        )
    finally:
        made.unlink()
    key = path.read_bytes()
    if re.fullmatch(rb"[0-9a-f]{64}", key) is None:  # anybody could sign with an empty one
        raise InputError(
            f"{path}: not a key that was made here, but empty or cut; restore it, or delete it, with which copies that "
            "it signed are of no use"
        )
    return hashlib.sha256(key).digest()


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
    """Fetch the newest whole copy where it is newer than what lies here; the journals too where there are none.

    StageError where there are newer ones, and none that is signed by this run's key; nothing of them was used.
    """
    storage = _storage_of(copies, run.folder)
    with _reaching(storage, run.checkpoints):
        last = max(map(step_of, complete_checkpoints(run.checkpoints)), default=0)
        newer = sorted((name for name in _names(storage) if _step(name) > last), key=_step, reverse=True)
        forged: list[str] = []
        for name in newer:
            try:
                files = _files(run, storage, name)
            except _NotSigned:
                forged.append(name)
                continue
            if files:
                _restore(run, storage, name, files)
                break
        else:
            if forged:
                raise StageError(
                    f"train.checkpoint_copies {storage.root}: {', '.join(forged)}: not signed by this run's key, so "
                    f"nothing of it is loaded. Set {KEY}, or put copies.key of the workspace that wrote it into this "
                    "one; or delete it there to begin again"
                )
            return
    if forged:
        say(f"  training: passed over in {storage.root}, not signed by this run's key: {', '.join(forged)}")
    say(f"  training: {name} fetched from {storage.root}")


def _restore(run: Run, storage: Workspace, name: str, files: dict[str, CopiedFile]) -> None:
    target = run.checkpoints / name
    if target.is_symlink():
        target.unlink()
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    journals = {path.name: path for path in (run.journal, run.samples)}
    for file, facts in files.items():
        path = journals.get(file, target / file)
        if not (file in journals and path.exists()):
            _fetch(storage, storage.path(name, file), path, facts)
    mark_complete(target)


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
    except StageError as error:
        if str(error).startswith("train.checkpoint_copies"):
            raise
        raise StageError(f"train.checkpoint_copies {storage.root}: {error}; what is in {kept} is kept") from error
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
    copied = {}
    for name, path in files.items():
        with path.open("rb") as source, storage.create(storage.path(checkpoint.name, name)) as sink:
            copied[name] = _pass_on(source, sink, path.stat().st_size)
    completed = (checkpoint / MANIFEST).stat().st_mtime_ns
    part = Part(
        run=run.folder.name, checkpoint=checkpoint.name, rank=rank, ranks=ranks, completed=completed, files=copied
    )
    text = part.model_dump_json()
    storage.write(manifest, json.dumps({"part": text, "hmac": _hmac(run, text)}).encode())
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
    whole = next((_step(name) for name in newest_first if _is_whole(run, storage, name)), 0)
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
    return [name for name in names if re.fullmatch(rf"{PREFIX}[0-9]{{1,15}}", name)]


def _step(name: str) -> int:
    return int(name.removeprefix(PREFIX))


class _NotSigned(Exception):
    """A manifest that no key of this run signed."""


def _is_whole(run: Run, storage: Workspace, name: str) -> bool:
    try:
        return bool(_files(run, storage, name))
    except _NotSigned:
        return False


def _files(run: Run, storage: Workspace, name: str) -> dict[str, CopiedFile]:
    """The files of a copy; empty while a rank's part is missing, or is of another time."""
    parts: list[Part] = []
    while not parts or len(parts) < parts[0].ranks:
        path = storage.path(name, f"complete-{len(parts)}.json")
        if not storage.exists(path):
            return {}
        part = _signed(run, storage, path)
        if (part.run, part.checkpoint, part.rank) != (run.folder.name, name, len(parts)):
            raise _NotSigned(path)  # it is, for another place
        parts.append(part)
    if len({(part.completed, part.ranks) for part in parts}) > 1:
        return {}
    files = {file: facts for part in parts for file, facts in part.files.items()}
    for file in files:
        if not _stays_inside(file):
            raise StageError(f"{storage.path(name)}: names the file {file!r}, which lies outside; delete its folder")
    return files


def _signed(run: Run, storage: Workspace, path: str) -> Part:
    """What a manifest says, once its signature is right; not a byte of it is interpreted before, but for that."""
    with _opened(storage, path) as stream:
        data = stream.read(MAX_MANIFEST + 1)
    if len(data) > MAX_MANIFEST:
        raise _NotSigned(path)
    try:
        manifest: Any = json.loads(data)
        text, given = manifest["part"], manifest["hmac"]
        if not hmac.compare_digest(_hmac(run, text).encode(), given.encode()):
            raise _NotSigned(path)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise _NotSigned(path) from None
    return Part.model_validate_json(text)


def _hmac(run: Run, text: str) -> str:
    if not run.copies_key:
        raise RuntimeError("copies are signed; the driver has to give the run a key")
    return hmac.new(run.copies_key, text.encode(), hashlib.sha256).hexdigest()


def _stays_inside(file: str) -> bool:
    """Whether a name is that of a file below its folder, spelt in the one way in which it is copied."""
    path = PurePosixPath(file)
    return file == str(path) and not path.is_absolute() and not {"..", "."} & {*path.parts} and "\0" not in file


@contextmanager
def _opened(storage: Workspace, path: str) -> Iterator[IO[bytes]]:
    """A file of the storage. In a folder it has to be one: a pipe would block, and a link shows another file."""
    if storage.is_local:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as stream:
            yield stream
    else:
        with storage.fs.open(path, "rb") as stream:
            yield stream


def _pass_on(source: IO[bytes], sink: IO[bytes], size: int) -> CopiedFile:
    """Copy a file of that size, or one byte of what is too much."""
    digest, copied = hashlib.sha256(), 0
    while copied <= size and (data := source.read(min(CHUNK, size + 1 - copied))):
        sink.write(data)
        digest.update(data)
        copied += len(data)
    return CopiedFile(size=copied, sha256=digest.hexdigest())


def _fetch(storage: Workspace, source: str, path: Path, wanted: CopiedFile) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f"{path.name}.part")  # a journal that is there is taken for a whole one
    with _opened(storage, source) as stream, scratch.open("wb") as sink:
        found = _pass_on(stream, sink, wanted.size)
    if found != wanted:
        scratch.unlink()
        raise StageError(f"{source}: not the {wanted.size} bytes that were copied; delete its folder there")
    scratch.replace(path)
