"""The stages in order: read this first.

    ingest → synthesize → refine → analyze → clean → analyze_clean → export → split
        → train → merge → evaluate → compare → publish

A stage runs when its section is in the recipe and its output is missing or was made from something else.
"""

import importlib
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from pipelines.errors import InputError, Problem, RecipeError, nearest
from pipelines.evaluate.endpoint import serves_adapter, shared_endpoints
from pipelines.export import size_of
from pipelines.progress import say
from pipelines.recipe import Recipe
from pipelines.report import environment, write_report
from pipelines.workspace import Place, Workspace, fingerprint
from rayjobs.cluster import Cluster
from serve.adapters import aliases, publish_if_new


@dataclass(frozen=True)
class Stage:
    """One stage: its name, the module that does it, and the stages whose output it reads.

    Of the stages in `rows_of` it reads the first that is present.
    """

    name: str
    module: str
    reads: tuple[str, ...] = ()
    rows_of: tuple[str, ...] = ()
    section: str | None = None
    """The section of the recipe that asks for it, where that has another name."""


STAGES = (
    Stage("ingest", "pipelines.ingest.stage"),
    Stage("synthesize", "pipelines.synthesize.stage"),
    Stage("refine", "pipelines.synthesize.refine", rows_of=("synthesize", "ingest")),
    Stage("analyze", "pipelines.clean.analyze", rows_of=("refine", "synthesize", "ingest")),
    Stage("clean", "pipelines.clean.stage", rows_of=("refine", "synthesize", "ingest")),
    Stage("analyze_clean", "pipelines.clean.analyze_clean", reads=("analyze", "clean"), section="analyze"),
    Stage("export", "pipelines.export", rows_of=("clean", "refine", "synthesize", "ingest")),
    Stage("split", "pipelines.split", rows_of=("clean", "refine", "synthesize", "ingest")),
    Stage("train", "pipelines.train.stage", reads=("split",)),
    Stage("merge", "pipelines.train.merge", reads=("train",)),
    Stage("evaluate", "pipelines.evaluate.stage", reads=("split", "train", "merge")),
    Stage("compare", "pipelines.evaluate.compare", reads=("split", "train", "merge")),
    Stage("publish", "pipelines.publish.stage", reads=("ingest", "clean", "split", "train", "merge", "evaluate")),
)


def stages_of(recipe: Recipe) -> list[Stage]:
    """The stages that a recipe has sections for, in order, each reading the nearest stage that is present."""
    present: dict[str, Stage] = {}
    for stage in STAGES:
        if getattr(recipe, stage.section or stage.name) is not None:
            rows = [name for name in stage.rows_of if name in present][:1]
            reads = (*rows, *(name for name in stage.reads if name in present))
            present[stage.name] = Stage(stage.name, stage.module, reads)
    return list(present.values())


def run(
    recipe: Recipe, workspace: Workspace, cluster: Cluster, first: str | None = None, last: str | None = None
) -> dict[str, Place]:
    """Bring every stage up to `last` up to date; `first` is done again, with all after it, even if it is complete.

    The cluster is connected to when the first stage has work to do. Returns the finished stages' places.
    """
    stages = stages_of(recipe)
    names = [stage.name for stage in stages]
    for name in (first, last):
        if name is not None and name not in names:
            raise RecipeError(recipe.name, [Problem(name, f"the recipe has no such stage; {nearest(name, names)}")])
    end = names.index(last) + 1 if last else len(names)
    redo = names.index(first) if first else end
    done: dict[str, Place] = {}
    with ExitStack() as held, shared_endpoints():
        is_ready = False
        for number, stage in enumerate(stages[:end]):
            place = place_of(recipe, workspace, stage, done)
            if number < redo and _is_up_to_date(place):
                say(f"{stage.name}: up to date")
            else:
                if not is_ready:
                    require_ready(recipe, stages[number:end])
                    held.enter_context(workspace.held())
                    cluster.connect()
                    is_ready = True
                _do(recipe, stage, place, again=number >= redo)
            done[stage.name] = place
            if stage.name == "train":
                _publish(recipe, place)
            write_report(recipe, workspace, done)
    return done


