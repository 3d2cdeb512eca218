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
import re
import struct
import time
import uuid
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np

from pipelines.artifacts.workspace import Workspace, sync_folder
from pipelines.errors import StageError
from pipelines.progress import say

Keys = Sequence[bytes] | np.ndarray[Any, Any]
"""Keys of 16 bytes: a sequence, or an array of kind V16."""

FOLDER = "ledger"
SEGMENT_BYTES = 64 << 20
GROUP_SECONDS = 0.02
"""How long the first record of a group waits for others, so that they share one fsync."""
OBJECT_SECONDS = 1.0
"""The same on object storage, where each group is an object."""
OBJECTS = 256
"""So many groups on object storage are joined to one segment."""
LOCK_SECONDS = 30.0

HEAD = struct.Struct("<II16sBII")
"""Payload bytes, CRC-32 of the rest of the record, key, kind, input tokens, output tokens."""

LONGEST_PAYLOAD = 64 << 20
"""Bytes of a payload at most: more than an answer of the largest size takes in any encoding of JSON."""

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


_HEAD_END = re.compile(rb"(?=[\x01-\x03].{3}\x00.{3}\x00)", re.DOTALL)
"""How the last 9 bytes of a head look: a kind, and two counts of tokens."""


def scan(data: bytes) -> tuple[np.ndarray[Any, Any], int]:
    """The entries of the undamaged records in a segment, and how many bytes are damaged or torn off."""
    entries = []
    at = good = 0
    while at + HEAD.size <= len(data):
        entry = _entry_at(data, at)
        if entry is None:  # what the next record is cannot be told from this one's length, which may be what is damaged
            starts = (found.start() - HEAD.size + 9 for found in _HEAD_END.finditer(data, at + HEAD.size - 8))
            at = next((start for start in starts if _entry_at(data, start) is not None), len(data))
            continue
        entries.append(entry)
        end = entry[-2] + entry[-1]
        good += end - at
        at = end
    return np.array(entries, dtype=ENTRY), len(data) - good


def _entry_at(data: bytes, at: int) -> tuple[bytes, int, int, int, int, int] | None:
    """The entry of the record that begins at a byte; None where no undamaged one does."""
    if at + HEAD.size > len(data):
        return None
    length, checksum, key, kind, read, written = HEAD.unpack_from(data, at)
    end = at + HEAD.size + length
    if end > len(data):
        return None
    head = data[at : at + 4] + b"\0\0\0\0" + data[at + 8 : at + HEAD.size]
    if zlib.crc32(memoryview(data)[at + HEAD.size : end], zlib.crc32(head)) != checksum:
        return None
    return key, kind, read, written, at + HEAD.size, length


