"""A folder with packages of another project that have the names of ours, and what Ray's workers import there."""

import os
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).parents[1]
PACKAGES = ("pipelines", "serve", "rayjobs")

TASK = """
import os, sys
import ray
from rayjobs.cluster import Cluster

@ray.remote
def imported(folder):
    import pipelines.errors, rayjobs.cluster, serve.discovery
    return [pipelines.__file__, serve.__file__, rayjobs.__file__], folder in sys.path

with Cluster(*sys.argv[1:]) as cluster:
    cluster.connect()
    files, is_folder_searched = ray.get(imported.remote(os.getcwd()))
print(*files, is_folder_searched)
"""
"""Prints which files a Ray worker has imported as our packages, and whether it searches the driver's folder."""

OURS = " ".join(str(PROJECT / package / "__init__.py") for package in PACKAGES)


def foreign_folder(parent: Path) -> Path:
    """A folder with packages of another project that have the names of ours."""
    folder = parent / "another project"
    for package in PACKAGES:
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text('raise ImportError("foreign")\n')
    return folder


def run_task(folder: Path, *address: str, **environment: str) -> str:
    """What `TASK` prints in a folder; on the cluster at an address, else on a Ray of our own."""
    result = subprocess.run(
        [sys.executable, "-P", "-c", TASK, *address],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout.strip()
