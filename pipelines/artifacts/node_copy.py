"""Parts of a workspace on object storage, on the disk of any node that needs them, at the paths of the one that asks.

Engines are given them, which compare paths.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pipelines.artifacts.workspace import Workspace
from pipelines.owned_folder import LOCK, shared_folder


@dataclass(frozen=True)
class NodeCopy:
    """A folder of one node that stands for a workspace, as `Staging.here`, and what of it others need."""

    folder: str
    workspace: Workspace
    parts: tuple[str, ...]

    @contextmanager
    def here(self) -> Iterator[None]:
        """While this is open, the parts lie at their paths on this node too; processes there share them."""
        owned = Path(self.folder).parent
        with ExitStack() as held:
            if not is_owned(owned):
                prefix, _, name = owned.name.rpartition("-")
                owned.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(shared_folder(owned.parent, f"{prefix}-", name))
                self._fetch(owned)
            yield

    def _fetch(self, owned: Path) -> None:
        """Bring the parts here; one process does, and the others wait for it."""
        with Path(owned, "fetching").open("w") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            for part in self.parts:
                for path in self.workspace.files(self.workspace.path(part)):
                    target = Path(self.folder, path.removeprefix(self.workspace.path("")))
                    if not target.exists():
                        self.workspace.fetch(path, target)


def is_owned(folder: Path) -> bool:
    """Whether a process of this node has a folder for itself: it is that of the node that asked."""
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False
