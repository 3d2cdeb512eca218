"""Where artifacts live: one folder or fsspec URL per run of a recipe.

    <workspace>/<stage>/<fingerprint>/     one stage's output; the folder's name says what it was made from
        manifest.json                      written last: with it the stage is complete
        <pass>/plan.json, commits/, data/  work over data, see pipelines/artifacts/shards.py
    <workspace>/models/                    models converted or fetched once
    <workspace>/.made/                     the fingerprint that each stage had last, for where its sources are not
    <workspace>/report.html

What a stage is and what its manifest holds: stage.py.

Nothing is ever renamed or changed in place, so a local folder and object storage behave alike.
"""

import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Protocol

import fsspec
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
from fsspec.archive import AbstractArchiveFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from pipelines.artifacts.lease import holder_in, leased
from pipelines.errors import DanluError, DataError, InputError, StageError

FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
"""What a write fails with where there is no room."""

TEMPORARY = (MemoryFileSystem, AbstractArchiveFileSystem)
"""File systems at which no other process finds what one has written, or that change no file they hold."""

PARQUET_END = b"PAR1"

STORAGE_CLIENTS = ("botocore", "aiobotocore", "s3fs", "gcsfs", "google", "adlfs", "azure", "aiohttp")
"""Packages whose errors tell of object storage, and none of which derives them from OSError."""


class Origin(Protocol):
    """The workspace on object storage for which a folder stands, on one of several nodes; see staging.py."""

    workspace: "Workspace"

    def fetch(self, *parts: str) -> None:
        """Bring what lies below a path of the workspace into the folder, if it is not there."""

    def store(self) -> None:
        """Bring what is new or changed in the folder to the workspace."""


