"""The endpoint on a cluster: configuration for `serve deploy` and KubeRay, and the builders that it names.

Every engine is an application of its own, and so is the gateway: what has not changed goes on serving. API keys are
read where the gateway is built, from the environment of the cluster's nodes; the configuration holds none. A gateway
that others reach is not built without keys, unless `serve.open` says so.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from ray import __version__ as ray_version
from ray import serve as ray_serve

from pipelines.models.served import ServedModel, check_models
from pipelines.recipe.serve import Serve as ServeSection
from serve import discovery
from serve.app import engine_application, gateway_application
from serve.auth import KEYS, environment_keys
from serve.engine.command import EnginePlan
from serve.gateway.gateway_replica import GatewayPlan

HEAD = "node:__internal_head__"
"""A resource that Ray gives to the head node alone; the gateway listens there."""

IMAGE = "danlu:latest"
"""The container image of KubeRay's pods: this project installed, with Ray's own version."""

MEMORY_GIB = 16
"""Memory of a KubeRay pod, unless the model's size says otherwise: its weights must fit."""


def build_engine(args: dict[str, Any]) -> ray_serve.Application:
    """The application of one engine, from the configuration's arguments."""
    section = ServeSection.model_validate(args["serve"])
    key = discovery.shared_key(args["app"])
    model = ServedModel(**args["model"])
    plan = EnginePlan(args["app"], model, section.engine, section.num_gpus, "", key, args["log_dir"])
    return engine_application(plan, section)


def build_gateway(args: dict[str, Any]) -> ray_serve.Application:
    """The application of the gateway, from the configuration's arguments."""
    section = ServeSection.model_validate(args["serve"])
    models = [ServedModel(**model) for model in args["models"]]
    check_models(models)
    plan = GatewayPlan(
        args["app"],
        models,
        discovery.shared_key(args["app"]),
        environment_keys(section),
        section.limits,
        section.host,
        section.port,
        tuple(section.allow_origins),
        section.open,
        section.open_metrics,
        f"{args['log_dir']}/access.jsonl" if section.access_log else None,
        section.gateway_per_node,
    )
    return gateway_application(plan, HEAD, args.get("nodes"))


def configuration(
    name: str, models: Sequence[ServedModel], section: ServeSection, log_dir: str, *, comes_up: bool = False
) -> dict[str, Any]:
    """What `serve deploy` takes. All paths must be seen by every node.

    `comes_up`: for a cluster that starts with it, so that nodes for the engines may come after the gateways are asked
    for.
    """
    app = f"danlu-{name}"
    described = [asdict(model) for model in models]
    of_engines = section.model_dump(include={"num_replicas", "autoscaling", "num_cpus", "num_gpus", "engine"})
    of_gateway = section.model_dump(
        include={
            *("host", "port", "open", "open_metrics", "access_log", "limits", "allow_origins"),
            "gateway_per_node",
        }
    )
    engines = [
        _application(
            f"{app}-{model['name']}",
            "serve.kuberay:build_engine",
            {"app": app, "model": model, "log_dir": log_dir, "serve": of_engines},
        )
        for model in described
    ]
    arguments: dict[str, Any] = {"app": app, "models": described, "log_dir": log_dir, "serve": of_gateway}
    if comes_up and section.gateway_per_node:
        arguments["nodes"] = 1 + len(models) * _fewest(section)
    gateway = _application(app, "serve.kuberay:build_gateway", arguments)
    return {"proxy_location": "Disabled", "applications": [*engines, gateway]}


def _fewest(section: ServeSection) -> int:
    """Replicas of an engine that there always are."""
    return section.autoscaling.min_replicas if section.autoscaling else section.num_replicas


def _application(name: str, import_path: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "route_prefix": None, "import_path": import_path, "args": args}


