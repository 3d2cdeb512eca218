"""Where Ray's temporary files find no room, before a run and in the middle of one; a home that nobody can write to."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

DANLU = str(Path(sys.executable).parent / "danlu")
CLEAN = ["clean", "tiny", "ingest.limit=40"]


@contextmanager
def disk(megabytes: int) -> Iterator[Path]:
    """A file system of that size, on a folder with a path short enough for sockets."""
    folder = Path(tempfile.mkdtemp(prefix="dk-", dir="/tmp"))
    try:
        mounted = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
        if subprocess.run(mounted, capture_output=True, check=False).returncode:
            pytest.skip("mounting a small disk needs root's rights")
        try:
            yield folder
        finally:
            subprocess.run(["umount", "--lazy", str(folder)], check=True)
    finally:
        folder.rmdir()


def processes_of(folder: str) -> list[str]:
    """Command lines of living processes whose TMPDIR is that folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TMPDIR") == folder and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:200])
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def test_a_temporary_folder_without_room_is_told_before_ray_starts(tmp_path: Path) -> None:
    with disk(megabytes=8) as folder:
        said = subprocess.run(
            [DANLU, *CLEAN, "--workspace", str(tmp_path / "w")],
            env={**os.environ, "TMPDIR": str(folder)},
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert said.returncode == 1
        (line,) = [line for line in said.stderr.splitlines() if "error" in line]
        assert line.startswith(
            f"error: {folder}: 8 MB free, and Ray's temporary files need 64; make room there, or set "
        )
        assert "Traceback" not in said.stderr
        assert [*folder.iterdir()] == [] and not [*tmp_path.rglob("manifest.json")]


@pytest.mark.slow
def test_a_temporary_folder_that_fills_ends_the_run_with_one_line(tmp_path: Path) -> None:
    command = [DANLU, *CLEAN, "--workspace", str(tmp_path / "w")]
    with disk(megabytes=80) as folder:
        environment = {**os.environ, "TMPDIR": str(folder)}
        with open(tmp_path / "said", "w") as sink, subprocess.Popen(command, env=environment, stderr=sink) as process:
            while "ingest …" not in (tmp_path / "said").read_text(encoding="utf-8") and process.poll() is None:
                time.sleep(0.1)
            # another program's file takes what is left but 2 MB
            (folder / "others").write_bytes(bytes(shutil.disk_usage(folder).free - (2 << 20)))
            process.wait(300)
        said = (tmp_path / "said").read_text(encoding="utf-8")
        assert process.returncode == 1, said
        assert f"error: {folder}: no room left for Ray's temporary files; make some, or set TMPDIR; what is " in said
        assert "Traceback" not in said
        deadline = time.monotonic() + 30
        while processes_of(str(folder)) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert processes_of(str(folder)) == []
        (folder / "others").unlink()
        again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
        assert again.returncode == 0, again.stderr
        assert [*folder.iterdir()] == []


@pytest.mark.slow
def test_a_home_and_a_temporary_folder_that_cannot_be_written_to_stop_nothing(tmp_path: Path) -> None:
    said = subprocess.run(
        [DANLU, *CLEAN, "--workspace", str(tmp_path / "w")],
        env={**os.environ, "TMPDIR": "/proc", "HOME": "/proc/none"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert said.returncode == 0, said.stderr
    assert "  TMPDIR /proc: nothing can be written there; Ray's temporary files go to /tmp\n" in said.stderr
