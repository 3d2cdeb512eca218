"""How vLLM's server is started for one engine: its command line and its environment."""

import glob
import importlib.util
import json
import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.artifacts.node_copy import NodeCopy
from pipelines.errors import StageError
from pipelines.kill_with_parent import PARENT, child_environment
from pipelines.models.served import ServedModel
from pipelines.recipe.serve import MAX_LORA_RANK
from pipelines.recipe.serve import Engine as EngineArguments
from serve.auth import KEYS
from serve.engine.extra import extra_arguments
from serve.engine.key import KEY
from serve.engine.positions import config_overrides

CPU_KV_CACHE_BYTES = 1 << 30
"""Key-value cache of a CPU engine where the recipe names none: vLLM would ask for nine tenths of the machine."""

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""What `GLIBC_TUNABLES` tells the allocator of a CPU engine: use huge pages where the system grants them on
request. They reduce TLB misses in matrix multiplication."""

DRAIN_SECONDS = 60
"""How long an engine that is told to stop may finish the requests it has."""

KEY_MIDDLEWARE = "serve.engine.key.RequireKey"
"""vLLM's `middleware`: its own check leaves paths open that answer as `/v1` does."""

CPU_EXTENSION = "serve.engine.cpu.RequireCorrections"
"""vLLM's `worker_extension_cls` on a CPU: what is wrong in its arithmetic there put right."""

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, MAX_LORA_RANK)
"""The adapter ranks vLLM makes room for."""


@dataclass(frozen=True)
class EnginePlan:
    """What one engine replica runs, and where it may be reached."""

    app: str
    model: ServedModel
    arguments: EngineArguments
    num_gpus: float
    host: str
    key: str
    log_dir: str
    copy: NodeCopy | None = None
    """How a node gets the model that does not see it."""


def vllm_arguments(plan: EnginePlan) -> list[str]:
    """vLLM's command line for a model and its adapters."""
    engine = plan.arguments
    on_cpu = plan.num_gpus == 0
    arguments = ["--model", plan.model.path, "--served-model-name", plan.model.name]
    arguments += ["--dtype", cpu_dtype(engine.dtype) if on_cpu else engine.dtype]
    arguments += ["--max-num-seqs", str(engine.max_num_seqs)]
    arguments += ["--tensor-parallel-size", str(engine.tensor_parallel_size), "--disable-uvicorn-access-log"]
    arguments += ["--shutdown-timeout", str(DRAIN_SECONDS), "--middleware", KEY_MIDDLEWARE]
    if engine.max_model_len is not None:
        arguments += ["--max-model-len", str(engine.max_model_len)]
    arguments += ["--enable-prefix-caching" if engine.enable_prefix_caching else "--no-enable-prefix-caching"]
    if on_cpu or engine.enforce_eager:
        arguments += ["--enforce-eager"]  # on a CPU compilation takes minutes and a C++ compiler
    if on_cpu:
        arguments += ["--worker-extension-cls", CPU_EXTENSION]
    else:
        arguments += ["--gpu-memory-utilization", str(memory_share(engine, plan.num_gpus))]
    cache = engine.kv_cache_memory_bytes or (CPU_KV_CACHE_BYTES if on_cpu else None)
    if cache is not None:
        arguments += ["--kv-cache-memory-bytes", str(cache)]
    if engine.tool_call_parser is not None:
        arguments += ["--enable-auto-tool-choice", "--tool-call-parser", engine.tool_call_parser]
    if engine.reasoning_parser is not None:
        arguments += ["--reasoning-parser", engine.reasoning_parser]
    if plan.model.chat_template_kwargs:  # its template has them, and parsers of reasoning go by them
        arguments += ["--default-chat-template-kwargs", json.dumps(plan.model.chat_template_kwargs)]
    arguments += extra_arguments(engine.extra | overridden(plan.model.path, engine))
    return arguments + (lora_arguments(plan) if plan.model.has_adapters else [])


def overridden(path: str, engine: EngineArguments) -> dict[str, Any]:
    """vLLM's `hf_overrides` that a model needs, beneath the recipe's; empty where it needs none."""
    given = engine.extra.get("hf_overrides") or {}
    given = json.loads(given) if isinstance(given, str) else given  # as vLLM's command line takes it
    overrides = config_overrides(path)
    return {"hf_overrides": overrides | given} if overrides else {}