class LedgerIndex:
    """What the last record of each key is and where it lies, by key; 27 bytes for each, and no answers.

    The columns are parallel arrays, in the order of keys: `kind`, and `input` and `output`, the tokens of all records
    of the key, those that later ones replaced included. `entries(segment)` is called twice for each segment, so that
    no column is ever in memory twice; what a segment has more the second time is left out. Without places, which only
    those need who read answers, it is 19 bytes for each.
    """

    def __init__(
        self, segments: Sequence[str], entries: Callable[[str], np.ndarray[Any, Any]], with_places: bool = True
    ) -> None:
        self.segments = list(segments)
        counts, starts, before = [], [], 0
        for segment in self.segments:
            part = entries(segment)
            counts.append(np.bincount(_bucket(_halves(part["key"])[0]), minlength=BUCKETS))
            starts.append(before)
            before += int((part["offset"] + part["length"]).max(initial=0)) + 1
        self._starts = np.array(starts, np.uint64)
        sizes = np.sum([np.zeros(BUCKETS, np.int64), *counts], axis=0)
        edges = np.concatenate([[0], np.cumsum(sizes)])
        free = edges[:-1].copy()
        named = COLUMNS if with_places else {name: kind for name, kind in COLUMNS.items() if name != "offset"}
        columns: dict[str, np.ndarray[Any, Any]] = {name: np.empty(edges[-1], kind) for name, kind in named.items()}
        for segment, count, start in zip(self.segments, counts, starts, strict=True):
            part = entries(segment)[: count.sum()]
            high, low = _halves(part["key"])
            order = np.argsort(_bucket(high), kind="stable")
            places = np.arange(len(order)) + np.repeat(free - np.cumsum(count) + count, count)
            values = {"high": high, "low": low, "offset": part["offset"] + np.uint64(start)}
            for name, column in columns.items():
                column[places] = (values[name] if name in values else part[name])[order]
            free += count
        length = _keep_last(columns, edges)
        self._high, self._low = (columns[name][:length] for name in ("high", "low"))
        self.kind, self.input, self.output = (columns[name][:length] for name in ("kind", "input", "output"))
        self._offset = columns["offset"][:length] if with_places else None

    def __len__(self) -> int:
        return len(self._high)

    def find(self, keys: Keys) -> np.ndarray[Any, np.dtype[np.int64]]:
        """The number of each key's entry; -1 where there is none, or it is forgotten."""
        numbers = self._find(keys)
        known = np.flatnonzero(numbers >= 0)
        numbers[known[self.kind[numbers[known]] == RecordKind.FORGOTTEN]] = -1
        return numbers

    def _find(self, keys: Keys) -> np.ndarray[Any, np.dtype[np.int64]]:
        if not len(self) or not len(keys):
            return np.full(len(keys), -1, np.int64)
        high, low = _halves(np.array(keys, "V16"))
        order = np.argsort(high)  # memory is read in its order, which takes half the time of millions of keys
        numbers = np.empty(len(keys), np.int64)
        numbers[order] = np.searchsorted(self._high, high[order])
        while True:  # of several keys with the same first half, which hardly ever happens, the right one is behind
            inside = np.minimum(numbers, len(self) - 1)
            is_half = (numbers < len(self)) & (self._high[inside] == high)
            is_other = is_half & (self._low[inside] != low)
            if not is_other.any():
                return np.where(is_half, numbers, -1)
            numbers = numbers + is_other

    def kinds(self, keys: Keys) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The kind of each key's last record; 0 where there is none, or it is forgotten."""
        numbers = self.find(keys)
        kinds = np.zeros(len(numbers), np.uint8)
        kinds[numbers >= 0] = self.kind[numbers[numbers >= 0]]
        return kinds

    def tokens(self, keys: Keys) -> tuple[int, int]:
        """Input and output tokens of every record of these keys, those that later ones replaced included."""
        numbers = self._find(keys)
        mine = np.unique(numbers[numbers >= 0])
        return int(self.input[mine].sum(dtype=np.int64)), int(self.output[mine].sum(dtype=np.int64))

    def places(self, numbers: Sequence[int]) -> Iterator[tuple[str, int]]:
        """The segment of each record, and the first byte of its payload there."""
        assert self._offset is not None  # the index was made without places
        for number in numbers:
            segment = int(np.searchsorted(self._starts, self._offset[number], side="right")) - 1
            yield self.segments[segment], int(self._offset[number] - self._starts[segment])


COLUMNS: dict[str, Any] = {
    **{"high": np.uint64, "low": np.uint16, "kind": np.uint8},
    **{"input": np.uint32, "output": np.uint32, "offset": np.uint64},
}
"""The columns of an index; `offset` counts from the beginning of the first segment."""
BUCKETS = 256
"""Keys are sorted in so many parts, by their first byte."""


