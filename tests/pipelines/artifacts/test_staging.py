"""A folder of this machine in the place of a workspace on object storage."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipelines.artifacts import staging as staging_module
from pipelines.artifacts.reports.rows import RowsReport
from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Inputs, Output
from pipelines.artifacts.staging import Staging
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import StageError
from tests.outputs import finished, train_report


@dataclass(frozen=True)
class Read(Inputs):
    train: Output[TrainReport]
    ingest: Output[RowsReport] | None = None


def trained(workspace: Workspace) -> Read:
    place = Place(workspace, "train", "1")
    workspace.write(place.path("adapter", "weights"), b"weights")
    workspace.write(workspace.path("models", "m", "config.json"), b"{}")
    workspace.write(workspace.path("clean", "1", "rows"), b"rows")
    return Read(finished(place, train_report()))


def names(workspace: Workspace) -> list[str]:
    return [path.removeprefix(workspace.path("")) for path in workspace.files(workspace.root)]


def test_what_is_read_is_there_and_what_is_left_goes_back(bucket: str) -> None:
    workspace = Workspace(f"{bucket}/run")
    inputs, place = trained(workspace), Place(workspace, "merge", "2")
    before = names(workspace)
    with Staging(workspace) as staging:
        with staging.work(place, inputs, ("train", "models")) as (own, read):
            assert read.train.folder.local("adapter", "weights").read_bytes() == b"weights"
            assert own.workspace.local("models", "m", "config.json").is_file()
            assert not own.workspace.local("clean").exists()
            own.local("model.tmp").mkdir(parents=True)
            own.local("model.tmp", "half").write_bytes(b"x")
            own.local("model").mkdir()
            own.local("model", "whole").write_bytes(b"merged")
        folder = Path(staging.here.root)
        assert folder.is_dir()
    assert not folder.parent.exists()
    assert sorted(set(names(workspace)) - set(before)) == ["merge/2/model/whole"]
    assert workspace.read(place.path("model", "whole")) == b"merged"


def test_what_was_done_is_kept_where_the_work_fails_and_while_it_goes_on(
    bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staging_module, "STORE_SECONDS", 0.1)
    workspace = Workspace(f"{bucket}/run")
    inputs, place = trained(workspace), Place(workspace, "train", "2")

    def until(there: set[str]) -> None:
        deadline = time.monotonic() + 60
        while {name for name in names(workspace) if name.startswith("train/2/")} != there:
            assert time.monotonic() < deadline, names(workspace)
            time.sleep(0.1)

    with (
        Staging(workspace) as staging,
        pytest.raises(StageError, match="lost"),
        staging.work(place, inputs, ("train",)) as (own, _),
    ):
        for step in (1, 2):
            own.local(f"checkpoint-{step}").mkdir(parents=True)
            own.local(f"checkpoint-{step}", "weights").write_bytes(b"w")
        own.local("metrics.jsonl").write_bytes(b"1\n")
        until({"train/2/checkpoint-1/weights", "train/2/checkpoint-2/weights", "train/2/metrics.jsonl"})
        os.unlink(own.local("checkpoint-1", "weights"))
        until({"train/2/checkpoint-2/weights", "train/2/metrics.jsonl"})
        own.local("metrics.jsonl").write_bytes(b"1\n2\n")
        raise StageError("lost")
    with Staging(workspace) as staging, staging.work(place, inputs, ("train",)) as (own, _):
        assert own.local("metrics.jsonl").read_bytes() == b"1\n2\n"
        assert own.local("checkpoint-2", "weights").is_file()


def test_files_by_which_a_folder_counts_as_whole_come_last(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace(f"{bucket}/run")
    stored: list[str] = []
    with Staging(workspace) as staging:
        for name in ("models/m/config.json", "models/m/weights/1", "models/m/weights/2"):
            staging.here.local(name).parent.mkdir(parents=True, exist_ok=True)
            staging.here.local(name).write_bytes(b"x")
        monkeypatch.setattr(Workspace, "store", lambda self, source, path: stored.append(path.rpartition("/")[2]))
        staging.store(Place(workspace, "train", "1"))
    assert stored == ["1", "2", "config.json"]


def test_a_folder_stands_for_itself(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    inputs, place = trained(workspace), Place(workspace, "merge", "2")
    with Staging(workspace) as staging, staging.work(place, inputs, ("train",)) as (own, read):
        assert own is place and read is inputs and staging.here is workspace
    assert (tmp_path / "train" / "1" / "adapter" / "weights").is_file()