@dataclass(frozen=True)
class Workspace:
    """The root of one run's artifacts: an absolute local path or an fsspec URL."""

    root: str
    origin: Origin | None = field(default=None, compare=False, repr=False)
    """Where the work on this folder is spread over nodes that do not see it, and have to keep to its origin."""

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system the root lies on; InputError for a scheme that is unknown, or whose package is missing."""
        try:
            # A listing that this process remembers would hide what workers wrote since.
            return fsspec.core.url_to_fs(self.root, use_listings_cache=False)[0]
        except (ImportError, ValueError) as error:
            raise InputError(f"{self.root}: {error}") from None

    @property
    def is_local(self) -> bool:
        """Whether other programs can open its paths directly."""
        return "://" not in self.root

    def path(self, *parts: str) -> str:
        """A path below the root, with the scheme where it has one."""
        return "/".join([self.root, *parts])

    def local(self, *parts: str) -> Path:
        """A path below the root for engines that need a folder; refused on object storage."""
        if not self.is_local:
            raise InputError(f"{self.root}: this needs a folder that every node sees, not a URL")
        return Path(self.root, *parts)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Keep other runs out while this is open; StageError names the run that is in."""
        path = self.path(".running")
        if not self.is_local:
            with leased(self, path):
                yield
            return
        with _told(path, "written"):
            self.make_folder(self.root)
            # Others may be able to write here: no link of theirs is followed, and a pipe does not block.
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
        with os.fdopen(descriptor, "r+", encoding="utf-8") as holder:
            if not _locks(holder, fcntl.LOCK_EX):
                raise StageError(f"{self.root}: {holder.read()} is at work here; wait for it or stop it")
            holder.truncate(0)
            holder.write(f"process {os.getpid()} on {socket.gethostname()}")
            holder.flush()
            yield

    def at_work(self) -> str:
        """Who is in, in words; empty where nobody is. On object storage, who came in and has not left may be dead."""
        path = self.path(".running")
        if not self.is_local:
            try:
                return f"{holder_in(self.read(path))} is at work here, or was killed"
            except FileNotFoundError:
                return ""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:
            return ""
        with os.fdopen(descriptor, encoding="utf-8", errors="replace") as holder:
            return "" if _locks(holder, fcntl.LOCK_SH) else f"{holder.read()} is at work here"

    def make_folder(self, folder: str) -> None:
        """Create a local folder and those above it, so that they survive a power loss.

        The root is for its owner alone; one that exists keeps its mode.
        """
        if not os.path.isdir(self.root):
            _make_folder(os.path.dirname(self.root), 0o777)
            _make_folder(self.root, 0o700)
        _make_folder(folder, 0o777)

    def exists(self, path: str) -> bool:
        """Whether an object lies at `path`."""
        with _told(path, "looked up"):
            return bool(self.fs.exists(path))

    def read(self, path: str) -> bytes:
        """The bytes at `path`; FileNotFoundError where nothing is there."""
        with _told(path, "read"):
            data: bytes = self.fs.cat_file(path)
            return data

    def read_json(self, path: str) -> Any:
        """The JSON document at `path`; DataError where it is damaged."""
        try:
            return json.loads(self.read(path))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: not valid JSON ({error}); delete it and run again") from None

    def write(self, path: str, data: bytes) -> None:
        """Put `data` at `path`; readers see the old or the new bytes, never a part, after a power loss too."""
        with _told(path, "written"):
            if self.is_local:
                with self._written_beside(path, data) as temporary:
                    os.replace(temporary, path)
                    sync_folder(os.path.dirname(path))
            else:
                self.fs.pipe_file(path, data)

    def write_if_absent(self, path: str, data: bytes) -> bool:
        """Put `data` at `path` unless something lies there; returns whether this call wrote it."""
        with _told(path, "written"):
            if self.is_local:
                with self._written_beside(path, data) as temporary:
                    try:
                        os.link(temporary, path)
                    except FileExistsError:
                        return False
                    sync_folder(os.path.dirname(path))
                    return True
            try:
                self.fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            return True

    @contextmanager
    def _written_beside(self, path: str, data: bytes) -> Iterator[str]:
        """`data` in a file beside `path`, on disk; removed afterwards if it is still there."""
        folder = os.path.dirname(path)
        temporary = ""
        try:
            self.make_folder(folder)
            temporary = f"{folder}/.{secrets.token_hex(8)}.tmp"
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            yield temporary
        finally:
            if os.path.exists(temporary):
                os.unlink(temporary)

    def files(self, path: str) -> list[str]:
        """All objects below `path`, sorted; empty where there is nothing.

        StageError where a bucket has one whose name would lead out of a folder that it is brought to.
        """
        with _told(path, "listed"):
            bare = str(self.fs._strip_protocol(path))
            found = sorted(path + str(name).removeprefix(bare) for name in self.fs.find(path))
        for name in found:
            if ".." in name.removeprefix(path).split("/"):
                raise StageError(f"{name}: an object with .. in its name, which is none of ours; delete it")
        return found

    def damaged(self, paths: Iterable[str]) -> list[str]:
        """Those of the files that are not there, or in a folder not whole, as where a workspace was copied in part.

        Not whole is what is empty, and Parquet without its end. Objects of a bucket are whole where they are there.
        """
        if self.is_local:
            return [path for path in paths if not _seems_whole(path)]
        wanted = list(paths)
        there = {path for folder in {path.rpartition("/")[0] for path in wanted} for path in self.files(folder)}
        return [path for path in wanted if path not in there]

    def list(self, path: str) -> list[str]:
        """Objects directly below `path`, sorted; empty where there is nothing."""
        try:
            with _told(path, "listed"):
                names = self.fs.ls(path, detail=False)
        except FileNotFoundError:
            return []
        return sorted(self.fs.unstrip_protocol(name) if not self.is_local else str(name) for name in names)

    def fetch(self, path: str, target: Path) -> None:
        """Bring an object of a URL to a file of this machine, which appears when it is complete."""
        scratch = target.with_name(f"{target.name}.part")
        with _told(path, "read"), _told(str(target), "written"):
            target.parent.mkdir(parents=True, exist_ok=True)
            self.fs.get_file(path, str(scratch))
            scratch.replace(target)

    def store(self, source: Path, path: str) -> None:
        """Bring a file of this machine to an object of a URL; FileNotFoundError where there is no such file."""
        with _told(path, "written"):
            self.fs.put_file(str(source), path)

    def remove(self, path: str) -> None:
        """Delete one object."""
        with _told(path, "deleted"):
            self.fs.rm_file(path)

    @contextmanager
    def create(self, path: str) -> Iterator[IO[bytes]]:
        """Open a new object for writing; it is on disk when this is left, so that a commit may name it."""
        with _told(path, "written"):
            if not self.is_local:
                with self.fs.open(path, "wb") as stream:
                    yield stream
                return
            folder = os.path.dirname(path)
            self.make_folder(folder)
            with open(path, "wb") as stream:
                yield stream
                stream.flush()
                os.fsync(stream.fileno())
            sync_folder(folder)

    @contextmanager
    def parquet_writer(self, path: str, schema: pa.Schema) -> Iterator[pq.ParquetWriter]:
        """Write one Parquet file, zstd, row group by row group; dictionaries of texts that hardly repeat only cost."""
        options: dict[str, Any] = {"compression": "zstd", "use_dictionary": False}
        with self.create(path) as sink, pq.ParquetWriter(sink, schema, **options) as writer:
            yield writer

    def parquet_file(self, path: str) -> pq.ParquetFile:
        """Open one Parquet file for reading; DataError where it cannot be read."""
        with readable(path):
            if self.is_local:
                return pq.ParquetFile(path, memory_map=True)
            return pq.ParquetFile(self.fs.open(path, "rb"))


