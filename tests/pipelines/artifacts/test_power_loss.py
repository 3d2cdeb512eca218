"""What a commit names is on disk before the commit, and so are the folders that name it."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.artifacts.files import Destination, created
from pipelines.artifacts.shards import Attempt, _attempt
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.llm.ledger import LedgerRecord, LedgerWriter, RecordKind
from pipelines.models.cache import made_once
from pipelines.train.checkpoint import mark_complete
from serve.adapter_registry import publish
from tests.small_adapter import write_adapter, write_model


class Recorder:
    """What was brought to disk and what appeared, in order.

    A file is safe from a power loss once it was synced after its last write, and its folder after it appeared.
    """

    def __init__(self, root: Path, patch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.synced: dict[int, set[str] | int] = {}
        """Size at the last sync, by inode; of a folder the names in it."""
        self.appeared: list[str] = []
        for name in ("fsync", "fdatasync"):
            patch.setattr(os, name, self.sync(getattr(os, name)))
        for name in ("replace", "rename", "link"):
            patch.setattr(os, name, self.appears(getattr(os, name)))
        patch.setattr(Path, "rename", lambda path, target: os.rename(path, target))

    def sync(self, real: Callable[[int], None]) -> Callable[[int], None]:
        def synced(descriptor: int) -> None:
            real(descriptor)
            found = os.fstat(descriptor)
            self.synced[found.st_ino] = {*os.listdir(descriptor)} if stat.S_ISDIR(found.st_mode) else found.st_size

        return synced

    def appears(self, real: Callable[..., None]) -> Callable[..., None]:
        def appeared(source: str | Path, target: str | Path) -> None:
            if Path(target).is_relative_to(self.root):
                assert not [*self.unsafe(Path(source), Path(source))], f"{target} appears before it is on disk"
            real(source, target)
            self.appeared.append(str(target))

        return appeared

    def unsafe(self, folder: Path, since: Path | None = None) -> Iterator[str]:
        """What below a folder, and of the way to it, a power loss would take."""
        for path in [folder, *folder.rglob("*")]:
            if path.is_symlink() or path.name.startswith("."):
                continue
            found = self.synced.get(path.stat().st_ino)
            if isinstance(found, set):
                is_safe = {child.name for child in path.iterdir() if not child.name.startswith(".")} <= found
            else:
                is_safe = found == path.stat().st_size
            if not is_safe:
                yield str(path)
        while since is None and folder != self.root:
            folder = folder.parent
            if self.synced.get(folder.stat().st_ino) is None:
                yield str(folder)


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(tmp_path, monkeypatch)


def test_a_shard_s_files_are_safe_before_its_commit(tmp_path: Path, disk: Recorder) -> None:
    workspace = Workspace(str(tmp_path / "w"))
    table = pa.table({"a": [1, 2]})

    def work(shard: dict[str, int], attempt: Attempt) -> dict[str, int]:
        with attempt.writer("rows", table.schema) as writer:
            writer.write_table(table)
        with workspace.create(attempt.path("tokens", "npy")) as stream:
            stream.write(b"tokens")
        return {}

    committed = []
    commit = Workspace.write_if_absent

    def checked(self: Workspace, path: str, data: bytes) -> bool:
        committed.append([*disk.unsafe(tmp_path / "w" / "pass" / "data")])
        return commit(self, path, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "write_if_absent", checked)
        assert _attempt(workspace, f"{workspace.root}/pass", "00000", {"index": 0}, work) == b""
    assert committed == [[]]
    assert [*disk.unsafe(tmp_path / "w")] == []


def test_what_other_libraries_wrote_is_safe_before_the_manifest(tmp_path: Path, disk: Recorder) -> None:
    workspace = Workspace(str(tmp_path / "w"))
    workspace.make_folder(workspace.root)
    place = Place(workspace, "merge", "f")
    model = place.local("model", "sub")
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"weights")
    place.finish(b"{}")
    assert [*disk.unsafe(tmp_path / "w" / "merge" / "f")] == []


def test_a_checkpoint_a_converted_model_an_adapter_and_an_export_are_safe(tmp_path: Path, disk: Recorder) -> None:
    checkpoint = tmp_path / "checkpoints" / "checkpoint-4"
    (checkpoint / "global_step4").mkdir(parents=True)
    (checkpoint / "global_step4" / "zero.pt").write_bytes(b"zero")
    mark_complete(checkpoint)
    assert [*disk.unsafe(checkpoint)] == []

    model = made_once(
        tmp_path / "models" / "m", "converting", lambda scratch: (scratch / "config.json").write_text("{}") and None
    )
    assert [*disk.unsafe(model)] == []

    adapter = write_adapter(tmp_path / "adapter", write_model(tmp_path / "base"))
    version = publish(adapter, tmp_path / "adapters", "mine")
    assert [*disk.unsafe(tmp_path / "adapters" / version)] == []
    assert str(tmp_path / "adapters" / version) in disk.appeared

    with created(
        Destination("export.path", str(tmp_path / "out" / "rows.jsonl"), "x"), Workspace(str(tmp_path / "w"))
    ) as sink:
        sink.write(b"rows")
    assert [*disk.unsafe(tmp_path / "out" / "rows.jsonl", tmp_path)] == []


def test_an_answer_is_safe_when_it_counts(tmp_path: Path, disk: Recorder) -> None:
    workspace = Workspace(str(tmp_path / "w"))
    writer = LedgerWriter(workspace)
    writer.append([LedgerRecord(b"k" * 16, RecordKind.ANSWER, b"answer")])
    segments = [path for path in workspace.list(workspace.path("ledger")) if path.endswith(".log")]
    assert [unsafe for path in segments for unsafe in disk.unsafe(Path(path))] == []
    writer.close()
