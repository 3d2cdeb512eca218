"""The endpoint that evaluation and comparison ask: one that is named, or one started for as long as it is needed."""

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.artifacts.workspace import Place
from pipelines.errors import StageError
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import not_servable

if TYPE_CHECKING:  # serving is an extra: a named endpoint does not need it
    from serve.app import ServedModel

BASE = "base"
"""The name under which the model before training is asked."""


@dataclass
class _Running:
    """Endpoints kept open until a run of several stages ends, by what they serve."""

    stack: ExitStack
    urls: dict[str, str] = field(default_factory=dict)


_running: ContextVar[_Running | None] = ContextVar("running endpoints", default=None)


@contextmanager
def shared_endpoints() -> Iterator[None]:
    """While this is open, stages that ask the same models share one endpoint instead of each starting its own."""
    with ExitStack() as stack:
        token = _running.set(_Running(stack))
        try:
            yield
        finally:
            _running.reset(token)


def model_names(recipe: Recipe) -> list[str]:
    """The names of the models that are compared: base, what was trained, and its adapter merged where that is done."""
    merged = recipe.merge is not None and serves_adapter(recipe)
    return [BASE, recipe.name, *([f"{recipe.name}-merged"] if merged else [])]


def serves_adapter(recipe: Recipe) -> bool:
    """Whether the recipe's name stands for an adapter; else it stands for a model of its own, trained or merged."""
    return recipe.train is not None and recipe.train.method != "full" and not_servable(recipe.train) is None


@contextmanager
def models_endpoint(recipe: Recipe, place: Place, given: str | None) -> Iterator[str]:
    """The /v1 address at which every model that is compared answers; StageError where one does not.

    `given` is an address to use instead of starting engines. `place` finds the models through its inputs.
    """
    with ExitStack() as stack:
        url = given or _started(recipe, place, stack)
        checkpoints = [name for name, _ in checkpoint_adapters(recipe, place.inputs["train"]).values()]
        _check(url, [*model_names(recipe), *checkpoints])
        yield url


def api_key() -> str:
    """The key that endpoints are asked with, from OPENAI_API_KEY."""
    return os.environ.get("OPENAI_API_KEY") or "none"


def _started(recipe: Recipe, place: Place, stack: ExitStack) -> str:
    """Start the endpoint, to be stopped by the run that shares it, or else by `stack`."""
    running = _running.get()
    if running is None:
        return stack.enter_context(_engines(recipe, place))
    key = "/".join(place.inputs[name].fingerprint for name in ("train", "merge") if name in place.inputs)
    if key not in running.urls:
        running.urls[key] = running.stack.enter_context(_engines(recipe, place))
    return running.urls[key]


def _engines(recipe: Recipe, place: Place) -> AbstractContextManager[str]:
    from serve.app import endpoint

    logs = Path(place.workspace.local("logs", "serve"))
    engines: AbstractContextManager[str] = endpoint(served_models(recipe, place), recipe.serve, log_dir=logs)
    return engines


def served_models(recipe: Recipe, place: Place) -> "list[ServedModel]":
    """What the endpoint serves: the base with its adapters in one engine, the merged model in another.

    Where all weights were trained there is no adapter, and there are those that vLLM cannot load: the model that was
    trained, or merged, has the second engine.
    """
    from serve.app import ServedModel

    trained = place.inputs["train"]
    report = trained.report()
    if report["adapter"] is None or not serves_adapter(recipe):
        whole = str(trained_whole(place.inputs))
        return [ServedModel(BASE, str(report["model"]), {}), ServedModel(recipe.name, whole, {})]
    adapters = {
        recipe.name: str(trained.local(report["adapter"])),
        **dict(checkpoint_adapters(recipe, trained).values()),
    }
    models = [ServedModel(BASE, str(report["model"]), adapters)]
    if "merge" in place.inputs:
        merged = place.inputs["merge"]
        models.append(ServedModel(f"{recipe.name}-merged", str(merged.local(merged.report()["model"])), {}))
    return models


def trained_whole(stages: Mapping[str, Place]) -> Path:
    """The folder of a model that stands for itself: as merging wrote it, else as training all weights left it."""
    last, key = ("merge", "model") if "merge" in stages else ("train", "trained")
    return stages[last].local(str(stages[last].report()[key]))


def checkpoint_adapters(recipe: Recipe, trained: Place) -> dict[int, tuple[str, str]]:
    """The name and folder under which each kept checkpoint's adapter is served, by optimizer step."""
    if recipe.compare is None or recipe.compare.checkpoints is None:
        return {}
    folders = [str(trained.local(name)) for name in trained.report()["checkpoints"]]
    steps = {int(folder.rsplit("-", 1)[1]): folder for folder in folders}
    return {step: (f"{recipe.name}-step{step}", folder) for step, folder in sorted(steps.items())}


def _check(url: str, names: list[str]) -> None:
    """StageError unless every model is listed at the endpoint."""
    from openai import OpenAI, OpenAIError  # an extra that cleaning does without

    try:
        listed = {model.id for model in OpenAI(base_url=url, api_key=api_key(), timeout=30).models.list()}
    except OpenAIError as error:
        raise StageError(f"{url}: the endpoint does not list its models ({error}); is it up?") from None
    missing = [name for name in names if name not in listed]
    if missing:
        raise StageError(f"{url}: serves {', '.join(sorted(listed))}; missing: {', '.join(missing)}")
