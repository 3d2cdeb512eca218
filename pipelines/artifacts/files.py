"""Files outside the workspace, which people name: written whole or not at all, and never over somebody's work."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import fsspec

from pipelines.errors import InputError


def size_of(path: str) -> int | None:
    """The size of a file outside the workspace in bytes, None where there is none."""
    fs, inner = fsspec.core.url_to_fs(path)
    return int(fs.size(inner)) if fs.exists(inner) else None


def require_new(path: Path) -> None:
    """InputError where a file lies at `path`: it may be somebody's work."""
    if path.exists():
        raise InputError(f"{path}: exists already; name another file")


@contextmanager
def created(path: str, name: str) -> Iterator[IO[bytes]]:
    """A file that appears under its name only when it is complete; on object storage every file does.

    InputError, which calls it by `name`, where it cannot be written.
    """
    if "://" in path:
        with fsspec.open(path, "wb") as stream:
            yield stream
        return
    target = Path(path).absolute()
    beside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(beside, "wb") as stream:
            yield stream
        os.replace(beside, target)
    except OSError as error:
        raise InputError(f"{name}: cannot be written ({error})") from None
    finally:
        if beside.exists():  # missing_ok does not cover a parent that is a file
            beside.unlink()
