"""Checkpoints: one folder per step, complete once it has its manifest; nothing else is ever resumed from.

checkpoints/checkpoint-<step>/     what each rank owns, written by that rank: ZeRO shards, random states
    complete.json                  written last, by rank 0 after all ranks: the files and their sizes
"""

import json
import os
import re
import shutil
from pathlib import Path

from pipelines.artifacts.workspace import sync_folder, sync_tree

PREFIX = "checkpoint-"
MANIFEST = "complete.json"


def mark_complete(folder: Path) -> None:
    """Write the manifest of a checkpoint that every rank has finished writing, once all of it is on disk."""
    sync_tree(str(folder))
    for above in (folder.parent, folder.parent.parent):  # the first checkpoint makes the folder of all
        sync_folder(str(above))
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}
    replace_text(folder / MANIFEST, json.dumps(sizes, indent=1))


def is_complete(folder: Path) -> bool:
    """Whether a checkpoint has its manifest, and every file in it the size it says."""
    if not (folder / MANIFEST).is_file():
        return False
    sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    return all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in sizes.items())


def complete_checkpoints(root: Path) -> list[Path]:
    """The complete checkpoints below `root`, oldest first."""
    return [folder for folder in _checkpoints(root) if is_complete(folder)]


def step_of(folder: Path) -> int:
    """The optimizer step a checkpoint was taken at."""
    return int(folder.name.removeprefix(PREFIX))


def remove_incomplete(root: Path) -> None:
    """Delete what a run that was stopped left half-written."""
    for folder in _checkpoints(root):
        if not is_complete(folder):
            shutil.rmtree(folder)


def remove_oldest(root: Path, keep: int, best: int | None = None) -> None:
    """Delete complete checkpoints until `keep` are left, but not that of step `best`; each loses its manifest first."""
    for folder in spare(complete_checkpoints(root), keep, best):
        (folder / MANIFEST).unlink()
        shutil.rmtree(folder)


def spare(found: list[Path], keep: int, best: int | None) -> list[Path]:
    """The oldest of some checkpoints, but for the one of step `best`, without which `keep` are left."""
    rest = [folder for folder in found[:-1] if step_of(folder) != best]
    return rest[: max(0, len(found) - keep)]


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder has a checkpoint's name."""
    return re.fullmatch(PREFIX + "[0-9]{1,15}", folder.name) is not None


def replace_text(path: Path, text: str) -> None:
    """Write a file so that readers see the old or the new text, never a part."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
    sync_folder(str(path.parent))


def _checkpoints(root: Path) -> list[Path]:
    return sorted((path for path in root.glob(f"{PREFIX}*") if path.is_dir() and is_checkpoint(path)), key=step_of)
