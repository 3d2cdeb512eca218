"""A run on a cluster whose nodes share no folder, only a URL: work by paths is done on one node, as on one machine.

The stages up to train are spread over the cluster as ever. The others run there in a process with a Ray of its own,
which keeps the workspace on the node's disk; see pipelines/artifacts/staging.py.
"""

import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines import placement
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import HardwareError, Problem, RecipeError
from pipelines.kill_with_parent import PARENT, child_environment
from pipelines.progress import say
from pipelines.recipe.load import recipe_file
from pipelines.recipe.schema import Recipe
from rayjobs import pipeline
from rayjobs.cluster import Cluster

LOSSES = 3
"""How often the node may be lost before its stages are given up."""
MERGING_CPUS = 1.0
LOOK_SECONDS = 0.5
"""How long nothing is said at most before it is looked whether the work is cancelled."""
LEAVE_SECONDS = 600
"""What the process there may take to end when it is told to: training saves, and what it saved is stored."""
PROCESS = """
from pipelines.kill_with_parent import die_with_parent
die_with_parent()
from rayjobs.cli import main
main()
"""


def run(
    recipe: Recipe,
    name: str,
    overrides: list[str],
    workspace: Workspace,
    cluster: Cluster,
    first: str | None,
    last: str | None,
) -> pipeline.Outputs:
    """`pipeline.run`, for a workspace that is a URL; `name` and `overrides` are what the recipe was loaded from.

    HardwareError where no node has, or gets, what its stages need together. SystemExit with the exit code of the
    process there where that fails.
    """
    stages = pipeline.stages_of(recipe, last)
    spread = [stage.name for stage in stages if stage.spreads or not stage.on_disk]
    together = [stage.name for stage in stages if stage.name not in spread]
    if "train" in spread:
        require_no_copies(recipe)
    if not together:
        return pipeline.run(recipe, workspace, cluster, first, last)
    if spread:
        pipeline.run(recipe, workspace, cluster, first if first in spread else None, spread[-1])
    done = pipeline.status(recipe, workspace)
    if first is None and all(done[stage].is_complete for stage in together):
        say(f"{', '.join(together)}: up to date")
        return done
    cluster.connect()
    again = [] if first is None else ["--from", first if first in together else together[0]]
    options = ["--workspace", workspace.root, "--to", together[-1], *again]
    file = recipe_file(name)
    code = _follow(node_needs(recipe), file.name, file.read_bytes(), [*overrides, *options])
    if code:
        raise SystemExit(code)
    return pipeline.status(recipe, workspace)


def require_no_copies(recipe: Recipe) -> None:
    """RecipeError for copies of checkpoints, which would be signed by a key and made of folders that no node has."""
    if recipe.train is not None and recipe.train.checkpoint_copies:
        message = "the workspace is on object storage, where checkpoints lie already; leave the key out"
        raise RecipeError(recipe.name, [Problem("train.checkpoint_copies", message)])


def node_needs(recipe: Recipe) -> dict[str, float]:
    """What one node must have for merging, and for the engines that work at the same time."""
    serve = recipe.serve
    asking = [one for one in (recipe.evaluate, recipe.compare) if one is not None and one.endpoint is None]
    engines = 2 if asking and recipe.merge else len(asking[:1])  # the base with its adapters, and the merged model
    if recipe.synthesize and recipe.synthesize.engine == "vllm":
        engines = max(engines, 1)
    needs = {"CPU": max(MERGING_CPUS, serve.num_cpus * engines), "GPU": serve.num_gpus * engines}
    return {name: amount for name, amount in needs.items() if amount > 0}


def _follow(needs: dict[str, float], name: str, text: bytes, options: list[str]) -> int:
    """Run the rest of a recipe on a node that has what it needs, and show what it says; returns its exit code."""
    import ray
    from ray.exceptions import RayError, RayTaskError, TaskCancelledError

    library: Any = ray
    what = "with a workspace on object storage what follows training needs one node of " + str(needs)
    for lost in range(LOSSES + 1):
        patience = placement.RETURN_SECONDS if lost else 0
        if lacking := placement.lacking_for_good([needs], what, patience=patience):
            message = f"{what}; the cluster lacks {lacking}; give a folder that every node sees, or add such a node"
            raise HardwareError(message)
        others = dict(needs)
        task = library.remote(
            num_cpus=others.pop("CPU", 0), num_gpus=others.pop("GPU", 0), resources=others, max_retries=0
        )(_lines)
        lines = task.options(num_returns="streaming").remote(name, text, options)
        try:
            for line in lines:
                said = library.get(line)
                if isinstance(said, int):
                    return said
                say(said)
        except (TaskCancelledError, RayTaskError):
            raise
        except RayError as error:
            if lost == LOSSES:
                raise
            say(f"the node was lost ({str(error).splitlines()[0]}); going on from what was stored, on another")
        except BaseException:
            library.cancel(lines)
            with suppress(RayError):
                for line in lines:
                    library.get(line)
            raise
    raise AssertionError("every loss either goes on or raises")


def _lines(name: str, text: bytes, options: list[str]) -> Iterator[str | int]:
    """What the run says, line by line, and at last its exit code. Runs in a Ray worker."""
    with tempfile.TemporaryDirectory(prefix="danlu-recipe-") as folder:
        file = Path(folder, name)
        file.write_bytes(text)
        kept = {key: value for key, value in child_environment().items() if not key.startswith("RAY_")}
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", PROCESS, "run", str(file), *options],
            env={**kept, PARENT: str(os.getpid())},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            errors="replace",
        )
        said: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=_read, args=(process.stderr, said), daemon=True).start()
        try:
            while (line := _next(said)) is not None:
                yield line
            yield process.wait()
        finally:
            process.terminate()
            try:
                process.wait(LEAVE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()


def _read(stream: Any, said: "queue.Queue[str | None]") -> None:
    for line in stream:
        said.put(line.rstrip("\n"))
    said.put(None)


def _next(said: "queue.Queue[str | None]") -> str | None:
    """The next line, None after the last; KeyboardInterrupt where the work is cancelled.

    Ray interrupts, too, which does not wake what waits in a call, and on a busy machine did not always arrive.
    """
    import ray

    while not ray.get_runtime_context().is_canceled():
        with suppress(queue.Empty):
            return said.get(timeout=LOOK_SECONDS)
    raise KeyboardInterrupt
