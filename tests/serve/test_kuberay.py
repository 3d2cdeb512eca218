"""The endpoint's configuration for clusters: what Ray's own schema says, and what its import paths build."""

import importlib
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests
import yaml

pytest.importorskip("ray.serve")

from ray.serve.schema import ServeDeploySchema

from pipelines.errors import RecipeError
from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Serve
from serve.kuberay import HEAD, configuration, ray_service

MODELS = [
    ServedModel("base", "/shared/base", {}, "/shared/adapters"),
    ServedModel("wishes-merged", "/shared/merged"),
]
SECTION = Serve.model_validate(
    {
        "host": "0.0.0.0",
        "port": 9000,
        "num_gpus": 1,
        "limits": {"requests_per_minute": 60},
        "autoscaling": {"max_replicas": 4, "target_ongoing_requests": 8},
        "engine": {"max_model_len": 2048},
    }
)


@pytest.fixture
def config() -> dict[str, Any]:
    """The configuration as it comes back from its file."""
    made = configuration("wishes", MODELS, SECTION, "/shared/logs")
    return dict(yaml.safe_load(yaml.safe_dump(made)))


def built(application: dict[str, Any]) -> Any:
    module, name = application["import_path"].split(":")
    return getattr(importlib.import_module(module), name)(application["args"])._bound_deployment


def test_ray_takes_the_configuration(config: dict[str, Any]) -> None:
    schema = ServeDeploySchema.model_validate(config)
    assert [app.name for app in schema.applications] == [
        "danlu-wishes-base",
        "danlu-wishes-wishes-merged",
        "danlu-wishes",
    ]
    assert [app.route_prefix for app in schema.applications] == [None] * 3


