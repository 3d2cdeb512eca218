"""The stages in order: read this first.

    ingest → synthesize → refine → combine → analyze → clean → analyze_clean → export → split
        → train → merge → evaluate → compare → publish

A stage runs when its section is in the recipe and its output is missing or was made from something else.
"""

import hashlib
import time
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any, Protocol, TypeVar

from pipelines.artifacts.files import refusal
from pipelines.artifacts.reports.rows import RowsReport
from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Inputs, Manifest, Output, Report, Stage, read_manifest
from pipelines.artifacts.staging import Staging
from pipelines.artifacts.workspace import Place, Workspace, fingerprint
from pipelines.clean.analyze import AnalyzeCleanInputs, AnalyzeCleanStage, AnalyzeInputs, AnalyzeStage
from pipelines.clean.decontaminate import EvaluationSets
from pipelines.clean.stage import CleanInputs, CleanStage, check_clean, plan_of
from pipelines.errors import DataError, InputError, Problem, RecipeError, nearest
from pipelines.evaluate.compare import CompareStage
from pipelines.evaluate.endpoint import ModelInputs, shared_endpoints
from pipelines.evaluate.stage import EvaluateStage
from pipelines.export.stage import ExportInputs, ExportStage
from pipelines.ingest.stage import CombineInputs, CombineStage, IngestStage
from pipelines.models.lineup import base_model, lineup_of
from pipelines.out_of_memory import explained
from pipelines.progress import never_silent, say
from pipelines.publish.stage import PublishInputs, PublishStage
from pipelines.recipe.load import Check, load_recipe
from pipelines.recipe.paths import paths_read
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import numbers_of_workers
from pipelines.refine.stage import RefineInputs, RefineStage, check_refine, demands_of
from pipelines.report.page import environment, write_report
from pipelines.split import SplitInputs, SplitStage
from pipelines.synthesize.stage import SynthesizeStage
from pipelines.train.memory import gpus_here
from pipelines.train.merge import MergeInputs, MergeStage
from pipelines.train.stage import TrainInputs, TrainStage
from rayjobs.cluster import Cluster
from serve.adapter_registry import aliases, publish_if_new

I = TypeVar("I", bound=Inputs)  # noqa: E741
R = TypeVar("R", bound=Report)
AnyStage = Stage[Any, Any]
Outputs = dict[str, Output[Any]]
"""What stages left, by name, in their order."""


ADAPTERS = "adapters"
"""The folder of a workspace in which adapters are published."""

STAGES: tuple[type[AnyStage], ...] = (
    *(
        IngestStage,
        SynthesizeStage,
        RefineStage,
        CombineStage,
        AnalyzeStage,
        CleanStage,
        AnalyzeCleanStage,
        ExportStage,
        SplitStage,
    ),
    *(TrainStage, MergeStage, EvaluateStage, CompareStage, PublishStage),
)
"""Every stage there is, in order; `walk` says what each of them reads."""


class Do(Protocol):
    """What is done about a stage: it is run, or only looked up."""

    def __call__(self, stage: Stage[I, R], inputs: I) -> Output[R]: ...