def memory_share(engine: EngineArguments, num_gpus: float) -> float:
    """vLLM's `gpu_memory_utilization`: of a GPU that engines share, no more than this engine's part."""
    return engine.gpu_memory_utilization * min(1.0, num_gpus / engine.tensor_parallel_size)


def lora_arguments(plan: EnginePlan) -> list[str]:
    """vLLM's arguments for adapters."""
    slots, rank = adapter_room(plan.model, plan.arguments)
    arguments = ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(rank)]
    if plan.model.adapters:
        arguments += ["--lora-modules", *(f"{name}={path}" for name, path in plan.model.adapters.items())]
    return arguments


def adapter_room(model: ServedModel, engine: EngineArguments) -> tuple[int, int]:
    """vLLM's `max_loras` and `max_lora_rank`: what the given adapters need, or what the recipe says for later ones."""
    if model.registry is None:
        rank, slots = max(map(adapter_rank, model.adapters.values())), min(engine.max_loras, len(model.adapters))
    else:
        rank, slots = engine.max_lora_rank, engine.max_loras
    return slots, next((size for size in LORA_RANKS if size >= rank), rank)


def adapter_rank(folder: str) -> int:
    """The rank of an adapter, from its configuration; raises StageError when there is none."""
    path = Path(folder) / "adapter_config.json"
    if not path.is_file():
        raise StageError(f"{path}: no such file; an adapter folder holds it beside adapter_model.safetensors")
    return int(json.loads(path.read_text())["r"])


def cpu_dtype(asked: str) -> str:
    """The number format on a CPU: float32 unless asked otherwise."""
    return "float32" if asked == "auto" else asked


def environment(plan: EnginePlan) -> dict[str, str]:
    """The environment of the engine's process: offline, no reports, its key out of sight of `ps`, no client's key."""
    variables = {
        **{name: value for name, value in child_environment().items() if name != KEYS},
        PARENT: str(os.getpid()),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        KEY: plan.key,
        "VLLM_PLUGINS": "danlu_cpu",
        # Longer than the gateway keeps idle connections: it must be the one that closes them.
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "75",
    }
    if plan.model.registry is not None:
        variables["VLLM_PLUGINS"] += ",lora_filesystem_resolver"
        variables["VLLM_LORA_RESOLVER_CACHE_DIR"] = plan.model.registry
        variables["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] = "1"
    if plan.num_gpus == 0:
        variables |= cpu_environment(plan.arguments.tensor_parallel_size) | {"LD_PRELOAD": preloaded()}
    return variables


def temporary(scratch: str) -> dict[str, str]:
    """A temporary folder of an engine's own; what PyTorch compiles stays where all engines find it."""
    compiled = os.path.join(tempfile.gettempdir(), f"torchinductor-{os.getuid()}")
    return {"TMPDIR": scratch, "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", compiled)}


def preloaded() -> str:
    """The libraries that vLLM preloads on a CPU, in an interpreter that it spawns for its core; ours is a fork.

    PyTorch's OpenMP, so that all libraries share one pool of threads, and an allocator where vLLM carries one
    (vllm/platforms/cpu.py).
    """
    places = {"torch": ("../torch.libs/libgomp*.so*", "lib/libgomp*.so*"), "vllm": ("libs/libtcmalloc*.so*",)}
    libraries = [os.environ["LD_PRELOAD"]] if os.environ.get("LD_PRELOAD") else []
    for package, patterns in places.items():
        spec = importlib.util.find_spec(package)
        folders = (spec.submodule_search_locations if spec else None) or []
        found = sorted(path for folder in folders for pattern in patterns for path in glob.glob(f"{folder}/{pattern}"))
        libraries += [os.path.realpath(path) for path in found[:1]]
    return ":".join(libraries)


def cpu_environment(tensor_parallel_size: int) -> dict[str, str]:
    """OpenMP's and the allocator's environment; Ray's own, one thread for a fraction of a CPU, would make it crawl."""
    variables = {
        "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", HUGE_PAGES),
    }
    if tensor_parallel_size == 1:
        variables["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the computing worker lives in the engine core's process
    return variables
