"""Temporary folders of engines: short, and gone when their owner is, however it ended."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path

import pytest

from serve.engine.command import temporary
from serve.engine.scratch import short_folder, sweep

OWNER = """
import sys, tempfile, time
from serve.engine.scratch import short_folder
tempfile.tempdir = sys.argv[1]
with short_folder() as folder:
    print(folder, flush=True)
    time.sleep(60)
"""


def test_the_paths_of_an_engine_s_sockets_are_short_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for parent in (tmp_path / ("x" * 60), Path("/tmp")):
        parent.mkdir(exist_ok=True)
        monkeypatch.setattr(tempfile, "tempdir", str(parent))
        with short_folder() as folder, socket.socket(socket.AF_UNIX) as listener:
            assert temporary(folder)["TMPDIR"] == folder
            listener.bind(f"{folder}/{uuid.uuid4()}")
        assert not Path(folder).exists()


def test_the_folder_of_a_killed_engine_is_removed_and_that_of_a_living_one_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as parent:
        monkeypatch.setattr(tempfile, "tempdir", parent)
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
        with subprocess.Popen(
            [sys.executable, "-c", OWNER, parent], stdout=subprocess.PIPE, text=True, env=environment
        ) as owner:
            assert owner.stdout is not None
            of_other = Path(owner.stdout.readline().strip())
            (of_other / "socket").touch()
            unlocked = Path(parent, "danlu-of-another-kind")
            unlocked.mkdir()
            with short_folder() as ours:
                assert (of_other.parent, of_other.exists()) == (Path(parent), True)
                owner.send_signal(signal.SIGKILL)
                owner.wait()
                assert of_other.exists()
                sweep()
                assert sorted(Path(parent).iterdir()) == sorted([unlocked, Path(ours)])
            assert list(Path(parent).iterdir()) == [unlocked]
