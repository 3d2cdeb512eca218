"""kill -9 of everything at random moments: the data set is the uninterrupted one, and nothing is paid for twice."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from pipelines.artifacts.workspace import Workspace
from pipelines.llm.ledger import RecordKind, read_index
from rayjobs import pipeline
from tests.pipelines.synthesize.serving import Server, grid, recipe

IN_FLIGHT = 32


@pytest.fixture
def short_tmp() -> Iterator[Path]:
    """A folder with a short path, since Ray puts sockets below TMPDIR."""
    folder = Path(tempfile.mkdtemp(prefix="ds-", dir="/tmp"))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, workspace: str | None = None) -> subprocess.Popen[str]:
    danlu = str(Path(sys.executable).parent / "danlu")
    return subprocess.Popen(
        [danlu, "synthesize", str(folder / "mine.yaml"), "--workspace", workspace or str(folder / "w")],
        env={**os.environ, "TMPDIR": str(folder)},
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def write_recipe(folder: Path, server: Server, cells: int) -> None:
    tree = recipe(server.url, cells, endpoint={"max_in_flight": IN_FLIGHT}).model_dump(
        mode="json", exclude_defaults=True
    )
    (folder / "mine.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")


def settled(folder: Path, workspace: str | None = None) -> set[str]:
    """The prompts that have an answer in the ledger, by the server's names for them."""
    made = grid(pipeline.load(str(folder / "mine.yaml")))
    requests = [made.request(pos) for pos in made.positions()]
    kinds = read_index(Workspace(workspace or str(folder / "w"))).kinds([request.key for request in requests])
    known = [request.messages for request, kind in zip(requests, kinds, strict=True) if kind == RecordKind.ANSWER]
    return {hashlib.sha256(json.dumps(messages, sort_keys=True).encode()).hexdigest()[:16] for messages in known}


def finish(folder: Path) -> str:
    process = start(folder)
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    outputs = pipeline.status(pipeline.load(str(folder / "mine.yaml")), Workspace(str(folder / "w")))
    digest: str = outputs["synthesize"].report.digest
    return digest


def killed_at_random(folder: Path, server: Server, cells: int, kills: int) -> None:
    """Run to the end through a number of kills, and check what the server and the ledger saw."""
    write_recipe(folder, server, cells)
    draw = random.Random(kills)
    known: set[str] = set()
    seen = 0
    for _ in range(kills):
        process = start(folder)
        before = len(server.outcomes())
        while len(server.outcomes()) < before + draw.randint(5, 2 * cells // kills):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        assert not known & {digest for _, digest, _ in server.log()["requests"][seen:]}
        assert known <= settled(folder)
        known = settled(folder)  # before `seen`: what the killed run still asks for a moment is not in it
        seen = len(server.outcomes())
    finish(folder)
    assert not known & {digest for _, digest, _ in server.log()["requests"][seen:]}
    asked = Counter(digest for _, digest, _ in server.log()["requests"])
    assert len(asked) == 2 * cells
    assert sum(asked.values()) - 2 * cells <= kills * IN_FLIGHT
    assert max(asked.values()) <= kills + 1


@pytest.mark.parametrize("kills", [pytest.param(10, marks=pytest.mark.slow), 1])
def test_a_killed_run_ends_like_an_uninterrupted_one(
    short_tmp: Path, start_server: Callable[..., Server], kills: int
) -> None:
    cells = 80 * kills
    folders = [short_tmp / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
    killed_at_random(folders[0], start_server(0.1), cells, kills)
    server = start_server(0.02)
    write_recipe(folders[1], server, cells)
    straight = finish(folders[1])
    assert finish(folders[0]) == straight
    assert len(server.outcomes()) == 2 * cells
