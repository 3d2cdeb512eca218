import fcntl
import json
import multiprocessing
import os
import socket
import threading
from pathlib import Path

import pytest

from pipelines.artifacts.workspace import Place, Workspace, fingerprint, open_workspace, to_json
from pipelines.errors import DataError, InputError, StageError


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


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("", "names no folder"),
        ("file://", "names no folder"),
        ("file:///", "names no folder"),
        ("file://host/w", "names no folder"),
        ("file:/", "names no folder"),
        ("s3://", "is no bucket's URL"),
        ("s3:/bucket/w", "is no bucket's URL"),
        ("s3:///w", "is no bucket's URL"),
        ("oss:/w", "is no bucket's URL"),
        ("simplecache::s3://bucket/w", "is no bucket's URL"),
        ("memory://w", "keeps nothing"),
        ("zip://w.zip", "keeps nothing"),
        ("https://host/w", "keeps nothing"),
        ("nosuch://w", "cannot be opened: Protocol not known: nosuch"),
        ("/dev/null", "is a file, no folder"),
    ],
)
def test_what_is_no_place_for_a_workspace_is_refused(given: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=told):
        open_workspace(given, "tiny", on_cluster=False)


def test_spellings_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for given in (f"file://{tmp_path}/w", f"file:{tmp_path}/w", f"local://{tmp_path}/w/", "w", "./x/../w", "w/"):
        assert open_workspace(given, "tiny", on_cluster=False).root == f"{tmp_path}/w", given
    assert open_workspace("a:b/c", "tiny", on_cluster=False).root == f"{tmp_path}/a:b/c"


def test_a_place_where_nothing_can_be_written_is_told_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for root, reason in (
        (tmp_path / "file", "File exists|Not a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
        (Path("/proc/nowhere"), "No such file or directory"),
    ):
        workspace = Workspace(str(root))
        path = workspace.path("ingest", "f", "manifest.json")
        told = rf"{root}.*: cannot be written \(({reason})\); what is finished is kept"
        with pytest.raises(StageError, match=told):
            workspace.write(path, b"{}")
        with pytest.raises(StageError, match=told):
            workspace.write_if_absent(path, b"{}")
        with pytest.raises(StageError, match=told), workspace.create(path):
            pass
        with pytest.raises(StageError, match=told), workspace.held():
            pass


def test_what_others_put_in_the_place_of_a_lock_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("kept")
    (tmp_path / ".running").symlink_to(tmp_path / "precious")
    with pytest.raises(StageError, match=r"\.running: cannot be written"), Workspace(str(tmp_path)).held():
        pass
    assert (tmp_path / "precious").read_text() == "kept"


def test_who_is_at_work_is_told_and_looking_keeps_no_run_out(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path / "w"))
    assert workspace.at_work() == ""
    with workspace.held():
        assert workspace.at_work() == f"process {os.getpid()} on {socket.gethostname()} is at work here"
    assert workspace.at_work() == ""
    looking = os.open(workspace.path(".running"), os.O_RDONLY)
    fcntl.flock(looking, fcntl.LOCK_SH)
    timer = threading.Timer(0.05, os.close, [looking])
    timer.start()
    with workspace.held():  # the moment of a look is waited out
        timer.join()
    os.unlink(workspace.path(".running"))
    os.mkfifo(workspace.path(".running"))  # what somebody else put there is not waited for
    assert workspace.at_work() == ""


def test_storage_without_credentials_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    workspace = Workspace("s3://nobody/here")
    with pytest.raises(StageError, match=r"s3://nobody/here/a\.json: cannot be written .*credentials"):
        workspace.write(workspace.path("a.json"), b"{}")


def test_damaged_json_is_told(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    for data in (b"", b"{", b"\xff", b"[" * 200_000):
        workspace.write(workspace.path("a.json"), data)
        with pytest.raises(DataError, match=r"a\.json: not valid JSON"):
            workspace.read_json(workspace.path("a.json"))


def test_a_workspace_that_is_made_is_its_owner_s_and_one_that_exists_keeps_its_mode(tmp_path: Path) -> None:
    with Workspace(str(tmp_path / "runs" / "mine")).held():
        assert (tmp_path / "runs" / "mine").stat().st_mode & 0o777 == 0o700
    (tmp_path / "shared").mkdir(mode=0o750)
    Workspace(str(tmp_path / "shared")).write(str(tmp_path / "shared" / "a" / "b.json"), b"{}")
    assert (tmp_path / "shared").stat().st_mode & 0o777 == 0o750


def test_an_object_whose_name_leads_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    workspace = Workspace("memory://leads-out/w")
    monkeypatch.setattr(workspace.fs, "find", lambda path: [f"{path}/a..b/ok.txt", f"{path}/../../evil.txt"])
    with pytest.raises(StageError, match=r"models/\.\./\.\./evil\.txt: an object with \.\. in its name"):
        workspace.files(workspace.path("models"))


def test_what_is_written_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        Workspace(str(tmp_path)).write(str(tmp_path / "report.html"), b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "report.html").stat().st_mode & 0o777 == 0o600
