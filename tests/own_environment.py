"""An environment of its own for a program of another project, made while a test runs; without a network the test is
left out."""

import subprocess
import sys
from pathlib import Path

import pytest


def install(*command: str, cwd: Path, seconds: float = 600) -> None:
    """Run a package manager; the test is left out where it cannot fetch."""
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=seconds)
    if ended.returncode:
        pytest.skip(f"cannot install: {ended.stderr[-300:]}")


def programs(folder: Path, *packages: str, seconds: float = 600) -> Path:
    """The folder of the programs of a new environment with some packages, `python` among them."""
    install(sys.executable, "-m", "venv", "env", cwd=folder)
    install("env/bin/pip", "install", "-q", *packages, cwd=folder, seconds=seconds)
    return folder / "env" / "bin"
