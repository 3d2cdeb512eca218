import asyncio
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import StageError
from pipelines.llm import ledger
from pipelines.llm.ledger import (
    ENTRY,
    GroupCommit,
    LedgerIndex,
    LedgerRecord,
    LedgerWriter,
    RecordKind,
    encode,
    read_index,
    read_payloads,
    scan,
)


def key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def answer(number: int, text: str = "", kind: RecordKind = RecordKind.ANSWER) -> LedgerRecord:
    return LedgerRecord(key(number), kind, (text or f"祝福{number}").encode(), input_tokens=10, output_tokens=number)


def write(workspace: Workspace, *groups: list[LedgerRecord]) -> None:
    writer = LedgerWriter(workspace)
    for group in groups:
        writer.append(group)
    writer.close()


def payloads(workspace: Workspace, numbers: list[int]) -> list[str]:
    index = read_index(workspace)
    found = read_payloads(workspace, index, index.find(list(map(key, numbers))).tolist())
    return ["damaged" if data is None else data.decode() for data in found]


@pytest.fixture(params=["local", "url"])
def workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Workspace:
    return Workspace(str(tmp_path) if request.param == "local" else f"memory:/{tmp_path}")


def test_what_was_written_is_found_and_the_last_record_counts(workspace: Workspace) -> None:
    write(workspace, [answer(1), answer(2)], [answer(3, kind=RecordKind.FAILURE), answer(4, kind=RecordKind.FAILURE)])
    write(workspace, [answer(1, "新"), LedgerRecord(key(3), RecordKind.FORGOTTEN, b"")], [answer(5)])
    index = read_index(workspace)
    assert index.kinds([key(number) for number in range(1, 7)]).tolist() == [1, 1, 0, 2, 1, 0]
    assert payloads(workspace, [5, 1, 2]) == ["祝福5", "新", "祝福2"]
    assert index.tokens([key(1), key(2)]) == (30, 1 + 2 + 1)  # the replaced answer was paid for as well
    assert index.tokens([]) == (0, 0)
    assert sum(path.endswith(".log") for path in workspace.list(workspace.path("ledger"))) == 2


def test_a_tail_torn_at_any_byte_loses_only_its_record(tmp_path: Path) -> None:
    records = [encode(answer(number)) for number in range(1, 5)]
    whole = b"".join(records)
    ends = [sum(map(len, records[: count + 1])) for count in range(4)]
    for cut in range(len(whole) + 1):
        entries, damaged = scan(whole[:cut])
        kept = sum(end <= cut for end in ends)
        assert len(entries) == kept
        assert damaged == cut - (ends[kept - 1] if kept else 0)
    workspace = Workspace(str(tmp_path))
    writer = LedgerWriter(workspace)
    writer.append([answer(1), answer(2)])
    writer.close()
    (segment,) = (tmp_path / "ledger").glob("*.log")
    segment.write_bytes(segment.read_bytes()[:-3])
    segment.with_suffix(".idx").unlink()  # as a crash leaves it
    write(workspace, [answer(3)])
    assert read_index(workspace).kinds([key(1), key(2), key(3)]).tolist() == [1, 0, 1]


def test_a_damaged_byte_costs_one_record_not_those_behind_it() -> None:
    whole = bytearray(b"".join(encode(answer(number)) for number in range(1, 6)))
    size = len(whole) // 5
    for at in random.Random(1).sample(range(2 * size + 4, 3 * size), 20):
        damaged = bytearray(whole)
        damaged[at] ^= 0x55
        entries, lost = scan(bytes(damaged))
        assert [int.from_bytes(entry["key"].tobytes(), "big") for entry in entries] == [1, 2, 4, 5]
        assert lost == size


