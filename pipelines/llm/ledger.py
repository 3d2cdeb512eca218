"""The ledger: every answer that arrived, on disk before it counts, whatever happens afterwards.

    <workspace>/ledger/000001-5f0c9a1e.log     records, appended by one writer and never changed
    <workspace>/ledger/000001-5f0c9a1e.idx     where each record lies; written when the segment is sealed

It lies beside the stages, not in one, so that a changed recipe still finds the answers it shares with the old one. A
record has its length and a checksum; what a crash tore off at the end of a segment is left out when the segment is
indexed. The last record of a key counts. On object storage, where nothing can be appended to, each group of records is
a segment of its own until the writer closes and joins them.
"""

import asyncio
import fcntl
import os
import struct
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines.artifacts.workspace import Workspace, sync_folder
from pipelines.errors import StageError
from pipelines.progress import say

FOLDER = "ledger"
SEGMENT_BYTES = 64 << 20
GROUP_SECONDS = 0.02
"""How long the first record of a group waits for others, so that they share one fsync."""
OBJECT_SECONDS = 1.0
"""The same on object storage, where each group is an object."""
LOCK_SECONDS = 30.0

HEAD = struct.Struct("<II16sBII")
"""Payload bytes, CRC-32 of the rest of the record, key, kind, input tokens, output tokens."""

ENTRY = np.dtype(
    [("key", "V16"), ("kind", "u1"), ("input", "<u4"), ("output", "<u4"), ("offset", "<u8"), ("length", "<u4")]
)
"""One record in an index: `offset` and `length` are its payload's."""


class RecordKind(IntEnum):
    """What a record says about its key."""

    ANSWER = 1
    FAILURE = 2
    FORGOTTEN = 3
    """An earlier failure is to be tried again."""


@dataclass(frozen=True)
class LedgerRecord:
    """One thing known about a request, by its 16-byte key, and the tokens paid for it."""

    key: bytes
    kind: RecordKind
    payload: bytes
    input_tokens: int = 0
    output_tokens: int = 0


def encode(record: LedgerRecord) -> bytes:
    """A record as it stands in a segment."""
    head = HEAD.pack(
        len(record.payload), 0, record.key, record.kind, record.input_tokens & 0xFFFFFFFF, record.output_tokens
    )
    checksum = zlib.crc32(record.payload, zlib.crc32(head))
    return head[:4] + struct.pack("<I", checksum) + head[8:] + record.payload


def scan(data: bytes) -> tuple[np.ndarray[Any, Any], int]:
    """The entries of the undamaged records in a segment, and how many bytes are damaged or torn off."""
    entries = []
    at = good = 0
    view = memoryview(data)
    while at + HEAD.size <= len(data):
        length, checksum, key, kind, read, written = HEAD.unpack_from(data, at)
        end = at + HEAD.size + length
        if end > len(data):
            break
        head = data[at : at + 4] + b"\0\0\0\0" + data[at + 8 : at + HEAD.size]
        if zlib.crc32(view[at + HEAD.size : end], zlib.crc32(head)) == checksum:
            entries.append((key, kind, read, written, at + HEAD.size, length))
            good += end - at
        at = end
    return np.array(entries, dtype=ENTRY), len(data) - good


