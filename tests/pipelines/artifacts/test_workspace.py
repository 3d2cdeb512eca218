import json
import multiprocessing
from pathlib import Path

import pytest

from pipelines.artifacts.workspace import Place, Workspace, fingerprint, open_workspace
from pipelines.errors import DataError, InputError


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


def test_a_stage_is_complete_only_with_its_manifest(workspace: Workspace) -> None:
    place = Place(workspace, "clean", "abc")
    assert place.manifest() is None
    with pytest.raises(DataError, match="not complete"):
        place.report()
    place.finish({"report": {"digest": "d", "outputs": {"rows": ["x/1.parquet"]}}})
    assert place.report()["digest"] == "d"
    assert place.outputs("rows") == [place.path("x/1.parquet")]
    assert place.relative(place.outputs("rows")) == ["x/1.parquet"]
    place.clear()
    assert place.manifest() is None


def test_damaged_manifest_is_named(workspace: Workspace) -> None:
    place = Place(workspace, "clean", "abc")
    workspace.write(place.path("manifest.json"), b"{")
    with pytest.raises(DataError, match=r"clean/abc/manifest\.json"):
        place.manifest()


def test_json_keeps_chinese_readable(workspace: Workspace) -> None:
    place = Place(workspace, "clean", "abc")
    place.finish({"名": "丹炉"})
    assert "丹炉" in workspace.read(place.path("manifest.json")).decode()


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