def ray_service(
    name: str,
    config_yaml: str,
    engines: int,
    section: ServeSection,
    workspace: str,
    memory_gib: int = MEMORY_GIB,
) -> dict[str, Any]:
    """KubeRay's RayService: a head, and a worker for each engine replica; each is to have a gateway.

    `workspace` is the folder of that name on the volume claim `danlu`; API keys come from the secret `danlu`, key
    `api-keys`, without which no pod starts, unless `serve.open` says that anyone may ask.
    """
    replicas = _fewest(section)
    most = section.autoscaling.max_replicas if section.autoscaling else section.num_replicas
    cpus = math.ceil(section.num_cpus)
    gpus = math.ceil(section.num_gpus)
    keys = {"secretKeyRef": {"name": "danlu", "key": "api-keys", "optional": section.open}}
    variables = [{"name": KEYS, "valueFrom": keys}]
    head = pod("ray-head", {"cpu": 2, "memory": "4Gi"}, workspace, variables, section.port)
    # With a gateway on every node: KubeRay's service leads to all pods that are ready, and by this port it asks them.
    engine = pod("ray-worker", resources(cpus, gpus, memory_gib), workspace, variables, section.port)
    group = {
        "groupName": "engines",
        "replicas": engines * replicas,
        "minReplicas": engines * replicas,
        "maxReplicas": engines * most,
        "rayStartParams": {},
        "template": engine,
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": kubernetes_name(name)},
        "spec": {
            "serveConfigV2": config_yaml,
            "rayClusterConfig": ray_cluster(head, [group], grows=section.autoscaling is not None),
        },
    }


def kubernetes_name(recipe: str) -> str:
    """A recipe's name as Kubernetes takes it: lower case, and short enough for what KubeRay appends."""
    return "danlu-" + (re.sub(r"[^a-z0-9-]", "-", recipe.lower())[:40].strip("-") or "recipe")


def ray_cluster(head: dict[str, Any], groups: list[dict[str, Any]], *, grows: bool) -> dict[str, Any]:
    """KubeRay's cluster: a head without work of Ray's, and groups of workers that come and go where it grows."""
    return {
        "rayVersion": ray_version,
        "authOptions": {"mode": "token"},  # KubeRay 1.5.1 and later make the token, and every pod gets it
        "enableInTreeAutoscaling": grows,
        **({"autoscalerOptions": {"version": "v2"}} if grows else {}),
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"}, "template": head},
        "workerGroupSpecs": groups,
    }


def resources(cpus: int, gpus: int, memory_gib: int) -> dict[str, Any]:
    """What a pod asks of its node."""
    return {"cpu": cpus, "memory": f"{memory_gib}Gi"} | ({"nvidia.com/gpu": gpus} if gpus else {})


def pod(
    container: str,
    resources: dict[str, Any],
    workspace: str,
    variables: list[dict[str, Any]],
    port: int | None = None,
) -> dict[str, Any]:
    """A pod of the cluster. A workspace that is no URL is the folder of its name on the volume claim `danlu`.

    What the secret `danlu-storage` holds, such as AWS_ACCESS_KEY_ID, is in its environment where there is one.
    """
    spec: dict[str, Any] = {
        "name": container,
        "image": IMAGE,
        "env": variables,
        "envFrom": [{"secretRef": {"name": "danlu-storage", "optional": True}}],
        "resources": {"limits": resources, "requests": resources},
        "volumeMounts": [],
    }
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001} if container == "ray-head" else {}
    ports |= {"serve": port} if port is not None else {}
    if ports:
        spec["ports"] = [{"name": name, "containerPort": number} for name, number in ports.items()]
    volumes: list[dict[str, Any]] = []
    if "://" not in workspace:
        volumes.append({"name": "workspace", "persistentVolumeClaim": {"claimName": "danlu"}})
        spec["volumeMounts"].append(
            {"name": "workspace", "mountPath": workspace, "subPath": workspace.rstrip("/").rpartition("/")[2]}
        )
    return {"spec": {"containers": [spec], "volumes": volumes}}
