"""A recipe as a job of KubeRay: a cluster that comes for it and goes after it, and the files that the recipe names."""

import base64
import math
import re
import shlex
import tempfile
from pathlib import Path
from typing import Any

from pipelines.artifacts.files import Destination, require_writable
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import InputError, Problem, RecipeError
from pipelines.progress import say
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import Train
from pipelines.train.memory import GIB, estimate, shapes_here
from rayjobs.deploy import engine_memory_gib, weight_bytes, write_yaml
from rayjobs.one_node import node_needs
from rayjobs.submit import command_of, pack
from serve.kuberay import MEMORY_GIB, kubernetes_name, pod, ray_cluster, resources

FOLDER = "/recipe"
"""Where the recipe and its files lie in every pod, and every process of Ray's begins."""
MAX_FILES = 900_000
"""Bytes of files that travel, of the mebibyte that Kubernetes gives a ConfigMap, a third being for base64."""
CPU_PODS, CPU_POD = 8, resources(8, 0, 32)
"""How many pods the cluster may have for work over rows, and what each of them asks for."""
CONFIG_FILES = "recipe"
LABEL = re.compile(r"([A-Za-z0-9./_-]+)=([A-Za-z0-9._-]*)")


def write_ray_job(
    recipe: Recipe,
    file: Path,
    overrides: list[str],
    stage: str | None,
    workspace: Workspace,
    target: Destination,
    selectors: list[str],
) -> None:
    """Write a RayJob that runs the recipe up to a stage, with the files that it names.

    Raises RecipeError for files that can neither travel nor be meant for the cluster, InputError for a selector that is
    none, and for a target that may not be written.
    """
    require_writable(target, None)
    selector = dict(map(_selector, selectors))
    with tempfile.TemporaryDirectory(prefix="danlu-job-") as folder:
        pack(recipe, file, Path(folder))
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }
    size = sum(map(len, files.values()))
    if size * 4 / 3 > MAX_FILES:
        largest = max(files, key=lambda name: len(files[name]))
        message = f"the files that it names take {size >> 10} KiB, {largest} the most; a ConfigMap takes "
        message += (
            f"{MAX_FILES * 3 // 4 >> 10}: put them where the pods see them, and give their URLs or absolute paths"
        )
        raise RecipeError(recipe.name, [Problem("", message)])
    name = kubernetes_name(recipe.name)
    command = shlex.join(command_of(file, overrides, stage, workspace))
    config, job = config_map(name, files), ray_job(name, command, list(files), recipe, workspace.root, selector)
    # Without the workspace, which this machine may have no way to, to note there that it wrote the file.
    write_yaml(target, None, "kubectl apply -f", config, job)
    if workspace.is_local:
        say(f"  the pods find {workspace.root} on the volume claim danlu, which all of them must be able to mount")
    else:
        say("  the pods take the keys of the storage from the secret danlu-storage, where there is one")


def config_map(name: str, files: dict[str, bytes]) -> dict[str, Any]:
    """The files, under keys that stand for their paths, since those of a ConfigMap have no folders."""
    data = {_key(number): base64.b64encode(content).decode() for number, content in enumerate(files.values())}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "binaryData": data}


def ray_job(
    name: str, command: str, paths: list[str], recipe: Recipe, workspace: str, selector: dict[str, str]
) -> dict[str, Any]:
    """KubeRay's RayJob: pods for work over rows, for training and for engines, none of which waits without work.

    Where the workspace is a URL, one pod merges, and has all engines; see one_node.py.
    """
    head = _with_files(pod("ray-head", {"cpu": 2, "memory": "8Gi"}, workspace, []), name, paths)
    kinds = {"cpu": (CPU_PODS, CPU_POD)}
    together = "://" in workspace
    if recipe.train is not None:
        kinds["train"] = (recipe.train.num_workers, training_pod(recipe.train))
    if recipe.train is not None and together:
        kinds["after-train"] = (1, pod_of_all(recipe))
    if (recipe.train is not None and not together) or recipe.synthesize is not None:
        replicas = recipe.serve.autoscaling.max_replicas if recipe.serve.autoscaling else recipe.serve.num_replicas
        kinds["engines"] = (2 * replicas, engine_pod(recipe))  # of the base with its adapters, and of the merged model
    groups = []
    for kind, (most, asked) in kinds.items():
        template = _with_files(pod("ray-worker", asked, workspace, []), name, paths)
        if selector and "nvidia.com/gpu" in asked:
            template["spec"]["nodeSelector"] = selector
        groups.append(
            {
                "groupName": kind,
                "replicas": 0,
                "minReplicas": 0,
                "maxReplicas": most,
                "rayStartParams": {},
                "template": template,
            }
        )
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name},
        "spec": {
            "entrypoint": command,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": ray_cluster(head, groups, grows=True),
        },
    }


def training_pod(section: Train) -> dict[str, Any]:
    """What one worker's pod asks for."""
    each = section.resources_per_worker
    return resources(math.ceil(each.get("CPU", 1)), math.ceil(each.get("GPU", 0)), worker_memory_gib(section))


def pod_of_all(recipe: Recipe) -> dict[str, Any]:
    """What a pod asks for that merges and, after that, has the two engines that there are at most."""
    needs = node_needs(recipe)
    return resources(math.ceil(needs["CPU"]), math.ceil(needs.get("GPU", 0)), 2 * _engine_memory_gib(recipe))


def worker_memory_gib(section: Train) -> int:
    """Main memory for one worker: by the estimate that `danlu check` prints, where the model is here."""
    shapes = shapes_here(section)
    if shapes is None:
        say(f"  {section.model} is not here to be measured: workers get {MEMORY_GIB} GiB each; is that right?")
        return MEMORY_GIB
    stage = 3 if section.zero_stage == "auto" else section.zero_stage
    return 4 + math.ceil(estimate(section, shapes, stage).total / GIB)


def engine_pod(recipe: Recipe) -> dict[str, Any]:
    """What one engine's pod asks for; its memory by the model's weights, where they are here."""
    return resources(math.ceil(recipe.serve.num_cpus), math.ceil(recipe.serve.num_gpus), _engine_memory_gib(recipe))


def _engine_memory_gib(recipe: Recipe) -> int:
    folder = Path(recipe.train.model).expanduser() if recipe.train else Path()
    weights = weight_bytes(folder) if recipe.train and folder.is_dir() else 0
    return engine_memory_gib(weights) if weights else MEMORY_GIB


def _with_files(template: dict[str, Any], name: str, paths: list[str]) -> dict[str, Any]:
    """A pod in which the files lie at their paths, and where processes begin."""
    spec = template["spec"]
    items = [{"key": _key(number), "path": path} for number, path in enumerate(paths)]
    spec["volumes"].append({"name": CONFIG_FILES, "configMap": {"name": name, "items": items}})
    spec["containers"][0]["volumeMounts"].append({"name": CONFIG_FILES, "mountPath": FOLDER})
    spec["containers"][0]["workingDir"] = FOLDER
    return template


def _key(number: int) -> str:
    return f"file-{number}"


def _selector(given: str) -> tuple[str, str]:
    match = LABEL.fullmatch(given)
    if match is None:
        raise InputError(f"--node-selector {given}: LABEL=VALUE, such as cloud.google.com/gke-accelerator=nvidia-l4")
    return match[1], match[2]
