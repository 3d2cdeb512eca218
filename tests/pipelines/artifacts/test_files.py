"""Files outside the workspace: whose they are, and that they are whole or as they were."""

import fcntl
import os
import secrets
from pathlib import Path

import pytest

from pipelines.artifacts import files
from pipelines.artifacts.files import Destination, created, refusal
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import InputError, StageError

NEW, FREE = b"new rows\n", "export.overwrite: true"


@pytest.fixture(params=["folder", "s3", "oss"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "folder" else request.getfixturevalue(f"{request.param}_bucket")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(str(tmp_path / "w"))


def write(destination: Destination, workspace: Workspace | None, content: bytes = NEW) -> None:
    with created(destination, workspace) as sink:
        sink.write(content)


def test_what_a_workspace_wrote_it_replaces_as_long_as_nobody_changed_it(place: str, workspace: Workspace) -> None:
    target = Destination("export.path", f"{place}/out/rows.jsonl", FREE)
    write(target, workspace)
    write(target, workspace, b"newer rows\n")
    outside = Workspace(place)
    assert outside.read(target.path) == b"newer rows\n"
    assert refusal(target, Workspace(workspace.root + "-other")) == (
        f"{target.path} exists already; name another file, or say {FREE} to replace it"
    )
    outside.write(target.path, b"edited\n")
    with pytest.raises(InputError, match=r"export\.path: .*rows\.jsonl was changed since .* export\.overwrite: true"):
        write(target, workspace)
    assert outside.read(target.path) == b"edited\n"
    write(Destination("export.path", target.path, FREE, overwrite=True), workspace)
    assert outside.read(target.path) == NEW
    write(target, workspace, b"its own again\n")


def test_what_is_cut_short_leaves_what_was_there(place: str, workspace: Workspace) -> None:
    target = Destination("export.path", f"{place}/rows.jsonl", FREE)
    write(target, workspace)
    with pytest.raises(KeyboardInterrupt), created(target, workspace) as sink:
        sink.write(b"half of")
        raise KeyboardInterrupt
    assert Workspace(place).read(target.path) == NEW
    write(target, workspace)  # still its own


def test_what_killed_processes_left_beside_a_file_goes_and_what_others_write_stays(
    tmp_path: Path, workspace: Workspace
) -> None:
    dead, alive, foreign = (tmp_path / f".rows.jsonl.{name}.tmp" for name in ("12", "34", "mine"))
    for path in (dead, alive, foreign):
        path.write_bytes(b"half")
    with alive.open("rb") as held:
        fcntl.flock(held, fcntl.LOCK_SH)
        write(Destination("export.path", str(tmp_path / "rows.jsonl"), FREE), workspace)
    assert sorted(path.name for path in tmp_path.glob(".rows*")) == [alive.name, foreign.name]


def test_a_crash_between_note_and_file_makes_nothing_somebodys(tmp_path: Path, workspace: Workspace) -> None:
    target = Destination("export.path", str(tmp_path / "rows.jsonl"), FREE)
    write(target, workspace)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        write(target, workspace, b"not written\n")
    write(target, workspace, b"written\n")
    assert (tmp_path / "rows.jsonl").read_bytes() == b"written\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl", "w"]


def test_what_is_no_file_is_never_replaced(tmp_path: Path, workspace: Workspace) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name in ("pipe.jsonl", "folder.jsonl"):
        target = Destination("export.path", str(tmp_path / name), FREE, overwrite=True)
        assert refusal(target, workspace) == f"{target.path} exists already and is not a file; name another one"


@pytest.mark.parametrize(
    ("path", "read"),
    [
        ("rows.jsonl", "zip://a.csv::rows.jsonl"),
        ("s3a://bucket/rows.jsonl", "s3://bucket/*.jsonl"),
        ("local://{here}/rows.jsonl", "./rows.jsonl"),
        ("link.jsonl", "rows.jsonl"),
        ("rows.jsonl", "link.jsonl"),
        ("folder/rows.jsonl", "folder/"),
    ],
)
def test_what_is_read_is_never_written_over_however_it_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, read: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    target = Destination("--export", path.format(here=tmp_path), "--overwrite", True, {"ingest.source": read})
    reason = refusal(target, None)
    assert reason is not None and "is what ingest.source names" in reason


def test_no_room_is_no_fault_of_the_path(tmp_path: Path, workspace: Workspace) -> None:
    target = Destination("export.path", str(tmp_path / "rows.jsonl"), FREE)
    with pytest.raises(StageError, match=r"export\.path .*rows\.jsonl: no room"), created(target, workspace):
        raise OSError(28, "No space left on device")
    assert not (tmp_path / "rows.jsonl").exists()


def test_a_scheme_that_nobody_knows_is_told(workspace: Workspace) -> None:
    with pytest.raises(InputError, match="nope"):
        refusal(Destination("export.path", "nope://bucket/rows.jsonl", FREE), workspace)


def test_a_link_that_others_planted_is_not_followed(
    tmp_path: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(secrets, "randbelow", lambda _: 7)
    theirs, target = tmp_path / "theirs.txt", tmp_path / "rows.jsonl"
    theirs.write_bytes(b"theirs")
    (tmp_path / ".rows.jsonl.7.tmp").symlink_to(theirs)
    with pytest.raises(InputError, match="cannot be written"):
        write(Destination("export.path", str(target), FREE), workspace)
    assert theirs.read_bytes() == b"theirs" and not os.path.lexists(target)


@pytest.mark.parametrize("was_there", [False, True])
def test_what_a_person_saved_there_while_it_was_written_stays(
    tmp_path: Path, workspace: Workspace, was_there: bool
) -> None:
    target = Destination("export.path", str(tmp_path / "rows.jsonl"), FREE)
    if was_there:
        write(target, workspace)
    with (
        pytest.raises(InputError, match=r"rows\.jsonl (exists already|was changed)"),
        created(target, workspace) as sink,
    ):
        sink.write(NEW)
        (tmp_path / "rows.jsonl").write_bytes(b"theirs")
    assert (tmp_path / "rows.jsonl").read_bytes() == b"theirs"
    assert [path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")] == []