@contextmanager
def readable(path: str) -> Iterator[None]:
    """What goes wrong while a file of a finished stage is read, as a DataError that says what to do."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise DataError(
            f"{path}: cannot be read ({error}); copy the workspace again, or do the file's stage again, with all after "
            "it: danlu run --from STAGE"
        ) from error


def _seems_whole(path: str) -> bool:
    end = PARQUET_END if path.endswith(".parquet") else b""
    try:
        with open(path, "rb") as file:
            file.seek(-max(len(end), 1), os.SEEK_END)
            return file.read().endswith(end)
    except PermissionError:  # who reads it says so
        return True
    except OSError:  # not there, or shorter than that
        return False


def sync_folder(folder: str) -> None:
    """Have what was created, renamed or linked in a local folder survive a power loss."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems have no such call, and keep folders themselves
            raise
    finally:
        os.close(descriptor)


def sync_tree(folder: str) -> None:
    """The same for all files and folders below a local folder, whoever wrote them."""
    for root, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(root, name)
            if os.path.isfile(path) and not os.path.islink(path):
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
        sync_folder(root)


def _locks(file: IO[str], kind: int) -> bool:
    """Whether a file that is open can be locked; tried twice, since who only looks holds it for a moment too."""
    for attempt in range(2):
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(0.1 * (1 - attempt))
    return False


def _make_folder(folder: str, mode: int) -> None:
    """Create a folder and those above it, each of them noted in the one above on disk."""
    if os.path.isdir(folder):
        return
    above = os.path.dirname(folder)
    _make_folder(above, 0o777)
    try:
        os.mkdir(folder, mode)
    except FileExistsError:
        if not os.path.isdir(folder):  # else another process was faster
            raise
    sync_folder(above)


@contextmanager
def _told(path: str, action: str) -> Iterator[None]:
    """What goes wrong with the place where artifacts lie as one line with the path, the reason and what to do.

    Whether a file is there is for the caller to judge; what goes wrong elsewhere meanwhile stays as it is.
    """
    try:
        yield
    except DanluError:
        raise
    except OSError as error:
        named = str(error.filename or path)
        is_here = named.startswith(os.path.dirname(path)) or path.startswith(named)
        if not is_here or (isinstance(error, FileNotFoundError) and action != "written"):
            raise
        if error.errno in FULL:
            raise StageError(
                f"{path}: no room to write it ({os.strerror(error.errno or 0)}); make room and run again: "
                f"what is finished is kept"
            ) from error
        reason = error.strerror or str(error)
        raise StageError(f"{path}: cannot be {action} ({reason}); what is finished is kept, run again") from error
    except Exception as error:
        # Each kind of storage has a family of errors of its own, without a common root.
        if not type(error).__module__.startswith(STORAGE_CLIENTS):
            raise
        raise StageError(
            f"{path}: cannot be {action} ({type(error).__name__}: {error}); look after the storage and its "
            "credentials, then run again: what is finished is kept"
        ) from error


