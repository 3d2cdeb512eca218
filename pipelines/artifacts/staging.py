"""A workspace on object storage as a folder of this machine, for work that takes its files by their paths.

What the work reads is fetched before. What it leaves goes back, also now and then while it lasts, so that a machine may
be lost: a run on another one goes on from there.
"""

import os
import tempfile
import threading
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from pipelines.artifacts.node_copy import NodeCopy
from pipelines.artifacts.stage import Inputs, Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.beside import beside
from pipelines.clean_up import clean_up
from pipelines.errors import StageError
from pipelines.owned_folder import owned_folder
from pipelines.progress import say, waiting

I = TypeVar("I", bound=Inputs)  # noqa: E741

STORE_SECONDS = 20.0
"""Between two looks for what is new here."""
LEAVE_SECONDS = 300
"""What storing may take where the work failed or was told to end."""
MARKS = ("config.json", "adapter_config.json", "complete.json")
"""Files by which a folder counts as whole: they follow all others, and go before them."""
UNFINISHED = (".tmp", ".part")
"""How names of files and folders end that get others when they are complete."""


class Staging:
    """The folder that stands for a workspace; where that is a folder, it stands for itself.

    Nothing else may write to the workspace meanwhile; see `Workspace.held`.
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self._held = ExitStack()
        self._here: Workspace | None = workspace if workspace.is_local else None
        self._known: dict[str, tuple[int, int]] = {}  # size and time of each file when it was the same there

    def __enter__(self) -> "Staging":
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    @property
    def here(self) -> Workspace:
        """The folder, which is made when it is needed and goes in the end."""
        if self._here is None:
            try:
                folder = self._held.enter_context(owned_folder(tempfile.gettempdir(), "danlu-staged-"))
            except OSError as error:
                raise StageError(f"no folder for what {self.workspace.root} holds ({error}); set TMPDIR") from error
            self._here = Workspace(f"{folder}/workspace")
            self._here.make_folder(self._here.root)
        return self._here

    def place(self, place: Place) -> Place:
        """Where a stage's folder is here."""
        return replace(place, workspace=self.here)

    def output(self, output: Output[Any]) -> Output[Any]:
        """A finished stage, as it is here."""
        return replace(output, place=self.place(output.folder))

    def copy(self, *parts: str) -> NodeCopy | None:
        """How other nodes get what lies below these paths of the workspace; None where they see it."""
        return None if self.workspace.is_local else NodeCopy(self.here.root, self.workspace, parts)

    def fetch(self, *parts: str) -> None:
        """Bring what lies below a path of the workspace here, if it is not."""
        if self.workspace.is_local:
            return
        root = self.workspace.path("")
        for path in self.workspace.files(self.workspace.path(*parts)):
            name = path.removeprefix(root)
            if name not in self._known:
                target = self.here.local(name)
                self.workspace.fetch(path, target)
                self._known[name] = _state(target)

    def store(self, place: Place | None = None) -> None:
        """Bring what is new or changed here to the workspace, and delete there what is gone from the place's folder."""
        if self.workspace.is_local:
            return
        there = dict(self._files())
        changed = [name for name, state in there.items() if self._known.get(name) != state]
        for name in sorted(changed, key=lambda name: (_is_mark(name), name.count("/"), there[name][1])):
            try:
                self.workspace.store(self.here.local(name), self.workspace.path(name))
            except FileNotFoundError:  # gone since
                continue
            self._known[name] = there[name]
        if place is None:
            return
        own = f"{place.stage}/{place.fingerprint}/"
        gone = [name for name in self._known if name.startswith(own) and name not in there]
        for name in sorted(gone, key=_is_mark, reverse=True):
            self.workspace.remove(self.workspace.path(name))
            del self._known[name]

    @contextmanager
    def work(
        self, place: Place, inputs: I, on_disk: Collection[str], *, spread: bool = False
    ) -> Iterator[tuple[Place, I]]:
        """A stage's place and inputs for work that goes on while this is open.

        `on_disk`: stages and folders that it takes by path, as `Stage.on_disk`; where it takes none, it works on the
        workspace itself. `spread`: it works on other nodes too, which fetch and store by themselves; what is here of
        its own place it brings by `Workspace.origin`.
        """
        if self.workspace.is_local or not on_disk:
            yield place, inputs
            return
        read = {field.name: getattr(inputs, field.name) for field in fields(inputs)}
        outputs = {name: output for name, output in read.items() if output is not None}
        with waiting(f"fetching what {place.stage} reads from {self.workspace.root}"):
            folders = {output.stage: (output.stage, output.folder.fingerprint) for output in outputs.values()}
            for name in on_disk:
                self.fetch(*folders.get(name, (name,)))
            if not spread:
                self.fetch(place.stage, place.fingerprint)
        workspace = replace(self.here, origin=self) if spread else self.here
        here = {
            name: replace(output, place=replace(output.folder, workspace=workspace)) for name, output in outputs.items()
        }
        try:
            with nullcontext() if spread else beside(partial(self._store_now_and_then, place)):
                yield replace(place, workspace=workspace), replace(inputs, **here)
        except BaseException:
            clean_up(f"storing in {self.workspace.root}", partial(self.store, place), LEAVE_SECONDS)
            raise
        with waiting(f"storing what {place.stage} left in {self.workspace.root}"):
            self.store(place)

    def _store_now_and_then(self, place: Place, stop: threading.Event) -> None:
        while not stop.wait(STORE_SECONDS):
            try:
                self.store(place)
            except StageError as error:
                say(f"  {error}; trying again")

    def _files(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """The complete files here, by their paths from the root, with their states."""
        for folder, folders, names in os.walk(self.here.root):
            folders[:] = [name for name in folders if not _is_unfinished(name)]
            for name in names:
                path = Path(folder, name)
                try:
                    if path.is_file() and not _is_unfinished(name):
                        yield str(path.relative_to(self.here.root)), _state(path)
                except FileNotFoundError:  # gone since
                    continue


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _is_mark(name: str) -> bool:
    return name.rpartition("/")[2] in MARKS


def _is_unfinished(name: str) -> bool:
    return name.endswith(UNFINISHED) or name.startswith(".converting-")