def walk(recipe: Recipe, do: Do) -> None:
    """Every stage that the recipe has a section for, in order, with what it reads: the nearest stages before it."""
    ingested = synthesized = analyzed = cleaned = sides = trained = merged = evaluated = None
    rows: Output[RowsReport] | None = None
    models = lineup_of(recipe)
    if recipe.ingest:
        rows = ingested = do(IngestStage(recipe.ingest), Inputs())
    if recipe.synthesize:
        rows = synthesized = do(
            SynthesizeStage(recipe.synthesize, recipe.serve, recipe.seed, recipe.chat_template_kwargs), Inputs()
        )
    if recipe.refine and rows:
        rows = do(RefineStage(recipe.refine, demands_of(recipe.refine, recipe.synthesize)), RefineInputs(rows))
    if ingested and synthesized and rows:
        rows = do(CombineStage(), CombineInputs(ingested, rows))
    if recipe.analyze and recipe.clean and rows:
        analyzed = do(AnalyzeStage(recipe.analyze, recipe.clean), AnalyzeInputs(rows))
    if recipe.clean and rows:
        rows = cleaned = do(CleanStage(recipe.clean, evaluation_sets_of(recipe)), CleanInputs(rows))
    if recipe.analyze and recipe.clean and analyzed and cleaned:
        do(AnalyzeCleanStage(recipe.analyze, recipe.clean), AnalyzeCleanInputs(analyzed, cleaned))
    if recipe.export and rows:
        do(ExportStage(recipe.export, paths_read(recipe)), ExportInputs(rows, None if synthesized else ingested))
    if recipe.split and rows:
        sides = do(SplitStage(recipe.split, recipe.ingest, text_key_of(recipe), recipe.seed), SplitInputs(rows))
    if recipe.train and sides:
        trained = do(
            TrainStage(recipe.train, recipe.ingest, recipe.seed, recipe.chat_template_kwargs), TrainInputs(sides)
        )
    if recipe.merge and recipe.train and trained:
        merged = do(MergeStage(recipe.merge, recipe.train.method), MergeInputs(trained))
    if recipe.evaluate and recipe.train and models and sides and trained:
        asked = ModelInputs(sides, trained, merged)
        system = recipe.train.system
        evaluated = do(EvaluateStage(recipe.evaluate, models, recipe.serve, system, recipe.seed), asked)
    if recipe.compare and recipe.train and models and sides and trained:
        asked = ModelInputs(sides, trained, merged)
        do(CompareStage(recipe.compare, models, recipe.serve, recipe.train.system, recipe.seed), asked)
    if recipe.publish and recipe.train and sides and trained:
        read = PublishInputs(ingested, synthesized, cleaned, sides, trained, merged, evaluated)
        do(PublishStage(recipe.publish, recipe.name, recipe.train, recipe.merge, recipe.ingest), read)


CHECKS: dict[str, Check] = {"clean": check_clean, "refine": check_refine}
"""What stages say of their sections beyond the schema."""


