"""Serve a recipe's models until told to stop; the work is in serve/app.py."""

import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipelines.errors import Problem, RecipeError
from pipelines.evaluate.endpoint import trained_whole
from pipelines.progress import say, waiting
from pipelines.recipe import Recipe
from pipelines.workspace import Place, Workspace
from rayjobs import pipeline
from rayjobs.cluster import Cluster
from serve.adapters import publish_if_new
from serve.app import ServedModel, endpoint
from serve.guard import KEYS, KEYS_FILE, environment_keys

LOCAL = ("127.0.0.1", "::1", "localhost")


def serve_forever(
    recipe: Recipe, workspace: Workspace, cluster: Cluster, host: str | None = None, port: int | None = None
) -> None:
    """Train and merge what is missing, then answer over HTTP until SIGINT or SIGTERM.

    The adapter is published in the workspace's folder `adapters`; those published there later are picked up at once.
    Raises RecipeError for a recipe that trains nothing, StageError when an engine does not start.
    """
    if recipe.train is None:
        raise RecipeError(recipe.name, [Problem("train", "nothing to serve: the recipe trains no model")])
    host, port = host or recipe.serve.host, port or recipe.serve.port
    keys = environment_keys()
    if not keys and host not in LOCAL:
        say(f"  anyone who reaches {host} may ask: set {KEYS} or {KEYS_FILE} to require a key")
    done = pipeline.run(recipe, workspace, cluster, last="merge" if recipe.merge else "train")
    models = trained_models(recipe, done, workspace.local("adapters"))
    cluster.connect()
    logs = workspace.local("logs", "serve")
    with stop_signals() as stopped, ExitStack() as stack:
        with waiting(f"starting {len(models)} engine(s)"):
            url = stack.enter_context(endpoint(models, recipe.serve, host=host, port=port, log_dir=logs, keys=keys))
        names = dict.fromkeys(["base", recipe.name, *(model.name for model in models)])
        say(f"{url}: {', '.join(names)}; Ctrl-C stops")
        stopped.wait()


def trained_models(recipe: Recipe, done: Mapping[str, Place], registry: Path) -> list[ServedModel]:
    """The base, with the adapters of the registry, and the merged model where the recipe makes one.

    Where all weights were trained: the base, and the model that was trained.
    """
    trained = done["train"].report()
    base = str(trained["model"])
    if trained["adapter"] is None:
        models = [ServedModel("base", base, registry=str(registry))]
        return [*models, ServedModel(recipe.name, str(trained_whole(done)))]
    publish_if_new(done["train"].local(trained["adapter"]), registry, recipe.name, base)
    models = [ServedModel("base", base, registry=str(registry))]
    if "merge" in done:
        merged = done["merge"].local(done["merge"].report()["model"])
        models.append(ServedModel(f"{recipe.name}-merged", str(merged)))
    return models


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
