"""One run at a time in a workspace on object storage: an object that the run writes again and again.

Who finds the object watches it: where it changes, its run is at work; where it does not for `LEASE_SECONDS`, that run
was killed, and the object is taken over. Only changes count, so no two clocks are compared.
"""

import json
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from pipelines.clean_up import clean_up
from pipelines.errors import DanluError, StageError
from pipelines.progress import say, waiting

LEASE_SECONDS = 20.0
BEAT_SECONDS = 5.0
"""How often the object is written; a run that cannot for `LEASE_SECONDS` may lose its workspace to another."""
LOOK_SECONDS = 1.0
RELEASE_SECONDS = 20


class Storage(Protocol):
    """What a lease needs of a workspace."""

    def read(self, path: str) -> bytes: ...
    def write(self, path: str, data: bytes) -> None: ...
    def write_if_absent(self, path: str, data: bytes) -> bool: ...
    def remove(self, path: str) -> None: ...


@contextmanager
def leased(storage: Storage, path: str) -> Iterator[None]:
    """Hold the object at `path` while this is open; StageError names the run that has it."""
    lease = _Lease(storage, path)
    lease.take()
    lease.beater.start()
    try:
        yield
    finally:
        lease.ended.set()
        clean_up("giving the workspace free", lease.release, RELEASE_SECONDS)


class _Lease:
    def __init__(self, storage: Storage, path: str) -> None:
        self._storage, self._path = storage, path
        self._id, self._beat = secrets.token_hex(8), 0
        self.ended = threading.Event()
        self.beater = threading.Thread(target=self._beat_until_ended, name="lease", daemon=True)

    def take(self) -> None:
        while not self._storage.write_if_absent(self._path, self._content()):
            holder = self._still_held()
            if holder is not None:
                place = self._path.rpartition("/")[0]
                raise StageError(f"{place}: {holder} is at work here; wait for it or stop it")
            with suppress(FileNotFoundError):
                self._storage.remove(self._path)
        self._beat += 1
        if self._storage.write_if_absent(self._path, self._content()):
            self._storage.remove(self._path)
            raise StageError(
                f"{self._path}: the storage replaces an object though told not to, so two runs could mix what they "
                "commit; an OSS bucket with versioning on or suspended does: take one that never had it"
            )

    def release(self) -> None:
        self.beater.join(RELEASE_SECONDS)
        if self._is_ours(self._read()):
            self._storage.remove(self._path)

    def _still_held(self) -> str | None:
        """The run that writes the object, None where it is gone or nobody has written it for a while."""
        first = self._read()
        if first is None:
            return None
        until = time.monotonic() + LEASE_SECONDS
        with waiting(f"{holder_in(first)} was at work here; watching whether it still is"):
            while time.monotonic() < until:
                time.sleep(LOOK_SECONDS)
                now = self._read()
                if now != first:
                    return None if now is None else holder_in(now)
        return None

    def _beat_until_ended(self) -> None:
        while not self.ended.wait(BEAT_SECONDS):
            try:
                held = self._read()
                if held is not None and not self._is_ours(held):
                    say(f"{holder_in(held)} has taken the workspace over, which this run could not write for a while")
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                self._beat += 1
                self._storage.write(self._path, self._content())
            except (DanluError, OSError) as error:
                say(f"  cannot say that this run is at work, trying again: {error}")

    def _content(self) -> bytes:
        holder = f"process {os.getpid()} on {socket.gethostname()}"
        return json.dumps({"holder": holder, "id": self._id, "beat": self._beat}).encode()

    def _read(self) -> bytes | None:
        try:
            return self._storage.read(self._path)
        except FileNotFoundError:
            return None

    def _is_ours(self, content: bytes | None) -> bool:
        return content is not None and _parsed(content).get("id") == self._id


def holder_in(content: bytes) -> str:
    """The run that wrote a lease's object."""
    return str(_parsed(content).get("holder", "another run"))


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except ValueError:
        return {}
    return parsed if isinstance(parsed, dict) else {}