class LedgerIndex:
    """Where the records of all segments lie; holds keys and numbers, no answers."""

    def __init__(self, segments: Sequence[str], entries: Sequence[np.ndarray[Any, Any]]) -> None:
        self.segments = list(segments)
        self.entries = np.concatenate([np.empty(0, ENTRY), *entries])
        self.segment = np.repeat(np.arange(len(segments)), [len(part) for part in entries])
        self._latest_first = _fixed_size(self.entries["key"][::-1])

    def find(self, keys: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The number of each key's last record; -1 where there is none, or it is forgotten."""
        if not len(self.entries) or not len(keys):
            return np.full(len(keys), -1, np.int64)
        found = pc.index_in(pa.array(keys, pa.binary(16)), value_set=self._latest_first)
        number = len(self.entries) - 1 - found.fill_null(len(self.entries)).to_numpy(zero_copy_only=False)
        forgotten = self.entries["kind"][np.maximum(number, 0)] == RecordKind.FORGOTTEN
        return np.where((number < 0) | forgotten, -1, number).astype(np.int64)

    def kinds(self, keys: Sequence[bytes]) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The kind of each key's last record; 0 where there is none, or it is forgotten."""
        numbers = self.find(keys)
        kinds = np.zeros(len(numbers), np.uint8)
        kinds[numbers >= 0] = self.entries["kind"][numbers[numbers >= 0]]
        return kinds

    def tokens(self, keys: Sequence[bytes]) -> tuple[int, int]:
        """Input and output tokens of every record of these keys, those that later ones replaced included."""
        if not len(self.entries) or not len(keys):
            return 0, 0
        ours = pc.is_in(_fixed_size(self.entries["key"]), value_set=pa.array(keys, pa.binary(16)))
        mine = self.entries[ours.to_numpy(zero_copy_only=False)]
        return int(mine["input"].sum(dtype=np.int64)), int(mine["output"].sum(dtype=np.int64))


def _fixed_size(keys: np.ndarray[Any, Any]) -> pa.Array:
    return pa.Array.from_buffers(pa.binary(16), len(keys), [None, pa.py_buffer(keys.tobytes())])


def read_index(workspace: Workspace) -> LedgerIndex:
    """The index of everything in the workspace's ledger; segments without an index of their own are read whole."""
    segments = _segments(workspace)
    return LedgerIndex(segments, [_entries(workspace, segment)[0] for segment in segments])


def read_payloads(workspace: Workspace, index: LedgerIndex, numbers: Sequence[int]) -> Iterator[bytes]:
    """The payloads of records by their numbers in the index, in that order."""
    streams: dict[int, Any] = {}
    try:
        for number in numbers:
            segment = int(index.segment[number])
            if segment not in streams:
                streams[segment] = workspace.fs.open(index.segments[segment], "rb")
            entry = index.entries[number]
            streams[segment].seek(int(entry["offset"]))
            yield streams[segment].read(int(entry["length"]))
    finally:
        for stream in streams.values():
            stream.close()


def _segments(workspace: Workspace) -> list[str]:
    return [path for path in workspace.list(workspace.path(FOLDER)) if path.endswith(".log")]


def _entries(workspace: Workspace, segment: str) -> tuple[np.ndarray[Any, Any], bool]:
    """A segment's entries, and whether they came from its index."""
    path = segment.removesuffix(".log") + ".idx"
    if workspace.exists(path):
        data = workspace.read(path)
        if len(data) >= 4 and zlib.crc32(data[:-4]) == int.from_bytes(data[-4:], "little"):
            return np.frombuffer(data[:-4], ENTRY), True
    entries, damaged = scan(workspace.read(segment))
    if damaged:
        say(f"{segment}: {damaged} bytes are torn or damaged and left out; {len(entries)} records are kept")
    return entries, False


class LedgerWriter:
    """The one writer of a workspace's ledger; StageError where another run writes to it."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._lock = _lock(workspace) if workspace.is_local else None
        for segment in _segments(workspace):
            entries, sealed = _entries(workspace, segment)
            if not sealed:
                self._write_index(segment, entries)
        self._next = 1 + max([int(os.path.basename(path)[:6]) for path in _segments(workspace)], default=0)
        self._stream: int | None = None
        self._path = ""
        self._size = 0
        self._objects: list[str] = []

    def append(self, records: Iterable[LedgerRecord]) -> None:
        """Put records on disk; they are there when this returns. StageError where the disk refuses."""
        data = b"".join(map(encode, records))
        if not self.workspace.is_local:
            self._objects.append(self._new_segment())
            self.workspace.fs.pipe_file(self._objects[-1], data)
            return
        if self._stream is None:
            self._path, self._size = self._new_segment(), 0
            self._stream = os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o644)
            sync_folder(os.path.dirname(self._path))
        try:
            _write_all(self._stream, data)
            os.fdatasync(self._stream)
        except OSError as error:
            os.ftruncate(self._stream, self._size)
            raise StageError(f"{self._path}: {error.strerror}; what arrived before is kept, run again") from None
        self._size += len(data)
        if self._size >= SEGMENT_BYTES:
            self._seal()

    def close(self) -> None:
        """Seal what is open and let go of the ledger."""
        if self.workspace.is_local:
            self._seal()
        elif self._objects:
            self._join(self._objects)
            self._objects = []
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _new_segment(self) -> str:
        name = f"{self._next:06d}-{uuid.uuid4().hex[:8]}.log"
        self._next += 1
        return self.workspace.path(FOLDER, name)

    def _seal(self) -> None:
        if self._stream is not None:
            os.close(self._stream)
            self._stream = None
            self._write_index(self._path, _entries(self.workspace, self._path)[0])

    def _join(self, objects: list[str]) -> None:
        """Make one segment of several, which are removed once it is there."""
        data = b"".join(self.workspace.read(path) for path in objects)
        joined = self._new_segment()
        self.workspace.write(joined, data)
        self._write_index(joined, scan(data)[0])
        for path in objects:
            self.workspace.remove(path)

    def _write_index(self, segment: str, entries: np.ndarray[Any, Any]) -> None:
        data = entries.tobytes()
        self.workspace.write(segment.removesuffix(".log") + ".idx", data + zlib.crc32(data).to_bytes(4, "little"))


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _lock(workspace: Workspace) -> int:
    """Hold the ledger for this process; a run that was killed lets go of it within seconds."""
    folder = workspace.local(FOLDER)
    workspace.make_folder(str(folder))
    descriptor = os.open(folder / "lock", os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(descriptor)
                raise StageError(f"{folder}: another run is writing answers here; wait for it or stop it") from None
            time.sleep(0.2)


class GroupCommit:
    """Appends from many coroutines, written together: one fsync for all that arrive within `GROUP_SECONDS`."""

    def __init__(self, writer: LedgerWriter) -> None:
        self._writer = writer
        self._waiting: list[LedgerRecord] = []
        self._written: asyncio.Future[None] | None = None
        self._busy = asyncio.Lock()
        self._seconds = GROUP_SECONDS if writer.workspace.is_local else OBJECT_SECONDS

    async def append(self, records: Sequence[LedgerRecord]) -> None:
        """Returns when the records are on disk; raises what the writer raised."""
        self._waiting += records
        if self._written is None:
            self._written = asyncio.ensure_future(self._commit())
        await asyncio.shield(self._written)

    async def _commit(self) -> None:
        await asyncio.sleep(self._seconds)
        async with self._busy:
            group, self._waiting, self._written = self._waiting, [], None
            await asyncio.to_thread(self._writer.append, group)

    async def close(self) -> None:
        """Write what waits and close the writer."""
        while self._written is not None:
            await asyncio.shield(self._written)
        async with self._busy:
            await asyncio.to_thread(self._writer.close)