def test_the_import_paths_build_engines_and_gateway(
    config: dict[str, Any], ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLU_API_KEYS", "secret-of-the-nodes")
    base, merged, gateway = (built(application) for application in config["applications"])
    assert [d.name for d in (base, merged, gateway)] == ["engine-base", "engine-wishes-merged", "gateway"]
    (plan,) = base.init_args
    assert (plan.model, plan.arguments.max_model_len, plan.num_gpus) == (MODELS[0], 2048, 1)
    scaling = base._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (1, 4, 8)
    (front,) = gateway.init_args
    assert (front.limits.requests_per_minute, len(front.keys), front.host) == (60, 1, "0.0.0.0")
    assert front.engine_key == plan.key  # they know each other, and so do those that are built later
    assert list(gateway.ray_actor_options["resources"]) == [HEAD]


def test_a_gateway_that_others_reach_is_not_built_without_keys(
    config: dict[str, Any], ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DANLU_API_KEYS", raising=False)
    with pytest.raises(RecipeError, match=r"serve\.host: others reach 0\.0\.0\.0"):
        built(config["applications"][-1])
    opened = configuration("wishes", MODELS, SECTION.model_copy(update={"open": True}), "/shared/logs")
    (front,) = built(opened["applications"][-1]).init_args
    assert front.keys == ()


def test_ray_s_own_ports_ask_for_a_token() -> None:
    cluster = ray_service("wishes", "", 1, SECTION, "/shared")["spec"]["rayClusterConfig"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert tuple(map(int, cluster["rayVersion"].split(".")[:2])) >= (2, 52)  # from which Ray has it


@pytest.mark.parametrize("is_open", [False, True])
def test_pods_wait_for_the_secret_unless_anyone_may_ask(is_open: bool) -> None:
    section = SECTION.model_copy(update={"open": is_open})
    cluster = ray_service("wishes", "", 1, section, "/shared")["spec"]["rayClusterConfig"]
    for pods in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (variable,) = pods["template"]["spec"]["containers"][0]["env"]
        secret = {"name": "danlu", "key": "api-keys", "optional": is_open}
        assert variable == {"name": "DANLU_API_KEYS", "valueFrom": {"secretKeyRef": secret}}


def test_an_engine_s_change_leaves_the_gateway_s_application_as_it_is(config: dict[str, Any]) -> None:
    engine = SECTION.engine.model_copy(update={"max_num_seqs": 8})
    changed = configuration("wishes", MODELS, SECTION.model_copy(update={"engine": engine}), "/shared/logs")
    same = [a == b for a, b in zip(config["applications"], changed["applications"], strict=True)]
    assert same == [False, False, True]


def test_a_ray_service_holds_the_configuration_and_no_key(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DANLU_API_KEYS", "secret-of-the-nodes")
    service = ray_service("Wishes_1.0", yaml.safe_dump(config), 2, SECTION, "/shared")
    assert (service["apiVersion"], service["kind"]) == ("ray.io/v1", "RayService")
    assert service["metadata"]["name"] == "danlu-wishes-1-0"
    ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (2, 8)
    (container,) = group["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    (head,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "serve", "containerPort": 9000} in head["ports"]
    assert "secret-of-the-nodes" not in json.dumps(service)


def test_scaling_follows_the_requests_at_the_engines() -> None:
    from types import SimpleNamespace

    from ray.serve.config import AutoscalingConfig

    from serve.engine.scaling import by_requests_at_the_engines

    config = AutoscalingConfig(min_replicas=1, max_replicas=4, target_ongoing_requests=8)
    reported: Any = SimpleNamespace(aggregated_metrics={"in_flight": {"a": 14.0, "b": 6.0}}, config=config)
    assert by_requests_at_the_engines(reported) == (2.5, {})
    silent: Any = SimpleNamespace(aggregated_metrics={}, target_num_replicas=3, config=config)
    assert by_requests_at_the_engines(silent) == (3, {})


def test_vllm_s_metrics_are_read(serving: Any) -> None:
    from serve.engine.replica import requests_at

    text = b"""# HELP vllm:num_requests_running x
vllm:num_requests_running{engine="0",model_name="base"} 3.0
vllm:num_requests_waiting{engine="0",model_name="base"} 12.0
vllm:num_requests_waiting_by_reason{engine="0",reason="capacity"} 12.0
vllm:request_success_total{engine="0"} 9.0
"""

    async def metrics(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": text})

    with serving(metrics) as url:
        assert requests_at(url) == 15


def test_a_gateway_on_every_node_is_asked_for_in_both_files() -> None:
    section = SECTION.model_copy(update={"gateway_per_node": True})
    (gateway,) = configuration("tiny", MODELS, section, "/shared/logs")["applications"][-1:]
    assert gateway["args"]["serve"]["gateway_per_node"] is True
    service = ray_service("tiny", "{}", 2, section, "/shared")
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    assert {"name": "serve", "containerPort": 9000} in container["ports"]


@pytest.mark.slow
def test_what_serve_deploy_sends_is_served_and_changed_in_part(
    ray_cluster: None, tiny_model: Path, tmp_path: Path
) -> None:
    pytest.importorskip("vllm")
    from ray import serve as ray_serve
    from ray.serve.context import _get_global_client

    from serve.app import claim_port, wait_until_ready

    port = claim_port("127.0.0.1", None)
    section = Serve.model_validate({"port": port, "engine": {"kv_cache_memory_bytes": 64 << 20, "max_model_len": 256}})
    ray_serve.start(proxy_location="Disabled")
    client = _get_global_client()
    names = ["danlu-tiny-base", "danlu-tiny"]

    def deploy(section: Serve) -> list[tuple[str, int]]:
        config = configuration("tiny", [ServedModel("base", str(tiny_model))], section, str(tmp_path))
        for _ in range(4):  # it waits for a minute, and an engine on a busy machine takes longer
            with suppress(TimeoutError):
                client.deploy_apps(ServeDeploySchema.model_validate(config), _blocking=True)
                break
        wait_until_ready("127.0.0.1", port)
        body = {"model": "base", "prompt": "x", "max_tokens": 2}
        answer = requests.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
        lines = [(" ".join(p.cmdline()), p.pid) for p in psutil.Process().children(recursive=True)]
        return [(name, pid) for name in ("engine-base", "gateway") for line, pid in lines if f":{name}" in line]

    try:
        before = deploy(section)
        after = deploy(section.model_copy(update={"engine": section.engine.model_copy(update={"max_num_seqs": 8})}))
    finally:
        client.delete_apps(names)
    assert [name for name, _ in before] == ["engine-base", "gateway"]
    assert before[0] != after[0]
    assert before[1] == after[1]