@dataclass(frozen=True)
class Place:
    """One stage's folder in the workspace."""

    workspace: Workspace
    stage: str
    fingerprint: str

    def path(self, *parts: str) -> str:
        """A path in this stage's folder."""
        return self.workspace.path(self.stage, self.fingerprint, *parts)

    def local(self, *parts: str) -> Path:
        """A local path in this stage's folder, for engines that need one."""
        return self.workspace.local(self.stage, self.fingerprint, *parts)

    @property
    def seen_by_all(self) -> "Place":
        """This folder where every node of the cluster sees it."""
        origin = self.workspace.origin
        return self if origin is None else replace(self, workspace=origin.workspace)

    def within(self, *parts: str) -> "Place":
        """A folder of this stage that is filled and marked complete by itself."""
        *folders, last = parts
        return Place(self.workspace, "/".join([self.stage, self.fingerprint, *folders]), last)

    def relative(self, paths: Iterable[str]) -> list[str]:
        """Paths below this stage's folder as reports keep them, so that a workspace can be moved."""
        return [path.removeprefix(self.path() + "/") for path in paths]

    def clear(self) -> None:
        """Delete the stage's output, the manifest first, so that a crash in between leaves it incomplete."""
        folder, manifest = self.path(), self.path("manifest.json")
        if self.workspace.exists(manifest):
            self.workspace.remove(manifest)
            if self.workspace.is_local:
                sync_folder(folder)
        with _told(folder, "deleted"):
            if self.workspace.fs.exists(folder):
                self.workspace.fs.rm(folder, recursive=True)

    def finish(self, manifest: bytes) -> None:
        """Write the manifest, which marks the stage complete, once all that lies here is on disk."""
        if self.workspace.is_local:
            with _told(self.path(), "written"):
                self.workspace.make_folder(self.path())  # a stage may leave nothing but its report
                sync_tree(self.path())
                folder = self.path()
                while folder != self.workspace.root:  # other libraries may have made these
                    folder = os.path.dirname(folder)
                    sync_folder(folder)
        self.workspace.write(self.path("manifest.json"), manifest)


def fingerprint(stage: str, version: int, fingerprint_inputs: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """What a stage's output follows from, as 16 hexadecimal digits.

    `inputs` maps each stage it reads to the digest in that stage's report. Neither the commit, the time nor the
    machine enters.
    """
    # The key is the one that workspaces were made with before; another would make every stage stale.
    parts = {"stage": stage, "version": version, "determinants": fingerprint_inputs, "inputs": dict(inputs)}
    return hashlib.sha256(to_json(parts)).hexdigest()[:16]


def to_json(value: Any) -> bytes:
    """JSON for files: UTF-8, keys sorted, Chinese readable."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, indent=1).encode() + b"\n"


URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.:-]*):(?P<rest>/.*)", re.DOTALL)
"""What is meant as a URL, even where a slash or the bucket is missing."""


def _require_storage(root: str, url: re.Match[str]) -> None:
    """InputError unless this is a bucket, or a path in one, of something that keeps what is written there."""
    what = "is no bucket's URL; they look like s3://BUCKET/PATH"
    if url["rest"].startswith("//") and url["rest"][2:3] not in ("", "/") and "::" not in root:
        try:
            kind = fsspec.get_filesystem_class(url["scheme"])
        except (ValueError, ImportError) as error:
            what = f"cannot be opened: {error}"
        else:
            if not issubclass(kind, TEMPORARY) and "http" not in kind.protocol:
                return
            what = f"keeps nothing that is written to it ({url['scheme']}://)"
    raise InputError(f"--workspace {root}: {what}")


def unwritable(workspace: Workspace) -> str:
    """Why nothing can be written in a folder, as far as one can tell without writing; empty where it can."""
    if not workspace.is_local:
        return ""
    there = next(path for path in (Path(workspace.root), *Path(workspace.root).parents) if os.path.lexists(path))
    if not there.is_dir():
        return f"{there} is no folder"
    return "" if os.access(there, os.W_OK | os.X_OK) else f"nothing can be written in {there}"


def open_workspace(given: str | None, recipe_name: str, *, on_cluster: bool) -> Workspace:
    """The workspace named on the command line, or `runs/<recipe name>`.

    On a cluster a relative folder is refused: a job runs in a temporary copy of the project, which other nodes
    do not see. InputError, too, for what looks like a URL and is none, and for one at which nothing stays.
    """
    root = f"runs/{recipe_name}" if given is None else given
    if url := URL.fullmatch(root):
        if url["scheme"] not in ("file", "local"):
            _require_storage(root, url)
            return Workspace(root.rstrip("/"))
        root = url["rest"].removeprefix("//")
    if not root or (url and not (root.startswith("/") and root.strip("/"))):
        raise InputError(f"--workspace {given!r} names no folder; give a path, or file:///ABSOLUTE/PATH")
    if on_cluster and not os.path.isabs(root):
        raise InputError(
            f"--workspace {root}: on a cluster this must be a URL (s3://…) or an absolute folder that every node sees"
        )
    if os.path.exists(root) and not os.path.isdir(root):
        raise InputError(f"--workspace {root}: is a file, no folder")
    return Workspace(os.path.abspath(root))
