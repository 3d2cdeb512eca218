"""Folders of models that are converted or linked once, and then used by every run of a workspace."""

import os
from collections.abc import Callable
from pathlib import Path

from pipelines.artifacts.workspace import sync_folder, sync_tree
from pipelines.owned_folder import owned_folder
from pipelines.progress import waiting


def made_once(folder: Path, title: str, write: Callable[[Path], None]) -> Path:
    """`folder`, filled by `write` the first time; nobody sees it half-written."""
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with waiting(title), owned_folder(folder.parent, ".converting-") as scratch:
        made = Path(scratch, folder.name)
        made.mkdir(mode=0o755)
        write(made)
        sync_tree(str(made))
        try:
            os.rename(made, folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another run was faster, with the same result
                raise
        sync_folder(str(folder.parent))
    return folder
