"""Folders of models that are converted or linked once, and then used by every run of a workspace."""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from pipelines.artifacts.workspace import sync_folder, sync_tree
from pipelines.progress import waiting


def made_once(folder: Path, title: str, write: Callable[[Path], None]) -> Path:
    """`folder`, filled by `write` the first time; nobody sees it half-written."""
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    with waiting(title):
        try:
            write(scratch)
            os.chmod(scratch, 0o755)
            sync_tree(str(scratch))
            os.rename(scratch, folder)
            sync_folder(str(folder.parent))
        except OSError:
            if not (folder / "config.json").is_file():  # else another run was faster, with the same result
                raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder
