"""Files outside the workspace, which people name: written whole or not at all, and never over somebody's work."""

import fcntl
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import fsspec
import xxhash
from fsspec.utils import glob_translate

from pipelines.artifacts.workspace import FULL, Workspace, sync_folder, to_json
from pipelines.errors import InputError, StageError
from pipelines.recipe.paths import shipped_path

REMEMBERED = 4
"""Digests that are kept of one path: the last ones, since a crash may come between noting one and writing the file."""
_CHUNK = 4 << 20


@dataclass(frozen=True)
class Destination:
    """A path outside the workspace that a recipe's key or an option names to be written."""

    name: str
    """What names it, such as `export.path`."""
    path: str
    consent: str
    """What a person says to have a file there replaced, such as `export.overwrite: true`."""
    overwrite: bool = False
    """Whether they said it."""
    reads: Mapping[str, str] = field(default_factory=dict)
    """What the recipe reads, by key: never written over, whatever is said."""


def size_of(path: str) -> int | None:
    """The size of a file outside the workspace in bytes, None where there is none."""
    fs, inner = fsspec.core.url_to_fs(path)
    return int(fs.size(inner)) if fs.exists(inner) else None


def refusal(destination: Destination, workspace: Workspace | None) -> str | None:
    """Why nothing may be written there; None where something may.

    That is a new path, a file that `workspace` notes to have written and that is unchanged since, or any other file
    where the person said to replace it. Never what the recipe reads. Without a workspace every file is somebody's.
    """
    path = destination.path
    for key, source in destination.reads.items():
        if _takes_in(source, path):
            return f"{path} is what {key} names, and would be written over; give it another name"
    where = _absolute(path)
    if not (os.path.lexists(where) if _is_local(where) else Workspace(where).exists(where)):
        return None
    if _is_local(where) and not os.path.isfile(where):
        return f"{path} exists already and is not a file; name another one"
    if destination.overwrite:
        return None
    written = _written(workspace, where) if workspace else []
    if not written:
        return f"{path} exists already; name another file, or say {destination.consent} to replace it"
    if _digest(where) not in written:
        return f"{path} was changed since it was written; name another file, or say {destination.consent} to replace it"
    return None


def require_writable(destination: Destination, workspace: Workspace | None) -> None:
    """InputError with the reason where `refusal` has one."""
    if reason := refusal(destination, workspace):
        raise InputError(f"{destination.name}: {reason}")


@contextmanager
def created(destination: Destination, workspace: Workspace | None) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it is complete, and that `workspace` notes to have written.

    InputError where `refusal` has a reason, or where it cannot be written.
    """
    require_writable(destination, workspace)
    where = _absolute(destination.path)
    try:
        with _beside(where) if _is_local(where) else _uploaded(where) as stream:
            sink = _Digesting(stream)
            yield sink  # type: ignore[misc]  # all that writers ask of a file
            require_writable(destination, workspace)  # what somebody put there meanwhile is theirs
            if workspace is not None:
                # Before the file appears: one that is there without its note would be somebody's.
                _note(workspace, where, sink.digest.hexdigest())
    except OSError as error:
        if error.errno in FULL:
            raise StageError(f"{destination.name} {destination.path}: no room to write it ({error})") from None
        raise InputError(f"{destination.name} {destination.path}: cannot be written ({error})") from None


class _Digesting(io.BufferedIOBase):
    """Passes on what is written, and digests it; closing it leaves the file beneath open."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.digest = stream, xxhash.xxh3_128()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return self.stream.write(data)

    def tell(self) -> int:
        return self.stream.tell()

    def flush(self) -> None:
        if not self.stream.closed:
            self.stream.flush()


@contextmanager
def _beside(where: str) -> Iterator[IO[bytes]]:
    """A file on disk under another name, which takes the place of `where` when it is complete."""
    target = Path(where)
    beside = target.with_name(f".{target.name[:200]}.{secrets.randbelow(10**12)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(beside, flags, 0o666), "wb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)  # while it lives
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, target)
        sync_folder(str(target.parent))
    finally:
        if os.path.lexists(beside):  # missing_ok does not cover a parent that is a file
            beside.unlink()


def _sweep(target: Path) -> None:
    """Remove what processes that were killed left beside a file; what is no plain file of ours stays."""
    left = re.compile(rf"\.{re.escape(target.name[:200])}\.[0-9]+\.tmp")
    for path in [path for path in target.parent.iterdir() if left.fullmatch(path.name)]:
        with suppress(OSError), open(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK), "rb+") as stream:
            found = os.fstat(stream.fileno())
            if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()


@contextmanager
def _uploaded(where: str) -> Iterator[IO[bytes]]:
    """An object that appears when it is complete; closing a stream would complete one that an error cut short."""
    fs, inner = fsspec.core.url_to_fs(where)
    stream = fs.open(inner, "wb", autocommit=False)
    try:
        yield stream
    except BaseException:
        stream.discard()
        raise
    stream.close()
    stream.commit()


def _is_local(path: str) -> bool:
    return "://" not in path


def _note_path(workspace: Workspace, where: str) -> str:
    return workspace.path("written", f"{sha256(where.encode()).hexdigest()[:16]}.json")


def _written(workspace: Workspace, where: str) -> list[str]:
    """Digests of what the workspace wrote to a path, the last one at the end."""
    path = _note_path(workspace, where)
    digests: list[str] = workspace.read_json(path)["digests"] if workspace.exists(path) else []
    return digests


def _note(workspace: Workspace, where: str, digest: str) -> None:
    digests = [*_written(workspace, where), digest][-REMEMBERED:]
    workspace.write(_note_path(workspace, where), to_json({"path": where, "digests": digests}))


def _digest(where: str) -> str:
    digest = xxhash.xxh3_128()
    with fsspec.open(where, "rb") as stream:
        while data := stream.read(_CHUNK):
            digest.update(data)
    return digest.hexdigest()


def _takes_in(source: str, path: str) -> bool:
    """Whether a source, which may be a folder or a glob, has a file of that path or would have it."""
    path = _absolute(path)
    for part in source.split("::"):  # fsspec's chains, such as zip://a.csv::rows.zip
        part = _absolute(part)
        if path == part or path.startswith(part + "/") or re.match(glob_translate(part), path) is not None:
            return True
    return False


def _absolute(path: str) -> str:
    """One spelling for each place: an absolute path without links, or a URL."""
    path = re.sub(r"^(?:file|local)://", "", shipped_path(path)).rstrip("/")
    if not _is_local(path):
        return re.sub(r"^s3a://", "s3://", path)
    return os.path.realpath(os.path.expanduser(path))
