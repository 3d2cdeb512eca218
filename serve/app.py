"""Start the endpoint: engines and the gateway as Ray Serve applications."""

import logging
import secrets
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import ray
from ray import serve as ray_serve
from ray.serve.schema import ApplicationStatus

from pipelines.artifacts.node_copy import NodeCopy
from pipelines.clean_up import clean_up
from pipelines.direct_http import fetch
from pipelines.errors import HardwareError, StageError
from pipelines.models.served import ServedModel, check_models
from pipelines.placement import can_grow, lacking_for_good
from pipelines.progress import say, steady_line
from pipelines.recipe.serve import Limits
from pipelines.recipe.serve import Serve as ServeSection
from serve import discovery
from serve.engine.command import DRAIN_SECONDS, EnginePlan
from serve.engine.extra import check_extra
from serve.engine.replica import LOAD_SECONDS, EngineReplica, node_address
from serve.engine.scratch import sweep
from serve.gateway.gateway_replica import GatewayPlan, GatewayReplica
from serve.gateway.shared_limits import end_keepers

FREE_PORTS = range(20_100, 32_000)
"""Where one that is free is looked for: above Ray's workers', and below those that Linux gives to connections.

The gateway listens minutes later, when the engines have loaded their models, and a connection may have got it by then.
"""
HEALTH_CHECK_SECONDS = 2.0
SHUTDOWN_POLL_SECONDS = 0.1
STOP_SECONDS = 60
"""What Serve may take to stop an application that has nothing to do any more."""
START_POLL_SECONDS = 0.1

START_SECONDS = LOAD_SECONDS + 600
"""How long all applications may take to run: placed by Ray, and their models loaded."""


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
    copy: NodeCopy | None = None,
) -> Iterator[str]:
    """Serve models until the block ends; yields the address, such as `http://127.0.0.1:8000/v1`.

    Ray must be initialised. Without a port a free one is taken. Engines write their logs to `log_dir`. With `keys`
    (SHA-256 digests) only their holders are answered. `copy`: how nodes get the models that do not see them.
    Raises RecipeError for names and arguments that cannot be served, HardwareError when the cluster is too small,
    StageError when an engine does not start (with the end of its log) or the port is taken.
    """
    check_models(models)
    check_extra(section.engine)
    require_resources(models, section)
    app = f"danlu-{secrets.token_hex(4)}"
    port = claim_port(host, port)
    logs = log_dir or Path(tempfile.mkdtemp(prefix="danlu-serve-"))
    plan = GatewayPlan(
        app,
        models,
        discovery.shared_key(app),
        keys,
        limits or Limits(),
        host,
        port,
        tuple(section.allow_origins),
        section.open,
        section.open_metrics,
        str(logs / "access.jsonl") if section.access_log else None,
        section.gateway_per_node,
        copy,
    )
    targets = applications(plan, section, logs)
    started = False
    try:
        deploy(targets, app, logs)
        wait_until_ready(host, port)
        started = True
        yield f"http://{address(host)}:{port}/v1"
    finally:
        for name in reversed(targets):  # the gateway first: its requests need the engines to end
            # an engine that still loads its model does not listen, so that nobody waits for its end
            stop = partial(ray_serve.delete, name, _blocking=started)
            clean_up(f"stopping {name}", stop, DRAIN_SECONDS + STOP_SECONDS)
        clean_up("ending the keepers of limits", partial(end_keepers, app), STOP_SECONDS)
        clean_up("forgetting the endpoint", partial(discovery.forget, app), STOP_SECONDS)
        sweep()


