"""Training on nodes that share no folder: each has the run on its own disk, and the rest goes through object storage.

What a node reads is fetched before: model, tokens, the last checkpoint, the journals. A checkpoint exists once every
node has stored what its ranks wrote, and rank 0 after them the manifest of all of it. So what is there in the end is
what one node leaves.
"""

import json
import os
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.beside import beside
from pipelines.errors import StageError
from pipelines.owned_folder import shared_folder
from pipelines.progress import say
from pipelines.train.checkpoint import MANIFEST, complete_checkpoints, is_checkpoint, spare, step_of
from pipelines.train.run import Run
from pipelines.train.spread import Spread
from pipelines.train.tokenize import KINDS, Tokenized

PREFIX = "danlu-training-"
LOOK_SECONDS = 3.0
"""Between two looks of the driver at the journal."""


def saved_checkpoints(run: Run) -> list[Path]:
    """The complete checkpoints, oldest first, wherever they lie."""
    if run.spread is None:
        return complete_checkpoints(run.checkpoints)
    names = run.spread.there.list(run.spread.path(run.checkpoints))
    folders = [run.checkpoints / name.rstrip("/").rpartition("/")[2] for name in names]
    found = [folder for folder in folders if is_checkpoint(folder)]
    there = [folder for folder in found if run.spread.there.exists(run.spread.path(folder / MANIFEST))]
    return sorted(there, key=step_of)


@contextmanager
def on_this_node(run: Run, attempt: str) -> Iterator[Run]:
    """The run as it is in a worker, on the disk of its node; the workers of one attempt there share a folder."""
    if run.spread is None:
        yield run
        return
    with shared_folder(tempfile.gettempdir(), PREFIX, attempt) as folder:
        moved = _moved(run, run.spread, Path(folder, "workspace"))
        moved.folder.mkdir(parents=True, exist_ok=True)
        yield moved


def _moved(run: Run, spread: Spread, here: Path) -> Run:
    def at(path: Path) -> Path:
        return here / path.relative_to(spread.here) if path.is_relative_to(spread.here) else path

    def tokens(data: Tokenized) -> Tokenized:
        shards = [{**shard, **{kind: str(at(Path(shard[kind]))) for kind in KINDS}} for shard in data.shards]
        return replace(data, shards=shards, index=str(at(Path(data.index))))

    return replace(
        run,
        model=at(run.model),
        folder=at(run.folder),
        training=tokens(run.training),
        held_out=tokens(run.held_out) if run.held_out else None,
        spread=replace(spread, here=here),
    )


def is_first_of_node(run: Run) -> bool:
    """Whether this rank does what is done once for each folder: on every node its first, else rank 0."""
    import torch.distributed as dist

    return dist.get_rank() == 0 if run.spread is None else os.environ["LOCAL_RANK"] == "0"


def fetch_run(run: Run) -> None:
    """Bring to this node what a worker reads; called by its first, before any of the others goes on."""
    spread = run.spread
    assert spread is not None
    if run.model.is_relative_to(spread.here):
        spread.fetch(run.model)
    for data in filter(None, (run.training, run.held_out)):
        for path in (data.index, *(shard[kind] for shard in data.shards for kind in KINDS)):
            spread.fetch(Path(path))
    for path in (run.journal, run.samples, *saved_checkpoints(run)[-1:]):
        spread.fetch(path)


def store_checkpoint(run: Run, checkpoint: Path, best: int | None) -> None:
    """Store a checkpoint that every rank has written; every rank calls it, and it is there when it returns.

    What there is beyond `save_total_limit` goes, but not the one of step `best`.
    """
    import torch.distributed as dist

    spread = run.spread
    assert spread is not None
    sizes: dict[str, int] = {}
    if is_first_of_node(run):
        files = {str(path.relative_to(checkpoint)): path for path in checkpoint.rglob("*") if path.is_file()}
        sizes = {name: path.stat().st_size for name, path in files.items() if name != MANIFEST}
        for name in sizes:
            spread.store(files[name])
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, sizes)
    if dist.get_rank() == 0:
        store_journals(run)
        every = {name: size for part in gathered for name, size in part.items()}
        spread.there.write(spread.path(checkpoint / MANIFEST), json.dumps(every, indent=1).encode())
        for folder in spare(saved_checkpoints(run), run.section.save_total_limit, best):
            spread.remove(folder)
    dist.barrier()


def store_journals(run: Run) -> None:
    """Let the driver see how far training is; rank 0 calls it."""
    if run.spread is not None:
        for path in filter(Path.is_file, (run.journal, run.samples)):
            run.spread.store(path)


def fetch_checkpoint(run: Run, checkpoint: Path) -> None:
    """Bring here what other nodes wrote of a checkpoint."""
    if run.spread is not None:
        run.spread.fetch(checkpoint)


def store_weights(run: Run) -> None:
    """Store what is here beside checkpoints: the weights, last of all, and what was drawn and logged."""
    if run.spread is not None:
        for path in run.folder.iterdir():
            if path not in (run.checkpoints, run.universal, run.trained):
                run.spread.store(path)
        run.spread.store(run.trained)


def begin_again(run: Run) -> None:
    """Before the driver starts workers: nobody tells them to leave."""
    run.leave.unlink(missing_ok=True)
    if run.spread is not None:
        run.spread.remove(run.leave)


def is_told(run: Run) -> bool:
    """Whether the driver, on another node, told the workers to leave."""
    return run.spread is not None and run.spread.there.exists(run.spread.path(run.leave))


@contextmanager
def followed(run: Run) -> Iterator[None]:
    """While in here the driver has the journals as they are, and what tells its process to end reaches the workers."""
    spread = run.spread
    if spread is None:
        yield
        return
    with beside(partial(_follow, run, spread)):
        yield


def _follow(run: Run, spread: Spread, stop: threading.Event) -> None:
    told = ended = False
    while not ended:
        ended = stop.wait(LOOK_SECONDS)  # and once more after that
        try:
            if run.leave.exists() and not told:
                spread.store(run.leave)
                told = True
            for path in (run.journal, run.samples):
                if spread.there.exists(spread.path(path)):
                    spread.there.fetch(spread.path(path), path)
        except StageError as error:
            say(f"  {error}; trying again")


def fetch_weights(run: Run) -> None:
    """Bring to the driver what workers left beside checkpoints."""
    if run.spread is not None:
        for name in run.spread.there.list(run.spread.path(run.folder)):
            path = run.folder / name.rstrip("/").rpartition("/")[2]
            if path != run.checkpoints:
                run.spread.fetch(path)
