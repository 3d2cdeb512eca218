"""Write beside every line of cpu.lock the digests of the files that pip may install for it; run it after a change.

    python requirements/add_hashes.py [--torch WHEEL]

The package index tells them (the one that pip is set to; its JSON form, PEP 691), for wheels that CPython 3.11 on Linux
(x86_64 and aarch64) can use, and for the source where there is none. PyTorch's CPU wheel is not on that index: its
digest is that of the file given with --torch, and stays as it is otherwise.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.tags import compatible_tags, cpython_tags
from packaging.utils import InvalidSdistFilename, InvalidWheelFilename, parse_sdist_filename, parse_wheel_filename
from packaging.version import Version

LOCK = Path(__file__).with_name("cpu.lock")
PYTHON = (3, 11)
PLATFORMS = [f"manylinux_2_{minor}_{machine}" for machine in ("x86_64", "aarch64") for minor in range(40, 4, -1)]
PLATFORMS += ["manylinux2014_x86_64", "manylinux2014_aarch64", "manylinux2010_x86_64", "manylinux1_x86_64"]
USABLE = {*cpython_tags(PYTHON, platforms=PLATFORMS), *compatible_tags(PYTHON, "cp311", platforms=PLATFORMS)}


def main() -> int:
    """Write the lock anew; a line of which the index knows no file ends the script, and nothing is written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", type=Path, help="PyTorch's CPU wheel")
    options = parser.parse_args()
    comments, known = read(LOCK.read_text(encoding="utf-8"))
    if options.torch:
        known[f"torch=={parse_wheel_filename(options.torch.name)[1]}"] = [file_digest(options.torch)]
    index = index_url()
    asked = [pin for pin in known if not pin.startswith("torch==")]
    with ThreadPoolExecutor(8) as pool:
        known |= dict(zip(asked, pool.map(lambda pin: digests(index, *pin.split("==")), asked), strict=True))
    if lacking := [pin for pin, found in known.items() if not found]:
        print(f"no usable file: {', '.join(lacking)}", file=sys.stderr)
        return 1
    lines = [
        " \\\n    ".join([pin, *(f"--hash=sha256:{digest}" for digest in known[pin])])
        for pin in sorted(known, key=str.lower)
    ]
    LOCK.write_text("\n".join([*comments, *lines]) + "\n", encoding="utf-8")
    return 0


def read(lock: str) -> tuple[list[str], dict[str, list[str]]]:
    """The comments at the head, and the digests by `name==version`."""
    comments, pins = [], {}
    for line in lock.replace("\\\n", " ").splitlines():
        if line.startswith("#"):
            comments.append(line)
        elif line.strip():
            pins[line.split()[0]] = re.findall(r"--hash=sha256:([0-9a-f]{64})", line)
    return comments, pins


def index_url() -> str:
    """Of the index that pip asks."""
    command = [sys.executable, "-m", "pip", "config", "get", "global.index-url"]
    told = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if told:
        return told.rstrip("/")
    from pip._internal.models.index import PyPI

    return PyPI.simple_url.rstrip("/")


def digests(index: str, name: str, version: str) -> list[str]:
    """SHA-256 of the files of a release that may be installed, sorted."""
    wanted = {"Accept": "application/vnd.pypi.simple.v1+json"}
    with urllib.request.urlopen(urllib.request.Request(f"{index}/{name}/", headers=wanted), timeout=60) as answer:
        files = json.load(answer)["files"]
    wheels, sources = [], []
    for file in files:
        try:
            if file["filename"].endswith(".whl"):
                _, found, _, tags = parse_wheel_filename(file["filename"])
                if found == Version(version) and tags & USABLE:
                    wheels.append(file["hashes"]["sha256"])
            elif parse_sdist_filename(file["filename"])[1] == Version(version):
                sources.append(file["hashes"]["sha256"])
        except (InvalidWheelFilename, InvalidSdistFilename):  # forms that pip does not install either
            continue
    return sorted(wheels or sources)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    sys.exit(main())
