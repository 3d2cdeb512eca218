import json
import multiprocessing
from pathlib import Path

import pytest

from pipelines.artifacts.workspace import Place, Workspace, fingerprint, open_workspace, to_json
from pipelines.errors import InputError


@pytest.fixture(params=["local", "memory"])
def workspace(request: pytest.FixtureRequest, tmp_path: Path) -> Workspace:
    return Workspace(str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}")


def test_only_the_first_writer_wins(workspace: Workspace) -> None:
    path = workspace.path("a", "commit.json")
    assert workspace.write_if_absent(path, b"first")
    assert not workspace.write_if_absent(path, b"second")
    assert workspace.read(path) == b"first"


def _race(folder: str, number: int) -> bool:
    return Workspace(folder).write_if_absent(f"{folder}/commit.json", str(number).encode() * 100_000)


def test_one_of_many_processes_commits(tmp_path: Path) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        wins = pool.starmap(_race, [(str(tmp_path), number) for number in range(8)])
    assert wins.count(True) == 1
    assert (tmp_path / "commit.json").read_bytes() == str(wins.index(True)).encode() * 100_000
    assert [path.name for path in tmp_path.iterdir()] == ["commit.json"]


def test_a_folder_within_a_stage_is_cleared_with_it(workspace: Workspace) -> None:
    place = Place(workspace, "train", "abc")
    within = place.within("data", "1")
    within.finish(b"{}")
    assert within.path("manifest.json") == place.path("data", "1", "manifest.json")
    assert place.relative([within.path("x/1.parquet")]) == ["data/1/x/1.parquet"]
    place.clear()
    assert not workspace.exists(within.path("manifest.json"))


def test_json_keeps_chinese_readable(workspace: Workspace) -> None:
    workspace.write(workspace.path("a.json"), to_json({"名": "丹炉"}))
    assert "丹炉" in workspace.read(workspace.path("a.json")).decode()


def test_fingerprint_follows_from_its_parts_alone() -> None:
    base = fingerprint("clean", 1, {"a": 1, "b": 2}, {"ingest": "x"})
    assert base == fingerprint("clean", 1, json.loads('{"b": 2, "a": 1}'), {"ingest": "x"})
    assert len({base, fingerprint("clean", 2, {"a": 1, "b": 2}, {"ingest": "x"})}) == 2
    assert len({base, fingerprint("clean", 1, {"a": 1, "b": 2}, {"ingest": "y"})}) == 2
    assert len({base, fingerprint("clean", 1, {"a": 1, "b": 3}, {"ingest": "x"})}) == 2


def test_relative_workspace_is_refused_on_a_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_workspace(None, "tiny", on_cluster=False).root == str(tmp_path / "runs" / "tiny")
    assert open_workspace("s3://bucket/a/", "tiny", on_cluster=True).root == "s3://bucket/a"
    assert open_workspace(f"file://{tmp_path}", "tiny", on_cluster=True).root == str(tmp_path)
    with pytest.raises(InputError, match="absolute folder") as caught:
        open_workspace("runs/x", "tiny", on_cluster=True)
    assert caught.value.exit_code == 2