def address(host: str) -> str:
    """A host as it stands in a URL: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def deploy(targets: dict[str, ray_serve.Application], app: str, logs: Path) -> None:
    """Run Ray Serve applications by name, and wait until the engines have loaded their models.

    Raises StageError when one does not start, or not within `START_SECONDS`.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # this function says what it waits for
    ray_serve.start(proxy_location="Disabled")
    wanted = [ray_serve.RunTarget(target, name, None) for name, target in targets.items()]
    ray_serve.run_many(wanted, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    began = time.monotonic()
    say(f"  starting {len(targets) - 1} engine(s) …")
    with steady_line() as show:
        while True:
            found = ray_serve.status().applications
            states = {name: found[name].status if name in found else ApplicationStatus.NOT_STARTED for name in targets}
            for name, state in states.items():
                if state in (ApplicationStatus.DEPLOY_FAILED, ApplicationStatus.UNHEALTHY):
                    why = [found[name].message, *(one.message for one in found[name].deployments.values())]
                    told = f"{name} did not start: {' '.join(filter(None, why))}"
                    raise StageError(discovery.failure(app) or told)
            missing = [name for name, state in states.items() if state != ApplicationStatus.RUNNING]
            waited = time.monotonic() - began
            if not missing:
                break
            what = ", ".join(name.removeprefix(f"{app}-").replace(app, "the gateway") for name in missing)
            if waited > START_SECONDS:
                raise StageError(f"{what}: not running after {waited:.0f} s; the engines' logs are in {logs}")
            show(f"  waiting for {what} for {waited:.0f} s; the engines' logs are in {logs}")
            time.sleep(START_POLL_SECONDS)
    say(f"  starting {len(targets) - 1} engine(s): {waited:.1f} s")


def applications(plan: GatewayPlan, section: ServeSection, logs: Path) -> dict[str, ray_serve.Application]:
    """An application per engine, so that each can be deployed anew by itself, and last the gateway, on this node or on
    every one."""
    engines = {
        f"{plan.app}-{model.name}": engine_application(
            EnginePlan(
                *(plan.app, model, section.engine, section.num_gpus, engine_host()),
                *(plan.engine_key, str(logs), plan.copy),
            ),
            section,
        )
        for model in plan.models
    }
    return {**engines, plan.app: gateway_application(plan, f"node:{node_address()}")}


def engine_application(plan: EnginePlan, section: ServeSection) -> ray_serve.Application:
    """The Ray Serve application of one engine with its replicas."""
    replicas: dict[str, Any] = {"num_replicas": section.num_replicas}
    if section.autoscaling is not None:
        policy = {"policy_function": "serve.engine.scaling:by_requests_at_the_engines"}
        bounds = section.autoscaling.model_dump()
        replicas = {"autoscaling_config": {**bounds, "policy": policy}}
    engine = ray_serve.deployment(
        name=f"engine-{plan.model.name}",
        ray_actor_options={"num_cpus": section.num_cpus, "num_gpus": section.num_gpus},
        health_check_period_s=HEALTH_CHECK_SECONDS,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS + 10,
        max_constructor_retry_count=1,
        **replicas,
    )(EngineReplica)
    return engine.bind(plan)


def gateway_application(plan: GatewayPlan, node: str, nodes: int | None = None) -> ray_serve.Application:
    """The Ray Serve application of the gateway: on the node that alone has a resource, or one on each of `nodes` nodes.

    Those that are not there yet get theirs when they come; None: as many as are there now.
    """
    placed: dict[str, Any]
    if plan.is_one_of_many:
        number = nodes or alive_nodes()
        placed = {"num_replicas": number, "max_replicas_per_node": 1, "ray_actor_options": {"num_cpus": 0}}
    else:
        placed = {"ray_actor_options": {"num_cpus": 0, "resources": {node: 0.001}}}
    gateway = ray_serve.deployment(
        name="gateway",
        health_check_period_s=HEALTH_CHECK_SECONDS,
        graceful_shutdown_wait_loop_s=SHUTDOWN_POLL_SECONDS,
        graceful_shutdown_timeout_s=DRAIN_SECONDS + 10,
        max_constructor_retry_count=1,
        **placed,
    )(GatewayReplica)
    return gateway.bind(plan)


def alive_nodes() -> int:
    """Nodes of the cluster now."""
    return sum(node["Alive"] for node in ray.nodes())  # type: ignore[no-untyped-call]


def engine_host() -> str:
    """The address engines listen on: this machine alone where the cluster is one machine, else (empty) each node's."""
    return "127.0.0.1" if alive_nodes() == 1 and not can_grow() else ""


def require_resources(models: list[ServedModel], section: ServeSection) -> None:
    """Wait where the cluster must grow for the engines; HardwareError where it never could place all of them.

    Ray would wait for ever. Of replicas that come and go with load, a cluster that can grow need not hold the most.
    """
    replicas = section.num_replicas
    if section.autoscaling:
        bounds = section.autoscaling
        replicas = max(1, bounds.min_replicas) if can_grow() else bounds.max_replicas
    engines = len(models) * replicas
    each = {"CPU": section.num_cpus, "GPU": section.num_gpus}
    what = f"serving needs {engines} engine(s) of {section.num_cpus:g} CPU and {section.num_gpus:g} GPU each"
    if lacking := lacking_for_good([each] * engines, what):
        raise HardwareError(
            f"{what}; the cluster lacks {lacking}; lower serve.num_gpus (engines share a GPU at 0.5, each with half of "
            "its memory), serve.num_cpus or the replicas"
        )


def claim_port(host: str, port: int | None) -> int:
    """The port to listen on, a free one when none is asked for; raises StageError when it is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for wanted in secrets.SystemRandom().sample(FREE_PORTS, 100) if port is None else [port]:
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, wanted))
                return wanted
            except OSError as error:
                why = error.strerror
    raise StageError(f"cannot listen on {host}:{wanted}: {why}; choose another serve.port")


def wait_until_ready(host: str, port: int, timeout: float = 60.0) -> None:
    """Return when the gateway sees an engine for every model; all engines run when this is called."""
    until = time.monotonic() + timeout
    while True:
        try:
            fetch(f"http://{address(host)}:{port}/ready", timeout=5)
            return
        except OSError as error:
            if time.monotonic() > until:
                what = f"the gateway at {host}:{port} did not become ready in {timeout:g} s"
                raise StageError(f"{what}: {error}") from None
            time.sleep(0.05)
