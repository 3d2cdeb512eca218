"""Where a run lies whose nodes share no folder: on each of them in one of its own, and in a workspace that all see."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.artifacts.workspace import Place, Workspace
from pipelines.train.checkpoint import MANIFEST


@dataclass(frozen=True)
class Spread:
    """A folder of this node, and the workspace for which it stands."""

    here: Path
    there: Workspace

    def path(self, path: Path) -> str:
        """Where a path of this node's folder is in the workspace."""
        return self.there.path(str(path.relative_to(self.here)))

    def fetch(self, path: Path) -> None:
        """Bring a file, or all below a folder, here, if it is not."""
        below = self.path(path)
        for name in self.there.files(below):
            target = Path(f"{path}{name.removeprefix(below)}")
            if not target.exists():
                self.there.fetch(name, target)

    def store(self, path: Path) -> None:
        """Bring a file, or all below a folder, there."""
        for file in [path] if path.is_file() else filter(Path.is_file, path.rglob("*")):
            self.there.store(file, self.path(file))

    def remove(self, path: Path) -> None:
        """Delete there what lies at a path or below it, a checkpoint's manifest first."""
        for name in sorted(self.there.files(self.path(path)), key=lambda name: not name.endswith(f"/{MANIFEST}")):
            self.there.remove(name)


def spread_of(place: Place) -> Spread | None:
    """How a run in a stage's folder is spread; None where all nodes see the folder."""
    origin = place.workspace.origin
    return None if origin is None else Spread(Path(place.workspace.root), origin.workspace)
