"""On object storage, too, one run at a time is in a workspace, and a killed one does not keep others out."""

import json
import os
import time
from pathlib import Path

import pytest

from pipelines.artifacts import lease
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import StageError


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, seconds in (("LEASE_SECONDS", 3.0), ("BEAT_SECONDS", 0.1), ("LOOK_SECONDS", 0.05)):
        monkeypatch.setattr(lease, name, seconds)


@pytest.fixture
def workspace(bucket: str) -> Workspace:
    return Workspace(f"{bucket}/leased")


def test_a_second_run_is_refused_by_name(workspace: Workspace) -> None:
    with workspace.held():
        with pytest.raises(StageError, match=rf"leased: process {os.getpid()} on .* is at work here"), workspace.held():
            pass
        with pytest.raises(StageError), workspace.held():
            pass
        assert workspace.at_work().startswith(f"process {os.getpid()} on ")
    assert not workspace.exists(workspace.path(".running")) and workspace.at_work() == ""
    with workspace.held():
        pass


@pytest.mark.parametrize("left", [json.dumps({"holder": "process 1 on gone", "id": "x"}), "not JSON", "[]", ""])
def test_what_a_killed_run_left_is_taken_over(
    workspace: Workspace, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace.write(workspace.path(".running"), left.encode())
    began = time.monotonic()
    with workspace.held():
        assert time.monotonic() - began >= lease.LEASE_SECONDS
        assert b"process" in workspace.read(workspace.path(".running"))
    assert ("process 1 on gone" if "gone" in left else "another run") in capsys.readouterr().err


def test_a_run_that_lost_its_workspace_ends(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[int] = []
    monkeypatch.setattr(lease.os, "kill", lambda process, number: told.append(number))
    with workspace.held():
        other = json.dumps({"holder": "process 2 on elsewhere", "id": "other"}).encode()
        workspace.write(workspace.path(".running"), other)
        until = time.monotonic() + 60
        while not told and time.monotonic() < until:
            time.sleep(0.05)
    assert told == [lease.signal.SIGTERM]
    assert workspace.read(workspace.path(".running")) == other


def test_a_storage_that_fails_for_a_moment_costs_nothing(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, failed = Workspace.write, []

    def flaky(self: Workspace, path: str, data: bytes) -> None:
        if len(failed) < 2:
            failed.append(path)
            raise StageError(f"{path}: cannot be written (timed out)")
        write(self, path, data)

    with workspace.held():
        monkeypatch.setattr(Workspace, "write", flaky)
        before = workspace.read(workspace.path(".running"))
        until = time.monotonic() + 60
        while workspace.read(workspace.path(".running")) == before and time.monotonic() < until:
            time.sleep(0.05)
        assert workspace.read(workspace.path(".running")) != before
    assert capsys.readouterr().err.count("cannot say that this run is at work, trying again") == 2


def test_the_lock_of_a_folder_stays_what_it_was(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path))
    with workspace.held(), pytest.raises(StageError, match="is at work here"), workspace.held():
        pass
