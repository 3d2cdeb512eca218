"""Serve a recipe's models until told to stop; the work is in serve/app.py."""

import math
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from pipelines.artifacts.files import Destination, created, require_writable
from pipelines.artifacts.staging import Staging
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import Problem, RecipeError, StageError
from pipelines.models.lineup import Lineup, lineup_of, served_models
from pipelines.models.served import MODELS, ServedModel
from pipelines.progress import say
from pipelines.recipe.schema import Recipe
from pipelines.recipe.serve import MAX_LORA_RANK, Serve
from pipelines.recipe.train import not_servable
from rayjobs import pipeline
from rayjobs.cluster import Cluster
from rayjobs.pipeline import ADAPTERS
from serve import adapter_registry
from serve.adapter_registry import AdapterEngine
from serve.app import claim_port, endpoint
from serve.auth import KEYS, KEYS_FILE, LOCAL, environment_keys
from serve.engine.command import adapter_room
from serve.engine.extra import check_extra
from serve.kuberay import configuration, ray_service


def serve_forever(
    recipe: Recipe, workspace: Workspace, cluster: Cluster, host: str | None = None, port: int | None = None
) -> None:
    """Train and merge what is missing, then answer over HTTP until SIGINT or SIGTERM.

    The adapter is published in the workspace's folder `adapters`; those published there later are picked up at once,
    but for object storage, of which each node has a copy as it was, and which on a cluster must have all of it.
    Raises RecipeError for a recipe that trains nothing, StageError when an engine does not start.
    """
    section = served_section(recipe)
    host, port = host or section.host, port or section.port
    keys = environment_keys(section.model_copy(update={"host": host}))
    claim_port(host, port)  # before hours of training
    limits = section.limits
    with Staging(workspace) as staging, ExitStack() as stack:
        models = finished_models(recipe, staging, cluster)
        describe_engines(models, section)
        staging.store()  # which base model the adapters are for, by the path that it has on all nodes
        cluster.connect()
        logs = staging.here.local("logs", "serve")
        copy = staging.copy(*parts_of(models, Path(staging.here.root)))
        with interrupted_by_sigterm():
            url = stack.enter_context(
                endpoint(models, section, host=host, port=port, log_dir=logs, keys=keys, limits=limits, copy=copy)
            )
        stopped = stack.enter_context(stop_signals())
        published = adapter_registry.aliases(staging.here.local(ADAPTERS))
        say(f"{url}: {', '.join([*(model.name for model in models), *published])}; Ctrl-C stops")
        stopped.wait()


def write_config(
    recipe: Recipe,
    workspace: Workspace,
    cluster: Cluster,
    serve_file: Destination | None,
    kuberay_file: Destination | None,
) -> None:
    """Train and merge what is missing, and write configuration for `serve deploy` or for KubeRay instead of serving.

    InputError, before anything runs, for a file that may not be written.
    """
    for file in filter(None, (serve_file, kuberay_file)):
        require_writable(file, workspace)
    logs = str(workspace.local("logs", "serve"))  # what the nodes would see of a URL lies on no disk of theirs
    with Staging(workspace) as staging:
        models = finished_models(recipe, staging, cluster)
    section = served_section(recipe)
    check_extra(section.engine)
    describe_engines(models, section)
    config = configuration(recipe.name, models, section, logs)
    if section.host in LOCAL:
        say(f"  serve.host is {section.host}: beyond the node that it runs on nobody reaches the gateway")
    say(f"  its paths are this machine's ({workspace.root}); the nodes have to see them too")
    if serve_file is not None:
        write_yaml(serve_file, workspace, "serve deploy", config)
        if section.host not in LOCAL and not section.open:
            say(f"  the cluster's nodes need {KEYS} or {KEYS_FILE} in their environment; without it nothing is served")
    if kuberay_file is not None:
        # A pod's own address is no one else's, and KubeRay leads requests to every pod.
        reachable = section.model_copy(update={"host": "0.0.0.0", "gateway_per_node": True})
        config = configuration(recipe.name, models, reachable, logs, comes_up=True)
        memory = engine_memory_gib(max(map(weight_bytes, (Path(model.path) for model in models))))
        service = ray_service(recipe.name, _yaml(config), len(models), section, workspace.root, memory)
        write_yaml(kuberay_file, workspace, "kubectl apply -f", service)


