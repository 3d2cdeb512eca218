"""The endpoint that evaluation and comparison ask: one that is named, or one started for as long as it is needed."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.reports.train import MergeReport, TrainReport
from pipelines.artifacts.stage import Inputs, Output
from pipelines.direct_http import is_loopback
from pipelines.errors import StageError
from pipelines.models.lineup import Lineup, checkpoint_adapters, served_models
from pipelines.models.served import MODELS
from pipelines.recipe.keys import endpoint_key
from pipelines.recipe.serve import Serve

ON_DISK = ("split", "train", "merge", MODELS)
"""What stages that ask models take by path."""


@dataclass(frozen=True)
class ModelInputs(Inputs):
    """What stages read that ask models: the held-out rows, and the models."""

    split: Output[SplitReport]
    train: Output[TrainReport]
    merge: Output[MergeReport] | None = None


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


@contextmanager
def models_endpoint(lineup: Lineup, serve: Serve, inputs: ModelInputs, given: str | None) -> Iterator[str]:
    """The /v1 address at which every model that is compared answers; StageError where one does not.

    `given` is an address to use instead of starting engines. RecipeError where the environment's key cannot be one.
    """
    endpoint_key()  # before engines start
    with ExitStack() as stack:
        url = given or _started(lineup, serve, inputs, stack)
        checkpoints = [name for name, _ in checkpoint_adapters(lineup, inputs.train).values()]
        _check(url, [*lineup.names(), *checkpoints])
        yield url


def _started(lineup: Lineup, serve: Serve, inputs: ModelInputs, stack: ExitStack) -> str:
    """Start the endpoint, to be stopped by the run that shares it, or else by `stack`."""
    running = _running.get()
    if running is None:
        return stack.enter_context(_engines(lineup, serve, inputs))
    key = "/".join(output.folder.fingerprint for output in (inputs.train, inputs.merge) if output is not None)
    if key not in running.urls:
        running.urls[key] = running.stack.enter_context(_engines(lineup, serve, inputs))
    return running.urls[key]


def _engines(lineup: Lineup, serve: Serve, inputs: ModelInputs) -> AbstractContextManager[str]:
    from serve.app import endpoint  # Ray Serve is slow to load, and an extra: a named endpoint does not need it

    logs = inputs.train.folder.workspace.local("logs", "serve")
    engines: AbstractContextManager[str] = endpoint(
        served_models(lineup, inputs.train, inputs.merge), serve, log_dir=logs
    )
    return engines


def _check(url: str, names: list[str]) -> None:
    """StageError unless every model is listed at the endpoint."""
    from openai import DefaultHttpxClient, OpenAI, OpenAIError  # an extra that cleaning does without

    http = DefaultHttpxClient(trust_env=not is_loopback(url))
    try:
        listed = {
            m.id for m in OpenAI(base_url=url, api_key=endpoint_key(), timeout=30, http_client=http).models.list()
        }
    except OpenAIError as error:
        raise StageError(f"{url}: the endpoint does not list its models ({error}); is it up?") from None
    missing = [name for name in names if name not in listed]
    if missing:
        raise StageError(f"{url}: serves {', '.join(sorted(listed))}; missing: {', '.join(missing)}")