def load(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """The recipe, with all that is wrong with it in one message; see load.py."""
    return load_recipe(name_or_path, overrides, CHECKS)


def text_key_of(recipe: Recipe) -> str:
    """The column whose text counts: the one that is cleaned."""
    return recipe.clean.text_keys if recipe.clean else "response"


def evaluation_sets_of(recipe: Recipe) -> EvaluationSets:
    """The evaluation sets that the recipe names, but for the rows that the split itself holds out."""
    places = {}
    if recipe.split and recipe.split.test_source:
        places["split.test_source"] = recipe.split.test_source
    asked = [entry for entry in recipe.evaluate.datasets if entry.benchmark != "test"] if recipe.evaluate else []
    for number, entry in enumerate(asked):
        if entry.path:
            places[f"evaluate.datasets[{number}] {entry.benchmark}"] = entry.path
    return EvaluationSets(places, tuple(entry.benchmark for entry in asked if not entry.path))


def stages_of(recipe: Recipe, last: str | None = None) -> list[AnyStage]:
    """The stages that a recipe has sections for, in order, up to `last`; RecipeError where there is no such stage."""
    found: list[AnyStage] = []

    def note(stage: Stage[I, R], inputs: I) -> Output[R]:
        found.append(stage)
        return Output(stage.name)

    walk(recipe, note)
    if last is None:
        return found
    return found[: _number_of(last, [stage.name for stage in found], recipe) + 1]


def _number_of(name: str, names: list[str], recipe: Recipe) -> int:
    if name not in names:
        hint = "docs/recipes.md has its keys" if name in Recipe.model_fields else nearest(name, names)
        raise RecipeError(recipe.name, [Problem(name, f"the recipe has no such section, and so no such stage; {hint}")])
    return names.index(name)


def status(recipe: Recipe, workspace: Workspace) -> Outputs:
    """What the workspace has of each stage of the recipe."""
    found: Outputs = {}

    def look_up(stage: Stage[I, R], inputs: I) -> Output[R]:
        place = place_of(workspace, stage, inputs)
        output = Output(stage.name, place, read_manifest(place, stage.reports) if place else None)
        found[stage.name] = output
        return output

    walk(recipe, look_up)
    return found


def run(
    recipe: Recipe, workspace: Workspace, cluster: Cluster, first: str | None = None, last: str | None = None
) -> Outputs:
    """Bring every stage up to `last` up to date; `first` is done again, with all after it, even if it is complete.

    The cluster is connected to when the first stage has work to do. Returns the outputs of the finished stages.
    InputError where one of them needs a folder that the cluster's nodes see.
    """
    stages = stages_of(recipe)
    names = [stage.name for stage in stages]
    end = _number_of(last, names, recipe) + 1 if last else len(names)
    redo = _number_of(first, names, recipe) if first else end
    done: Outputs = {}
    if needing := [stage.name for stage in stages[:end] if stage.on_disk and not stage.spreads]:
        require_folder(workspace, cluster, needing)
    with ExitStack() as held, Staging(workspace) as staging, shared_endpoints():
        is_ready = False

        def bring_up_to_date(stage: Stage[I, R], inputs: I) -> Output[R]:
            nonlocal is_ready
            number = names.index(stage.name)
            place = place_of(workspace, stage, inputs) if number < end else None
            if place is None:
                return Output(stage.name)
            manifest = read_manifest(place, stage.reports)
            found = manifest
            if number < redo and manifest is not None and stage.is_current(manifest.report):
                if path := Output(stage.name, place, manifest).damaged():
                    raise DataError(
                        f"{path}: not there, or not whole, though {place.path('manifest.json')} counts it; copy the "
                        f"workspace again, or do the stage again: --from {stage.name}"
                    )
                say(f"{stage.name}: up to date")
            else:
                if not is_ready:
                    require_ready(recipe, stages[number:end], workspace)
                    held.enter_context(workspace.held())
                    cluster.connect()
                    is_ready = True
                spread = stage.spreads and cluster.is_shared
                manifest = _do(stage, place, inputs, staging, again=number >= redo, spread=spread)
            # From object storage all of it would have to be fetched to look whether it is published.
            if isinstance(manifest.report, TrainReport) and (workspace.is_local or manifest is not found):
                _publish(recipe, place, manifest.report, staging)
            done[stage.name] = output = Output(stage.name, place, manifest)
            if is_ready:
                write_report(recipe.name, workspace, done, is_complete=len(done) == len(names))
            return output

        walk(recipe, bring_up_to_date)
        # Where nothing had to be done, a finished report stays, also of a run that went further than this one.
        if not is_ready and (len(done) == len(names) or not workspace.exists(workspace.path("report.html"))):
            write_report(recipe.name, workspace, done, is_complete=len(done) == len(names))
    return done


def problems_of(stages: Sequence[AnyStage], workspace: Workspace) -> list[Problem]:
    """Everything that would stop one of the stages, perhaps after hours of those before it.

    That is what a recipe cannot know by itself: files that are not there, keys that are not set, packages, models, and
    files of somebody's where a stage would write.
    """
    problems: list[Problem] = []
    for stage in stages:
        try:
            written = ((file.name, refusal(file, workspace)) for file in stage.destinations())
            problems += [Problem(name, reason) for name, reason in written if reason]
            problems += stage.preflight()
        except RecipeError as error:
            problems += error.problems
        except InputError as error:
            problems.append(Problem("", str(error)))
    return problems


def require_folder(workspace: Workspace, cluster: Cluster, stages: Sequence[str]) -> None:
    """InputError where work by paths would be spread over nodes that do not see them."""
    if not workspace.is_local and cluster.is_shared:
        raise InputError(
            f"{workspace.root}: on a cluster {', '.join(stages)} of this recipe would need a folder that every node "
            "sees; a URL is for the other stages, and for one machine"
        )


def missing_gpus(recipe: Recipe) -> list[Problem]:
    """What asks for more GPUs than this machine has. A cluster may have them: that is no problem of the stages."""
    asked: dict[str, float] = {}
    if recipe.train:
        workers = numbers_of_workers(recipe.train)[-1]
        asked["train.resources_per_worker"] = workers * recipe.train.resources_per_worker.get("GPU", 0)
    asked["serve.num_gpus"] = recipe.serve.num_gpus
    there = gpus_here() if any(asked.values()) else 0
    return [
        Problem(key, f"GPUs asked for: {number:g}, on this machine: {there}; run it on a cluster that has them")
        for key, number in asked.items()
        if number > there
    ]


def require_ready(recipe: Recipe, stages: Sequence[AnyStage], workspace: Workspace) -> None:
    """RecipeError with everything that would stop one of the stages."""
    if problems := problems_of(stages, workspace):
        raise RecipeError(recipe.name, problems)
    if recipe.clean and any(stage.name == "clean" for stage in stages):
        plan_of(recipe.clean)  # runs a person's own operators, which were only read so far


def publish_adapter(recipe: Recipe, place: Place, report: TrainReport) -> str | None:
    """Publish what was trained in the workspace's folder `adapters`, where a running endpoint finds it at once.

    Returns the version, such as `wishes@2`; None where the whole model was trained, or an adapter vLLM cannot load.
    """
    models = lineup_of(recipe)
    if report.adapter is None or models is None or not models.serves_adapter:
        return None
    registry = place.workspace.local(ADAPTERS)
    base = base_model(Output("train", place, Manifest(report=report)))
    return publish_if_new(place.local(report.adapter), registry, recipe.name, base)


def _publish(recipe: Recipe, place: Place, report: TrainReport, staging: Staging) -> None:
    """Publish what was trained, and say so where its name stays with another version."""
    staging.fetch(ADAPTERS)
    try:
        version = publish_adapter(recipe, staging.place(place), report)
    except DataError as error:  # training is complete all the same, and may have taken days
        say(f"train: the adapter is not published: {error}")
        return
    staging.store(place)
    serving = version and aliases(staging.here.local(ADAPTERS)).get(recipe.name)
    if serving != version:
        say(f"train: this adapter is {version}; requests for {recipe.name} go to {serving}, where its alias points")


def place_of(workspace: Workspace, stage: Stage[I, R], inputs: I) -> Place | None:
    """Where a stage's output belongs; None while one of the stages that it reads is not complete.

    Where a file that decides it is not here, as in a workspace that was moved without its sources, it is the place of
    what was finished of the same words of the recipe; InputError where nothing was.
    """
    if not all(output.is_complete for output in inputs.outputs()):
        return None
    try:
        made_of = fingerprint(stage.name, stage.version, stage.fingerprint_inputs(), inputs.digests())
    except DataError:
        raise
    except InputError as error:
        try:
            made_of = workspace.read(_last_made(workspace, stage, inputs)).decode()
        except FileNotFoundError:
            raise error from None
        place = Place(workspace, stage.name, made_of)
        if read_manifest(place, stage.reports) is None:
            raise
        say(f"{stage.name}: as it was finished before, because {error}")
        return place
    return Place(workspace, stage.name, made_of)


def _last_made(workspace: Workspace, stage: Stage[I, R], inputs: I) -> str:
    """Where the fingerprint lies that a stage had last with these words of the recipe."""
    words = hashlib.sha256(f"{stage!r} {inputs.digests()}".encode()).hexdigest()[:16]
    return workspace.path(".made", f"{stage.name}-{words}")


def _do(stage: Stage[I, R], place: Place, inputs: I, staging: Staging, again: bool, spread: bool) -> Manifest[R]:
    """Do a stage's work at its place, from the beginning or from where a killed run left it; mark it complete.

    `spread`: on all nodes of a cluster, whether they share a folder or not.
    """
    if again:
        stage.forget(staging.place(place))
    if again or place.workspace.exists(place.path("manifest.json")):
        place.clear()
    say(f"{stage.name} …")
    began, start = time.time(), time.monotonic()
    work = staging.work(place, inputs, stage.on_disk, spread=spread)
    with never_silent(stage.name), explained(stage.name), work as (own, read):
        report = stage.run(own, read)
    seconds = time.monotonic() - start
    manifest: Manifest[R] = Manifest(
        stage=stage.name,
        fingerprint=place.fingerprint,
        inputs={output.stage: output.folder.fingerprint for output in inputs.outputs()},
        began=began,
        seconds=seconds,
        environment=environment(),
        report=report,
    )
    place.workspace.write(_last_made(place.workspace, stage, inputs), place.fingerprint.encode())
    manifest.write(place)
    say(f"{stage.name}: done in {seconds:.1f} s, {report.summary}")
    return manifest
