"""Folders of models that are converted or linked once, and then used by every run of a workspace."""

import hashlib
import os
from collections.abc import Callable, Collection, Mapping
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


def made_of_links(
    folder: Path,
    cache: Path,
    kind: str,
    own: Mapping[str, str],
    title: str,
    *,
    without: Collection[str] = (),
) -> Path:
    """A folder in `cache` that is a model with some text files of its `own`, and links to all others but `without`.

    Neither its name nor its links say where `cache` is, if the model lies there too: a workspace may be moved.
    """
    source, root = folder.resolve(), cache.resolve()
    inside = source.is_relative_to(root)
    place = source.relative_to(root) if inside else source
    told = "\0".join([str(place), *(f"{name}\0{text}" for name, text in sorted(own.items()))])
    target = cache / f"{folder.name}-{kind}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"

    def write(scratch: Path) -> None:
        for path in source.iterdir():
            if path.name not in own and path.name not in without:
                (scratch / path.name).symlink_to(Path("..", place, path.name) if inside else path)
        for name, text in own.items():
            (scratch / name).write_text(text, encoding="utf-8")

    return made_once(target, title, write)
