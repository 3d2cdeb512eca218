"""Folders that belong to processes: removed with the last, or by the next process of the kind where it was killed."""

import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

LOCK = "lock"
"""A file in each folder, locked by the process that owns the folder for as long as it lives."""
REMOVE_SECONDS = 10.0
"""How long is waited for processes that still write to a folder that is removed."""


@contextmanager
def owned_folder(parent: str | Path, prefix: str) -> Iterator[str]:
    """A folder below `parent` that only its user can enter; those of dead owners are removed before."""
    sweep(parent, prefix)
    folder = tempfile.mkdtemp(prefix=prefix, dir=parent)
    try:
        # Opened by one who may not follow links: others may be able to write to the parent, though not to the folder.
        descriptor = os.open(f"{folder}/.{LOCK}", os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.rename(f"{folder}/.{LOCK}", f"{folder}/{LOCK}")  # not seen by others before it is locked
            yield folder
        finally:
            os.close(descriptor)
    finally:
        _remove(folder)


@contextmanager
def shared_folder(parent: str | Path, prefix: str, name: str) -> Iterator[str]:
    """The folder of that name below `parent`, which several processes own together; else as `owned_folder`.

    `name` is one that nobody guesses: what lies there already is taken for theirs.
    """
    sweep(parent, prefix)
    folder = os.path.join(parent, f"{prefix}{name}")
    descriptor = _shared_lock(folder)
    try:
        yield folder
    finally:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)
        except BlockingIOError:  # others are at work there
            pass
        finally:
            os.close(descriptor)


def _shared_lock(folder: str) -> int:
    """A descriptor that holds a folder's lock together with others; the folder is made where it is missing."""
    while True:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with suppress(FileNotFoundError):  # swept before it was locked
            descriptor = os.open(f"{folder}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.lstat(f"{folder}/{LOCK}")):
                    return descriptor
            os.close(descriptor)


def _remove(folder: str | Path) -> None:
    """Remove a folder, its lock last: who is killed on the way leaves what `sweep` finds.

    Processes that end later than their owner may write there still; where they do for long, the folder keeps its lock
    for the next sweep.
    """
    until = time.monotonic() + REMOVE_SECONDS
    while not _is_gone(folder):
        if time.monotonic() > until:
            with suppress(FileNotFoundError):
                os.close(os.open(f"{folder}/{LOCK}", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600))
            return
        time.sleep(0.1)


def _is_gone(folder: str | Path) -> bool:
    """Remove what can be removed of a folder, and whether that was all."""
    with suppress(FileNotFoundError):  # swept by another
        for entry in Path(folder).iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name != LOCK:
                entry.unlink(missing_ok=True)
        if all(entry.name == LOCK for entry in Path(folder).iterdir()):
            Path(folder, LOCK).unlink(missing_ok=True)
            with suppress(OSError):  # somebody has written there since
                os.rmdir(folder)
    return not os.path.lexists(folder)


def sweep(parent: str | Path, prefix: str) -> None:
    """Remove the folders below `parent` whose owners are dead; those of other users are left alone."""
    for file in Path(parent).glob(f"{prefix}*/{LOCK}"):
        try:
            # In a folder that all write to, a link may lead anywhere and a pipe would block.
            descriptor = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
        except OSError:  # its owner has just removed it, or it is somebody else's
            continue
        try:
            lock, folder = os.fstat(descriptor), os.lstat(file.parent)
            is_ours = lock.st_uid == folder.st_uid == os.geteuid()
            if is_ours and stat.S_ISREG(lock.st_mode) and stat.S_ISDIR(folder.st_mode):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(file.parent)
        except (BlockingIOError, FileNotFoundError):  # its owner lives, or has just removed it
            continue
        finally:
            os.close(descriptor)
