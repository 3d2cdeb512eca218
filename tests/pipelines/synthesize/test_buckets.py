"""Answers on S3: a run that is killed, and one whose bucket is not there."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.artifacts.workspace import Workspace
from tests.pipelines.synthesize.serving import Server
from tests.pipelines.synthesize.test_crash import settled, short_tmp, start, write_recipe

__all__ = ["short_tmp"]


def segments(workspace: Workspace) -> list[str]:
    return [path for path in workspace.list(workspace.path("ledger")) if path.endswith(".log")]


def test_no_request_is_sent_for_a_bucket_that_is_not_there(
    bucket: str, tmp_path: Path, start_server: Callable[..., Server]
) -> None:
    server = start_server()
    write_recipe(tmp_path, server, 20)
    command = [str(Path(sys.executable).parent / "danlu"), "synthesize", str(tmp_path / "mine.yaml")]
    done = subprocess.run(
        [*command, "--workspace", f"{bucket}-absent/w"], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode in (1, 2)
    assert "Traceback" not in done.stderr and f"{bucket.removeprefix('s3://')}-absent" in done.stderr
    assert server.outcomes() == []


@pytest.mark.slow
def test_a_killed_run_on_a_bucket_asks_for_nothing_that_was_filed(
    bucket: str, short_tmp: Path, start_server: Callable[..., Server]
) -> None:
    server, cells = start_server(0.1), 300
    workspace = Workspace(f"{bucket}/w")
    write_recipe(short_tmp, server, cells)
    process = start(short_tmp, workspace.root)
    while len(server.outcomes()) < 300:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    time.sleep(2)  # what the killed run still had under way has arrived
    known, seen = settled(short_tmp, workspace.root), len(server.outcomes())
    assert len(known) > 100
    process = start(short_tmp, workspace.root)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    log = server.log()["requests"]
    assert not known & {digest for _, digest, _ in log[seen:]}
    asked = Counter(digest for _, digest, _ in log)
    assert len(asked) == 2 * cells
    assert sum(asked.values()) <= 2 * cells + seen - len(known)  # what came and was not filed yet, and nothing else
    assert len(settled(short_tmp, workspace.root)) == 2 * cells
    assert len(segments(workspace)) <= 2  # one of the killed run's objects, one of this run's