def _bucket(high: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return (high >> np.uint64(56)).astype(np.int64)


def _halves(keys: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Keys as numbers of 8 and of 2 bytes, which together tell a hundred million apart."""
    numbers = np.frombuffer(keys.tobytes(), ">u8").reshape(-1, 2).astype(np.uint64)
    mixed = numbers[:, 0] ^ (numbers[:, 1] * np.uint64(0x9E3779B97F4A7C15))
    return mixed, (numbers[:, 1] & np.uint64(0xFFFF)).astype(np.uint16)


def _keep_last(columns: dict[str, np.ndarray[Any, Any]], edges: np.ndarray[Any, Any]) -> int:
    """Sort columns bucket by bucket, in place, and keep the last record of each key; returns how many there are."""
    count = 0
    for bucket in range(BUCKETS):
        part = slice(int(edges[bucket]), int(edges[bucket + 1]))
        high, low = columns["high"][part], columns["low"][part]
        if not len(high):
            continue
        order = np.lexsort((low, high))
        high, low = high[order], low[order]
        is_last = np.append((high[1:] != high[:-1]) | (low[1:] != low[:-1]), True)
        firsts = np.flatnonzero(np.append(True, is_last[:-1]))
        for name, column in columns.items():
            values = column[part][order]
            if name in ("input", "output"):
                sums = np.add.reduceat(values.astype(np.uint64), firsts)
                kept = np.minimum(sums, np.iinfo(column.dtype).max).astype(column.dtype)
            else:
                kept = values[is_last]
            column[count : count + len(kept)] = kept
        count += len(firsts)
    return count


def read_index(workspace: Workspace, with_places: bool = True) -> LedgerIndex:
    """The index of everything in the workspace's ledger; segments without an index of their own are read whole."""
    scanned: dict[str, np.ndarray[Any, Any]] = {}

    def entries(segment: str) -> np.ndarray[Any, Any]:
        if segment in scanned:
            return scanned[segment]
        found, is_sealed = _entries(workspace, segment)
        if not is_sealed:
            scanned[segment] = found
        return found

    return LedgerIndex(_segments(workspace), entries, with_places)


def read_payloads(workspace: Workspace, index: LedgerIndex, numbers: Sequence[int]) -> Iterator[bytes | None]:
    """The payloads of records by their numbers in the index, in that order; None for one that is damaged."""
    streams: dict[str, Any] = {}
    try:
        for segment, offset in index.places(numbers):
            if segment not in streams:
                streams[segment] = workspace.fs.open(segment, "rb")
            streams[segment].seek(offset - HEAD.size)
            head = streams[segment].read(HEAD.size)
            length = int.from_bytes(head[:4], "little")
            data = head + streams[segment].read(min(length, LONGEST_PAYLOAD))
            yield data[HEAD.size :] if _entry_at(data, 0) is not None else None
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
        segments = _segments(workspace)
        self._next = 1 + max([int(os.path.basename(path).partition("-")[0]) for path in segments], default=0)
        self._stream: int | None = None
        self._path = ""
        self._size = 0
        self._objects: list[str] = []
        if not workspace.is_local:
            _require_writable(workspace)
            known = set(workspace.list(workspace.path(FOLDER)))
            self._objects = [path for path in segments if path.removesuffix(".log") + ".idx" not in known]
            self._join()
            return
        for segment in segments:
            entries, sealed = _entries(workspace, segment)
            if not sealed:
                self._write_index(segment, entries)

    def append(self, records: Iterable[LedgerRecord]) -> None:
        """Put records on disk; they are there when this returns. StageError where the disk refuses."""
        data = b"".join(map(encode, records))
        if not self.workspace.is_local:
            self._objects.append(self._new_segment())
            self.workspace.fs.pipe_file(self._objects[-1], data)
            if len(self._objects) >= OBJECTS:
                self._join()
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
        else:
            self._join()
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

    def _join(self) -> None:
        """Make segments of the objects that have no index, which are removed once those are there."""
        while self._objects:
            data, joined = bytearray(), 0
            while joined < len(self._objects) and len(data) < SEGMENT_BYTES:
                data += self.workspace.read(self._objects[joined])
                joined += 1
            segment = self._new_segment()
            self.workspace.write(segment, bytes(data))
            self._write_index(segment, scan(bytes(data))[0])
            for path in self._objects[:joined]:
                self.workspace.remove(path)
            del self._objects[:joined]

    def _write_index(self, segment: str, entries: np.ndarray[Any, Any]) -> None:
        data = entries.tobytes()
        self.workspace.write(segment.removesuffix(".log") + ".idx", data + zlib.crc32(data).to_bytes(4, "little"))


def _require_writable(workspace: Workspace) -> None:
    """StageError where nothing can be written there, before the first request costs money."""
    path = workspace.path(FOLDER, "writable")
    try:
        workspace.write(path, b"")
    except Exception as error:  # what file systems raise has no base in common
        raise StageError(f"{path} cannot be written ({error}); nothing was asked. Is the workspace right?") from None


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
