"""Temporary folders of engines, for vLLM's sockets: removed with the engine, or by the next one where it was killed."""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LONGEST_TEMPORARY = 107 - len("/danlu-12345678/") - 36
"""The longest path of a folder in which an engine's folder can hold sockets: Linux allows 107 bytes, a UUID has 36."""

LOCK = "lock"
"""A file in each folder, locked by the process that owns the folder for as long as it lives."""


@contextmanager
def short_folder() -> Iterator[str]:
    """A temporary folder for one engine, whose path leaves room for the names of vLLM's sockets.

    Those of engines that were killed are removed before.
    """
    sweep()
    with (
        tempfile.TemporaryDirectory(prefix="danlu-", dir=_parent(), ignore_cleanup_errors=True) as folder,
        open(f"{folder}/.{LOCK}", "w") as lock,
    ):
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.rename(lock.name, f"{folder}/{LOCK}")  # not seen by others before it is locked
        yield folder


def sweep() -> None:
    """Remove the folders on this machine whose owners are dead."""
    for file in Path(_parent()).glob(f"danlu-*/{LOCK}"):
        try:
            with file.open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(file.parent, ignore_errors=True)
        except (BlockingIOError, FileNotFoundError):  # its owner lives, or has just removed it
            continue


def _parent() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual) <= LONGEST_TEMPORARY else "/tmp"