def require_ready(recipe: Recipe, stages: Sequence[Stage]) -> None:
    """RecipeError with everything that would stop one of the stages, perhaps after hours of those before it.

    That is what a recipe cannot know by itself: files that are not there, keys that are not set, packages.
    """
    problems: list[Problem] = []
    for stage in stages:
        try:
            getattr(importlib.import_module(stage.module), "preflight", _nothing_to_check)(recipe)
        except RecipeError as error:
            problems += error.problems
        except InputError as error:
            problems.append(Problem("", str(error)))
    if problems:
        raise RecipeError(recipe.name, problems)


def _nothing_to_check(recipe: Recipe) -> None:
    """The preflight of a stage that needs nothing from outside."""


def publish_adapter(recipe: Recipe, trained: Place) -> str | None:
    """Publish what was trained in the workspace's folder `adapters`, where a running endpoint finds it at once.

    Returns the version, such as `wishes@2`; None where the whole model was trained, or an adapter vLLM cannot load.
    """
    report = trained.report()
    if report["adapter"] is None or not serves_adapter(recipe):
        return None
    registry = trained.workspace.local("adapters")
    return publish_if_new(trained.local(report["adapter"]), registry, recipe.name, report["model"])


def _publish(recipe: Recipe, trained: Place) -> None:
    """Publish what was trained, and say so where its name stays with another version."""
    version = publish_adapter(recipe, trained)
    serving = version and aliases(trained.workspace.local("adapters")).get(recipe.name)
    if serving != version:
        say(f"train: this adapter is {version}; requests for {recipe.name} go to {serving}, where its alias points")


def status(recipe: Recipe, workspace: Workspace) -> list[tuple[str, str, Place | None]]:
    """Each stage of the recipe with `complete`, `partial` or `missing`, and its place as far as it is known."""
    rows: list[tuple[str, str, Place | None]] = []
    done: dict[str, Place] = {}
    for stage in stages_of(recipe):
        if any(name not in done for name in stage.reads):
            rows.append((stage.name, "missing", None))
            continue
        place = place_of(recipe, workspace, stage, done)
        if place.manifest() is not None:
            done[stage.name] = place
            rows.append((stage.name, "complete", place))
        else:
            rows.append((stage.name, "partial" if workspace.list(place.path()) else "missing", place))
    return rows


def place_of(recipe: Recipe, workspace: Workspace, stage: Stage, done: dict[str, Place]) -> Place:
    """Where a stage's output belongs, given the finished stages before it."""
    module = importlib.import_module(stage.module)
    inputs = {name: done[name] for name in stage.reads}
    digests = {name: place.report()["digest"] for name, place in inputs.items()}
    determinants: dict[str, Any] = module.determinants(recipe)
    return Place(workspace, stage.name, fingerprint(stage.name, module.VERSION, determinants, digests), inputs)


def _is_up_to_date(place: Place) -> bool:
    """Whether the stage is complete, and what it wrote outside the workspace still lies there, at its size."""
    manifest = place.manifest()
    if manifest is None:
        return False
    return all(size_of(path) == size for path, size in manifest["report"].get("written", {}).items())


def _do(recipe: Recipe, stage: Stage, place: Place, again: bool) -> None:
    """Do a stage's work at its place, from the beginning or from where a killed run left it; mark it complete."""
    module = importlib.import_module(stage.module)
    if again and hasattr(module, "forget"):
        module.forget(recipe, place)
    if again or place.manifest() is not None:
        place.clear()
    say(f"{stage.name} …")
    work: Callable[[Recipe, Place], dict[str, Any]] = getattr(module, stage.name)
    began = time.time()
    report = work(recipe, place)
    seconds = time.time() - began
    place.finish(
        {
            "stage": stage.name,
            "fingerprint": place.fingerprint,
            "inputs": {name: source.fingerprint for name, source in place.inputs.items()},
            "began": began,
            "seconds": seconds,
            "environment": environment(),
            "report": report,
        }
    )
    say(f"{stage.name}: done in {seconds:.1f} s" + (f", {report['summary']}" if "summary" in report else ""))