@pytest.mark.parametrize("value", [0, 1, 0x7F, 0xFF])
@pytest.mark.parametrize("byte", range(4))
def test_a_damaged_length_costs_one_record_too(byte: int, value: int) -> None:
    records = [encode(answer(number, "祝福" * number)) for number in range(1, 6)]
    damaged = bytearray(b"".join(records))
    at = len(records[0]) + len(records[1]) + byte
    is_damaged = damaged[at] != value
    damaged[at] = value
    entries, lost = scan(bytes(damaged))
    assert [int.from_bytes(entry["key"].tobytes(), "big") for entry in entries] == [
        1,
        2,
        *([] if is_damaged else [3]),
        4,
        5,
    ]
    assert lost == (len(records[2]) if is_damaged else 0)


def test_a_damaged_byte_in_a_sealed_segment_costs_its_record(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    write(workspace, [answer(number) for number in range(1, 6)])
    (segment,) = (tmp_path / "ledger").glob("*.log")
    whole = segment.read_bytes()
    size = len(whole) // 5
    for at in range(2 * size, 3 * size):  # each byte of the third, its length and its key included
        segment.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        assert payloads(workspace, [1, 2, 3, 4, 5]) == ["祝福1", "祝福2", "damaged", "祝福4", "祝福5"]


def test_a_damaged_object_costs_its_record(bucket: str) -> None:
    workspace = Workspace(f"{bucket}/w")
    write(workspace, [answer(number) for number in range(1, 6)])
    (segment,) = [path for path in workspace.list(workspace.path("ledger")) if path.endswith(".log")]
    damaged = bytearray(workspace.read(segment))
    damaged[len(damaged) // 2] ^= 0x55
    workspace.write(segment, bytes(damaged))
    assert payloads(workspace, [1, 2, 3, 4, 5]) == ["祝福1", "祝福2", "damaged", "祝福4", "祝福5"]
    workspace.remove(segment.removesuffix(".log") + ".idx")  # as a crash leaves it
    assert read_index(workspace).kinds([key(number) for number in range(1, 6)]).tolist() == [1, 1, 0, 1, 1]


def test_keys_that_share_a_half_are_told_apart() -> None:
    keys = [bytes(8) + number.to_bytes(8, "big") for number in range(300)]
    keys += [number.to_bytes(8, "big") + bytes(8) for number in range(1, 300)]
    entries = np.array([(key, 1, 2, 3, 40 * at, 7) for at, key in enumerate(keys)], ENTRY)
    parts = {"a": entries[:100], "b": entries[100:]}
    index = LedgerIndex(["a", "b"], lambda segment: parts[segment])
    assert len(index) == 599
    assert index.tokens(keys) == (1198, 1797)
    assert [place[1] for place in index.places(index.find(keys).tolist())] == [40 * at for at in range(599)]
    assert (index.find([b"x" * 16, bytes(7) + b"\1" * 9]) == -1).all()


def test_objects_that_a_killed_run_left_are_joined(tmp_path: Path) -> None:
    workspace = Workspace(f"memory:/{tmp_path}")
    killed = LedgerWriter(workspace)
    for number in range(5):
        killed.append([answer(number)])
    assert len([path for path in workspace.list(workspace.path("ledger")) if path.endswith(".log")]) == 5
    LedgerWriter(workspace).close()
    assert len([path for path in workspace.list(workspace.path("ledger")) if path.endswith(".log")]) == 1
    assert payloads(workspace, list(range(5))) == [f"祝福{number}" for number in range(5)]


def test_long_runs_join_their_objects_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "OBJECTS", 10)
    workspace = Workspace(f"memory:/{tmp_path}")
    writer = LedgerWriter(workspace)
    for number in range(95):
        writer.append([answer(number)])
        assert len([path for path in workspace.list(workspace.path("ledger")) if path.endswith(".log")]) <= 20
    writer.close()
    assert payloads(workspace, list(range(95))) == [f"祝福{number}" for number in range(95)]


def test_a_bucket_that_is_not_there_is_said_before_anything_is_asked(bucket: str) -> None:
    with pytest.raises(StageError, match=r"absent/w/ledger/writable cannot be written.*nothing was asked"):
        LedgerWriter(Workspace(f"{bucket}-absent/w"))
    LedgerWriter(Workspace(f"{bucket}/w")).close()


def test_a_full_disk_stops_the_run_and_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(str(tmp_path))
    writer = LedgerWriter(workspace)
    writer.append([answer(1)])

    def half(descriptor: int, data: bytes) -> None:
        os.write(descriptor, data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(StageError, match="No space left"):
        patch.setattr(ledger, "_write_all", half)
        writer.append([answer(2)])
    writer.append([answer(3)])
    writer.close()
    assert read_index(workspace).kinds([key(1), key(2), key(3)]).tolist() == [1, 0, 1]


def test_two_runs_do_not_write_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "LOCK_SECONDS", 0.3)
    workspace = Workspace(str(tmp_path))
    writer = LedgerWriter(workspace)
    with pytest.raises(StageError, match="another run"):
        LedgerWriter(workspace)
    writer.close()
    LedgerWriter(workspace).close()


def test_segments_are_sealed_at_their_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SEGMENT_BYTES", 500)
    workspace = Workspace(str(tmp_path))
    write(workspace, *[[answer(number)] for number in range(60)])
    assert len(list((tmp_path / "ledger").glob("*.idx"))) >= 5
    assert payloads(workspace, list(range(60))) == [f"祝福{number}" for number in range(60)]


def test_concurrent_appends_share_an_fsync(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    syncs: list[int] = []
    real = os.fdatasync
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (syncs.append(1), real(descriptor))[1])
    workspace = Workspace(str(tmp_path))

    async def run() -> None:
        group = GroupCommit(LedgerWriter(workspace))
        await asyncio.gather(*(group.append([answer(number)]) for number in range(200)))
        assert read_index(workspace).kinds([key(199)]).tolist() == [1]  # on disk before it returns
        await group.close()

    asyncio.run(run())
    assert len(syncs) <= 3
    assert (read_index(workspace).kinds([key(number) for number in range(200)]) == 1).all()


WRITE_FOREVER = """
import sys
from pipelines.llm.ledger import LedgerRecord, LedgerWriter, RecordKind
from pipelines.artifacts.workspace import Workspace
writer = LedgerWriter(Workspace(sys.argv[1]))
number = int(sys.argv[2])
while True:
    writer.append([LedgerRecord((number + i).to_bytes(16, "big"), RecordKind.ANSWER, b"x" * 300) for i in range(7)])
    number += 7
    print(number, flush=True)
"""


def test_what_was_acknowledged_survives_kill_9(tmp_path: Path) -> None:
    draw = random.Random(5)
    acknowledged = 0
    for _ in range(6):
        command = [sys.executable, "-c", WRITE_FOREVER, str(tmp_path), str(acknowledged)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        process.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.2))
        process.kill()
        said = process.stdout.read().split()
        process.wait()
        acknowledged = int(said[-1]) if said else acknowledged + 7
        kinds = read_index(Workspace(str(tmp_path))).kinds([key(number) for number in range(acknowledged)])
        assert (kinds == RecordKind.ANSWER).all()


def test_a_hundred_thousand_keys_are_read_in_a_moment(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    groups = [
        [answer(number, "祝" * 100) for number in range(first, first + 5000)] for first in range(0, 100_000, 5000)
    ]
    write(workspace, *groups)
    keys = [key(number) for number in range(100_001)]
    began = time.monotonic()
    kinds = read_index(workspace).kinds(keys)
    assert time.monotonic() - began < 2
    assert kinds.sum() == 100_000
    for index in (tmp_path / "ledger").glob("*.idx"):
        index.unlink()  # as after a crash: every record is read and checked
    began = time.monotonic()
    assert read_index(workspace).kinds(keys).sum() == 100_000
    assert time.monotonic() - began < 10
