"""What `danlu submit --write-kuberay` writes, by the schemas that KubeRay publishes."""

import base64
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from typer.testing import CliRunner

pytest.importorskip("ray.serve")

from pipelines.recipe.serve import Serve
from rayjobs.cli import app
from serve.gateway.app import HEALTH
from serve.kuberay import kubernetes_name, ray_service

SCHEMAS = json.loads((Path(__file__).parents[1] / "data" / "kuberay" / "schemas.json").read_text(encoding="utf-8"))


def strict(schema: Any) -> Any:
    """A schema of Kubernetes' as JSON Schema that takes no property it does not name."""
    if isinstance(schema, list):
        return [strict(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: strict(value) for key, value in schema.items()}
    if schema.get("x-kubernetes-int-or-string"):
        made["type"] = ["integer", "string"]
        made.pop("anyOf", None)
    if isinstance(schema.get("properties"), dict) and "additionalProperties" not in schema and "type" in schema:
        made["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    return made


def valid(document: dict[str, Any]) -> None:
    schema = strict(SCHEMAS[document["kind"]])
    schema["properties"]["metadata"] = {"type": "object"}
    jsonschema.validate(document, schema)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "rows").mkdir()
    row = {"query": "怎么养猫？", "response": "先看看你的时间。" * 10}
    (tmp_path / "rows" / "1.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    shipped = Path(__file__).parents[2] / "pipelines" / "recipe" / "shipped" / "tiny.yaml"
    shutil.copy(shipped, tmp_path / "Mine_1.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def written(*arguments: str) -> list[dict[str, Any]]:
    source = "ingest.source=rows/*.jsonl"
    done = CliRunner().invoke(app, ["submit", "Mine_1.yaml", source, "--write-kuberay", "job.yaml", *arguments])
    assert done.exit_code == 0, done.output
    return list(yaml.safe_load_all(Path("job.yaml").read_text(encoding="utf-8")))


def groups(job: dict[str, Any]) -> dict[str, Any]:
    found = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    return {group["groupName"]: group for group in found}


def test_the_job_is_valid_and_brings_the_recipe_s_files(folder: Path) -> None:
    config, job = written("--workspace", "s3://bucket/run", "--stage", "clean")
    valid(job)
    expected = (
        "python -P -m rayjobs run Mine_1.yaml 'ingest.source=rows/*.jsonl' --workspace s3://bucket/run --to clean"
    )
    assert job["spec"]["entrypoint"] == expected
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert (cluster["enableInTreeAutoscaling"], cluster["autoscalerOptions"]) == (True, {"version": "v2"})
    pods = [cluster["headGroupSpec"]["template"], *(group["template"] for group in groups(job).values())]
    for template in pods:
        (container,) = template["spec"]["containers"]
        assert [mount["mountPath"] for mount in container["volumeMounts"]] == [container["workingDir"]] == ["/recipe"]
        (volume,) = template["spec"]["volumes"]
        there = {
            item["path"]: base64.b64decode(config["binaryData"][item["key"]]) for item in volume["configMap"]["items"]
        }
        assert volume["configMap"]["name"] == config["metadata"]["name"] == job["metadata"]["name"]
        assert there == {name: (folder / name).read_bytes() for name in ("Mine_1.yaml", "rows/1.jsonl")}
    assert all(group["minReplicas"] == 0 < group["maxReplicas"] for group in groups(job).values())


def test_a_folder_is_a_part_of_the_volume_claim_and_gpus_are_where_they_are_needed(
    folder: Path, tiny_model: Path
) -> None:
    _, job = written(
        *(
            "--workspace",
            "/shared/run/",
            "train.num_workers=4",
            "train.global_batch_size=8",
            "train.resources_per_worker={GPU: 2, CPU: 3}",
        ),
        *(f"train.model={tiny_model}", "--node-selector", "cloud.google.com/gke-accelerator=nvidia-l4"),
    )
    valid(job)
    train = groups(job)["train"]
    assert train["maxReplicas"] == 4
    (container,) = train["template"]["spec"]["containers"]
    limits = container["resources"]["limits"]
    assert (limits["cpu"], limits["nvidia.com/gpu"]) == (3, 2) and int(limits["memory"].removesuffix("Gi")) < 16
    assert {"name": "workspace", "mountPath": "/shared/run", "subPath": "run"} in container["volumeMounts"]
    claims = [one.get("persistentVolumeClaim") for one in train["template"]["spec"]["volumes"]]
    assert {"claimName": "danlu"} in claims
    assert train["template"]["spec"]["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert "nodeSelector" not in groups(job)["cpu"]["template"]["spec"]


def test_on_a_bucket_workers_have_pods_of_their_own_and_one_pod_does_what_follows(
    folder: Path, tiny_model: Path
) -> None:
    asked = ["train.num_workers=4", "train.global_batch_size=8", "train.resources_per_worker={GPU: 2, CPU: 3}"]
    asked += ["serve.num_gpus=1", "evaluate={datasets: [test]}", "merge={}"]
    _, job = written("--workspace", "s3://bucket/run", *asked, f"train.model={tiny_model}")
    valid(job)
    assert sorted(groups(job)) == ["after-train", "cpu", "train"]
    found = {}
    for kind in ("train", "after-train"):
        (container,) = groups(job)[kind]["template"]["spec"]["containers"]
        limits = container["resources"]["limits"]
        found[kind] = (groups(job)[kind]["maxReplicas"], limits["cpu"], limits["nvidia.com/gpu"])
    assert found == {"train": (4, 3, 2), "after-train": (1, 1, 2)}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--node-selector", "gpu"], "--node-selector gpu: LABEL=VALUE"),
        (["--workspace", "run"], "must be a URL"),
        (["export.path=rows.parquet", "--workspace", "s3://b/r"], "would be written to the job's own folder"),
        (["clean.edited=absent.csv", "--workspace", "s3://b/r"], "absent.csv"),
    ],
)
def test_what_a_pod_could_not_do_is_refused(folder: Path, arguments: list[str], told: str) -> None:
    given = ["submit", "Mine_1.yaml", "ingest.source=rows/*.jsonl", "--write-kuberay", "job.yaml", *arguments]
    if "--workspace" not in arguments:
        given += ["--workspace", "s3://bucket/run"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code != 0
    assert told in " ".join(str(done.exception).split()) + " ".join(done.output.split())
    assert not (folder / "job.yaml").exists()


def test_files_that_no_config_map_holds_are_refused(folder: Path) -> None:
    (folder / "rows" / "2.jsonl").write_bytes(b"x" * 800_000)
    given = ["submit", "Mine_1.yaml", "ingest.source=rows/*.jsonl", "--write-kuberay", "job.yaml"]
    done = CliRunner().invoke(app, [*given, "--workspace", "s3://bucket/run"])
    assert "rows/2.jsonl the most" in str(done.exception) + done.output


def test_the_service_is_valid_and_its_workers_become_ready(folder: Path) -> None:
    section = Serve.model_validate(
        {"num_gpus": 2, "engine": {"tensor_parallel_size": 2}, "autoscaling": {"max_replicas": 4}}
    )
    service = ray_service("Wishes_1.0", "applications: []", 2, section, "/shared/run", 40)
    valid(service)
    (group,) = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    # KubeRay's own probe of a worker asks /-/healthz there, where the gateway of its node answers.
    assert (
        container["ports"] == [{"name": "serve", "containerPort": section.port}] and "readinessProbe" not in container
    )
    assert container["resources"]["limits"] == {"cpu": 1, "memory": "40Gi", "nvidia.com/gpu": 2}
    (head,) = service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "serve", "containerPort": section.port} in head["ports"]  # KubeRay asks /-/healthz there
    assert "/-/healthz" in HEALTH
    wrong = json.loads(json.dumps(service))
    wrong["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]["minReplica"] = 1
    with pytest.raises(jsonschema.ValidationError, match="minReplica"):
        valid(wrong)


@pytest.mark.parametrize("name", ["tiny", "Wishes_1.0", "愿望", "a" * 90, "-x-"])
def test_names_are_those_that_kubernetes_takes(name: str) -> None:
    made = kubernetes_name(name)
    assert len(made) <= 47 and made == made.strip("-") and all(part.isalnum() for part in made.split("-") if part)
