"""Whatever is waited for, a line is said now and then where there is no terminal."""

import os
import subprocess
import sys
import time

import pytest

from pipelines import progress
from pipelines.progress import never_silent, say, waiting


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "STEADY_INTERVAL", 0.3)


def test_a_wait_says_how_long_it_has_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with waiting("fetching"):
        time.sleep(1.2)
    first, *between, last = capsys.readouterr().err.splitlines()
    assert first == "  fetching …" and last.startswith("  fetching: ")
    assert 2 <= len(between) <= 4
    assert all(line.startswith("  fetching: ") and line.endswith(" s so far") for line in between)


def test_only_what_is_silent_is_spoken_for_by_the_innermost(capsys: pytest.CaptureFixture[str]) -> None:
    with never_silent("train"):
        for _ in range(10):
            say("step")
            time.sleep(0.1)
        assert set(capsys.readouterr().err.splitlines()) == {"step"}
        with never_silent("merging"):
            time.sleep(0.8)
    said = capsys.readouterr().err
    assert "  merging: " in said and "  train: " not in said


def test_an_error_ends_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="the cause"), never_silent("train"):
        raise ValueError("the cause")
    time.sleep(0.8)
    assert capsys.readouterr().err == ""


SAYING = """
import sys
from pipelines.clean_up import clean_up
from pipelines.progress import say

ended = []
try:
    for _ in range(3):
        say("x" * 100000)  # more than a pipe holds
    raise ValueError("the true error")
except ValueError as error:
    clean_up("one", lambda: 1 / 0, 10)
    clean_up("two", lambda: ended.append(2), 10)
    print(error, ended)
"""


@pytest.mark.parametrize("where", ["pipe", "full", "closed"])
def test_what_cannot_be_said_ends_neither_the_work_nor_a_clean_up(where: str) -> None:
    command = [sys.executable, "-c", SAYING]
    if where == "closed":
        command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
    nobody, write = os.pipe()
    os.close(nobody)
    with open("/dev/full", "wb") as full:
        error = {"pipe": write, "full": full, "closed": None}[where]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=error, text=True, timeout=60)
    os.close(write)
    assert done.stdout == "the true error [2]\n"
