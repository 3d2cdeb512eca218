"""Start the endpoint: engines and the gateway as one Ray Serve application."""

import logging
import secrets
import socket
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
from ray import serve as ray_serve

from pipelines.errors import HardwareError, StageError
from pipelines.recipe import Serve as ServeSection
from serve import directory
from serve.engine import DRAIN_SECONDS, EnginePlan, EngineReplica, node_address
from serve.guard import Limits
from serve.listener import GatewayPlan, GatewayReplica
from serve.models import ServedModel, check_models

__all__ = ["ServedModel", "endpoint"]

HEALTH_CHECK_SECONDS = 1.0
SHUTDOWN_POLL_SECONDS = 0.1


@contextmanager
def endpoint(
    models: list[ServedModel],
    section: ServeSection,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    log_dir: Path | None = None,
    keys: tuple[bytes, ...] = (),
    limits: Limits | None = None,
) -> Iterator[str]:
    """Serve models until the block ends; yields the address, such as `http://127.0.0.1:8000/v1`.

    Ray must be initialised. Without a port a free one is taken. Engines write their logs to `log_dir`. With `keys`
    (SHA-256 digests) only their holders are answered.
    Raises RecipeError for names that cannot be served, HardwareError when the cluster is too small, StageError
    when an engine does not start (with the end of its log) or the port is taken.
    """
    check_models(models)
    require_resources(models, section)
    app = f"danlu-{secrets.token_hex(4)}"
    port = claim_port(host, port)
    plan = GatewayPlan(app, models, secrets.token_urlsafe(24), keys, limits or Limits(), host, port)
    logs = log_dir or Path(tempfile.mkdtemp(prefix="danlu-serve-"))
    try:
        deploy(application(plan, section, logs), app)
        wait_until_ready(host, port)
        yield f"http://{host}:{port}/v1"
    finally:
        ray_serve.delete(app)
        directory.forget(app)


def deploy(application: ray_serve.Application, app: str) -> None:
    """Run a Ray Serve application under the name `app`, and wait until its engines have loaded their models."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # the caller says what it waits for
    ray_serve.start(proxy_location="Disabled")
    try:
        ray_serve.run(application, name=app, route_prefix=None)
    except RuntimeError as error:
        raise StageError(directory.failure(app) or str(error)) from None


def application(plan: GatewayPlan, section: ServeSection, logs: Path) -> ray_serve.Application:
    """The Ray Serve application: one deployment per engine, and the gateway on this node in front of them."""
    engines = [
        ray_serve.deployment(
            name=f"engine-{model.name}",
            num_replicas=section.num_replicas,
            ray_actor_options={"num_cpus": section.num_cpus, "num_gpus": section.num_gpus},
            health_check_period_s=HEALTH_CHECK_SECONDS,
            graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_SECONDS,
            graceful_shutdown_timeout_s=DRAIN_SECONDS + 10,
            max_constructor_retry_count=1,
        )(EngineReplica).bind(
            EnginePlan(plan.app, model, section.engine, section.num_gpus, engine_host(), plan.engine_key, str(logs))
        )
        for model in plan.models
    ]
    gateway = ray_serve.deployment(
        name="gateway",
        ray_actor_options={"num_cpus": 0, "resources": {f"node:{node_address()}": 0.001}},
        health_check_period_s=HEALTH_CHECK_SECONDS,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS + 10,
        max_constructor_retry_count=1,
    )(GatewayReplica)
    return gateway.bind(plan, *engines)


def engine_host() -> str:
    """The address engines listen on: this machine alone where the cluster is one machine, else (empty) each node's."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return "127.0.0.1" if sum(node["Alive"] for node in nodes) == 1 else ""


def require_resources(models: list[ServedModel], section: ServeSection) -> None:
    """Raise HardwareError when the cluster could never place all engines; Ray would wait for ever."""
    engines = len(models) * section.num_replicas
    have = ray.cluster_resources()  # type: ignore[no-untyped-call]
    for resource, each in (("CPU", section.num_cpus), ("GPU", section.num_gpus)):
        if engines * each > have.get(resource, 0.0):
            raise HardwareError(
                f"serving needs {engines} engine(s) of {each:g} {resource} each, the cluster has "
                f"{have.get(resource, 0.0):g}; lower serve.num_{resource.lower()}s or serve.num_replicas"
            )


def claim_port(host: str, port: int | None) -> int:
    """The port to listen on, a free one when none is asked for; raises StageError when it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port or 0))
        except OSError as error:
            raise StageError(f"cannot listen on {host}:{port}: {error.strerror}; choose another serve.port") from None
        return int(probe.getsockname()[1])


def wait_until_ready(host: str, port: int, timeout: float = 60.0) -> None:
    """Return when the gateway sees an engine for every model; all engines run when this is called."""
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        try:
            with urllib.request.urlopen(f"http://{host}:{port}/ready", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.05)
    raise StageError(f"the gateway at {host}:{port} did not become ready in {timeout:g} s")
