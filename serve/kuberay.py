"""The endpoint on a cluster: configuration for `serve deploy` and KubeRay, and the builders that it names.

Every engine is an application of its own, and so is the gateway: what has not changed goes on serving. API keys are
read where the gateway is built, from the environment of the cluster's nodes; the configuration holds none. A gateway
that others reach is not built without keys, unless `serve.open` says so.
"""

import math
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
"""Memory of a KubeRay pod; a model's weights must fit."""


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
    return gateway_application(plan, HEAD)


def configuration(name: str, models: Sequence[ServedModel], section: ServeSection, log_dir: str) -> dict[str, Any]:
    """What `serve deploy` takes. All paths must be seen by every node."""
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
    gateway = _application(
        app,
        "serve.kuberay:build_gateway",
        {"app": app, "models": described, "log_dir": log_dir, "serve": of_gateway},
    )
    return {"proxy_location": "Disabled", "applications": [*engines, gateway]}


def _application(name: str, import_path: str, args: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "route_prefix": None, "import_path": import_path, "args": args}


def ray_service(name: str, config_yaml: str, engines: int, section: ServeSection, workspace: str) -> dict[str, Any]:
    """KubeRay's RayService: a head with the gateway, and a worker for each engine replica.

    `workspace` is mounted from the volume claim `danlu`; API keys come from the secret `danlu`, key `api-keys`,
    without which no pod starts, unless `serve.open` says that anyone may ask.
    """
    replicas = section.autoscaling.min_replicas if section.autoscaling else section.num_replicas
    most = section.autoscaling.max_replicas if section.autoscaling else section.num_replicas
    cpus = math.ceil(section.num_cpus)
    gpus = math.ceil(section.num_gpus)
    ports = {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": section.port}
    head = _pod("ray-head", {"cpu": 2, "memory": "4Gi"}, workspace, ports, section.open)
    worker = {"cpu": cpus, "memory": f"{MEMORY_GIB}Gi"} | ({"nvidia.com/gpu": gpus} if gpus else {})
    group = {
        "groupName": "engines",
        "replicas": engines * replicas,
        "minReplicas": engines * replicas,
        "maxReplicas": engines * most,
        "rayStartParams": {},
        "template": _pod(
            "ray-worker", worker, workspace, {"serve": section.port} if section.gateway_per_node else {}, section.open
        ),
    }
    cluster = {
        "rayVersion": ray_version,
        "authOptions": {"mode": "token"},  # KubeRay 1.5.1 and later make the token, and every pod gets it
        "enableInTreeAutoscaling": section.autoscaling is not None,
        "headGroupSpec": {"rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"}, "template": head},
        "workerGroupSpecs": [group],
    }
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": f"danlu-{name.lower().replace('_', '-').replace('.', '-')}"},
        "spec": {"serveConfigV2": config_yaml, "rayClusterConfig": cluster},
    }


def _pod(
    container: str, resources: dict[str, Any], workspace: str, ports: dict[str, int], is_open: bool
) -> dict[str, Any]:
    keys = {"secretKeyRef": {"name": "danlu", "key": "api-keys", "optional": is_open}}
    spec: dict[str, Any] = {
        "name": container,
        "image": IMAGE,
        "env": [{"name": KEYS, "valueFrom": keys}],
        "resources": {"limits": resources, "requests": resources},
        "volumeMounts": [{"name": "workspace", "mountPath": workspace}],
    }
    if ports:
        spec["ports"] = [{"name": name, "containerPort": number} for name, number in ports.items()]
    claim = {"name": "workspace", "persistentVolumeClaim": {"claimName": "danlu"}}
    return {"spec": {"containers": [spec], "volumes": [claim]}}