def engine_memory_gib(weights: int) -> int:
    """Main memory of an engine's pod: its weights pass through it, beside vLLM itself."""
    return 6 + math.ceil(1.25 * weights / (1 << 30))


def weight_bytes(model: Path) -> int:
    """The size of a model's weight files."""
    return sum(path.stat().st_size for path in model.glob("*") if path.suffix in (".safetensors", ".bin", ".gguf"))


def write_yaml(file: Destination, workspace: Workspace | None, command: str, *documents: dict[str, Any]) -> None:
    """Write a file that says in its first line with which command it is used."""
    content = "---\n".join(map(_yaml, documents))
    with created(file, workspace) as stream:
        stream.write(f"# {command} {Path(file.path).name}\n{content}".encode())
    say(f"{file.path}: written")


def _yaml(content: dict[str, Any]) -> str:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def parts_of(models: list[ServedModel], workspace: Path) -> list[str]:
    """Where in a workspace lies what engines and gateways read of models."""
    paths = {path for model in models for path in (model.path, model.registry, *model.adapters.values()) if path}
    return sorted(str(Path(path).relative_to(workspace)) for path in paths if Path(path).is_relative_to(workspace))


def finished_models(recipe: Recipe, staging: Staging, cluster: Cluster) -> list[ServedModel]:
    """The recipe's models as they are here, after training and merging what is missing in the workspace.

    RecipeError where none could be served, StageError where they are missing on object storage and a cluster.
    """
    lineup = lineup_of(recipe)
    if recipe.train is None or lineup is None:
        raise RecipeError(recipe.name, [Problem("train", "nothing to serve: the recipe trains no model")])
    if recipe.merge is None and (reason := not_servable(recipe.train)):
        raise RecipeError(recipe.name, [Problem("merge", f"{reason}; with this section the merged model is served")])
    last = "merge" if recipe.merge else "train"
    if cluster.is_shared and not staging.workspace.is_local:
        done = pipeline.status(recipe, staging.workspace)
        if not done[last].is_complete:
            raise StageError(f"{staging.workspace.root}: {last} is not done; run the recipe there before it is served")
    else:
        done = pipeline.run(recipe, staging.workspace, cluster, last=last)
    here = {name: staging.output(output) for name, output in done.items() if name in ("train", "merge")}
    for parts in ((MODELS,), (ADAPTERS,), *((stage, output.folder.fingerprint) for stage, output in here.items())):
        staging.fetch(*parts)
    if not staging.workspace.is_local:  # a run that was lost when all but this was done
        pipeline.publish_adapter(recipe, here["train"].folder, here["train"].report)
    return trained_models(lineup, here, staging.here.local(ADAPTERS))


def trained_models(lineup: Lineup, done: pipeline.Outputs, registry: Path) -> list[ServedModel]:
    """The base with the adapters of the registry and the merged model; or the base and a model that stands for itself.

    Training has published its adapter; merging may have made the model of it.
    """
    base, *others = served_models(lineup, done["train"], done.get("merge"))
    if base.adapters:
        base = replace(base, adapters={}, registry=str(registry))
    return [base, *others]


def describe_engines(models: list[ServedModel], section: Serve) -> None:
    """Leave word in each registry of what its engine takes, so that what does not fit is refused when published."""
    names = tuple(model.name for model in models)
    for model in models:
        if model.registry is not None:
            engine = AdapterEngine(str(Path(model.path).resolve()), adapter_room(model, section.engine)[1], names)
            adapter_registry.describe_engine(model.registry, engine)


def served_section(recipe: Recipe) -> Serve:
    """The section `serve`, its engines with room for the adapter that the recipe trains."""
    engine = recipe.serve.engine
    rank = max(engine.max_lora_rank, min(recipe.train.lora.r, MAX_LORA_RANK) if recipe.train else 0)
    return recipe.serve.model_copy(update={"engine": engine.model_copy(update={"max_lora_rank": rank})})


@contextmanager
def interrupted_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt, as Ctrl-C does: what is being waited for is given up, and cleaned up."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, instead of ending the process where it stands."""
    stopped = threading.Event()
    before = {number: signal.signal(number, lambda *_: stopped.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
