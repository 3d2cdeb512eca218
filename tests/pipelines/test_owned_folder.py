"""Folders that belong to a process, in a place where others write too."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from pipelines import owned_folder as owned_folder_module
from pipelines.models.cache import made_once
from pipelines.owned_folder import owned_folder, shared_folder, sweep

PROJECT = Path(__file__).parents[2]
OWNER = """
import sys, time
from pipelines.owned_folder import owned_folder
with owned_folder(sys.argv[1], sys.argv[2]) as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def killed_owner(parent: Path, prefix: str) -> Path:
    """The folder of a process that was killed."""
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    command = [sys.executable, "-c", OWNER, str(parent), prefix]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        sweep(parent, prefix)
        assert folder.is_dir()  # it lives
        owner.send_signal(signal.SIGKILL)
    return folder


def test_what_a_killed_process_left_is_removed_by_the_next_of_its_kind(tmp_path: Path) -> None:
    for prefix in ("danlu-ray-", "danlu-"):
        folder = killed_owner(tmp_path, prefix)
        (folder / "session" / "logs").mkdir(parents=True)
        with owned_folder(tmp_path, prefix) as ours:
            assert Path(ours).stat().st_mode & 0o777 == 0o700
            assert [*tmp_path.iterdir()] == [Path(ours)]
        assert [*tmp_path.iterdir()] == []


def test_a_model_half_converted_by_a_killed_run_is_removed_by_the_next(tmp_path: Path) -> None:
    folder = killed_owner(tmp_path, ".converting-")
    (folder / "m").mkdir()
    made = made_once(tmp_path / "m", "converting", lambda scratch: (scratch / "config.json").write_text("{}") and None)
    assert [*tmp_path.iterdir()] == [made]
    assert [path.name for path in made.iterdir()] == ["config.json"]  # no lock among the model's files
    assert made.stat().st_mode & 0o777 == 0o755


def test_what_others_put_there_is_neither_followed_nor_waited_for_nor_removed(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "lock").touch()
    (tmp_path / "danlu-link").symlink_to(tmp_path / "precious")
    for name in ("danlu-fifo", "danlu-linked"):
        (tmp_path / name).mkdir()
    os.mkfifo(tmp_path / "danlu-fifo" / "lock")
    (tmp_path / "danlu-linked" / "lock").symlink_to(tmp_path / "precious" / "lock")
    began = time.monotonic()
    sweep(tmp_path, "danlu-")
    assert time.monotonic() - began < 5
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"precious", "danlu-link", "danlu-fifo", "danlu-linked"}
    assert (tmp_path / "precious" / "lock").exists()


def test_who_is_killed_while_removing_leaves_what_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(_: Path, **__: Any) -> None:
        raise KeyboardInterrupt

    for folder in (owned_folder(tmp_path, "a-"), shared_folder(tmp_path, "a-", "b")):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt), folder as ours:
            Path(ours, "session").mkdir()
            patched.setattr(shutil, "rmtree", killed)
        assert [*tmp_path.iterdir()] == [Path(ours)]
        sweep(tmp_path, "a-")
        assert [*tmp_path.iterdir()] == []


def write_on(folder: Path, ended: threading.Event) -> None:
    """Write to a folder as a process does that ends later than its owner."""
    while not ended.is_set():
        with suppress(FileNotFoundError):
            (folder / "session").mkdir(exist_ok=True)
            for number in range(50):
                (folder / "session" / str(number)).write_text("x")


def test_who_still_writes_there_is_waited_for(tmp_path: Path) -> None:
    ended = threading.Event()
    with owned_folder(tmp_path, "danlu-ray-") as folder:
        writer = threading.Thread(target=write_on, args=(Path(folder), ended))
        writer.start()
        threading.Timer(1.0, ended.set).start()
    writer.join()
    assert [*tmp_path.iterdir()] == []


def test_what_is_not_let_go_of_keeps_its_lock_for_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owned_folder_module, "REMOVE_SECONDS", 0.5)
    with monkeypatch.context() as busy:
        busy.setattr(owned_folder_module.shutil, "rmtree", lambda *_, **__: None)
        with owned_folder(tmp_path, "danlu-ray-") as folder:
            (Path(folder) / "session").mkdir()
    assert {path.name for path in Path(folder).iterdir()} == {"lock", "session"}
    sweep(tmp_path, "danlu-ray-")
    assert [*tmp_path.iterdir()] == []


def test_a_folder_that_is_shared_is_removed_by_the_last(tmp_path: Path) -> None:
    with shared_folder(tmp_path, "a-", "b") as first:
        with shared_folder(tmp_path, "a-", "b") as second:
            assert first == second
        assert Path(first).is_dir()
    assert [*tmp_path.iterdir()] == []
