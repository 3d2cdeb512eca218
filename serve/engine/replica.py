"""One engine replica: a Ray Serve deployment that keeps vLLM's own server running as a child process."""

import asyncio
import glob
import importlib.util
import json
import logging
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from ray import serve as ray_serve

from pipelines.errors import StageError
from pipelines.kill_with_parent import PARENT
from pipelines.models.served import ServedModel
from pipelines.recipe.serve import MAX_LORA_RANK
from pipelines.recipe.serve import Engine as EngineArguments
from serve import discovery as directory
from serve.engine.key import KEY
from serve.engine.scratch import short_folder
from serve.gateway.auth import KEYS

logger = logging.getLogger("ray.serve")

CPU_KV_CACHE_BYTES = 1 << 30
"""Key-value cache of a CPU engine where the recipe names none: vLLM would ask for nine tenths of the machine."""

HUGE_PAGES = "glibc.malloc.hugetlb=1"
"""What `GLIBC_TUNABLES` tells the allocator of a CPU engine: ask for huge pages, where the system grants them to those
who ask. The products of matrices then look fewer addresses up."""

DRAIN_SECONDS = 60
"""How long an engine that is told to stop may finish the requests it has."""

IN_FLIGHT = "in_flight"
"""The name of what the engines report for autoscaling."""

REQUESTS = re.compile(rb"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([0-9.e+]+)", re.MULTILINE)

KEY_MIDDLEWARE = "serve.engine.key.RequireKey"
"""vLLM's `middleware`: its own check leaves paths open that answer as `/v1` does."""

CPU_LORA_EXTENSION = "serve.engine.cpu_lora.RequireCpuLora"
"""vLLM's `worker_extension_cls` on a CPU: base and adapter requests of one batch kept apart."""

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


class EngineReplica:
    """vLLM's server as a child process, announced in the directory while it lives.

    When the child ends, the replica ends too, and Ray Serve starts another.
    """

    def __init__(self, plan: EnginePlan) -> None:
        self._plan = replace(plan, host=plan.host or node_address())
        self._replica = ray_serve.get_replica_context().replica_id.unique_id
        self._started = threading.Event()
        self._error: Exception | None = None
        self._announcing = threading.Lock()
        self._stopping = False
        self._url = ""
        self._process: subprocess.Popen[bytes] | None = None
        # The child's death signal follows the thread that starts it, so one thread owns the child for life.
        self._thread = threading.Thread(target=self._own_the_child, name="engine", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            directory.report_failure(plan.app, str(self._error))
            raise self._error

    async def check_health(self) -> None:
        """Called by Ray Serve, in its event loop; raises when the engine's process is gone."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"the engine of {self._plan.model.name} has ended")

    def __del__(self) -> None:
        """Called by Ray Serve when it stops the replica: take no more requests, finish those in hand."""
        if self._process is None or self._process.poll() is not None:
            return
        with self._announcing:
            self._stopping = True
            directory.retire(self._plan.app, self._replica, self._plan.model.name)
            directory.withdraw(self._plan.app, self._replica)
        time.sleep(2 * directory.BEAT_SECONDS)  # until the gateway has seen it
        self._process.send_signal(signal.SIGTERM)
        self._thread.join()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve, which sees none of the requests itself: those the engine computes or keeps waiting."""
        return {IN_FLIGHT: await asyncio.to_thread(requests_at, self._url)}

    def _own_the_child(self) -> None:
        log = Path(self._plan.log_dir) / f"engine-{self._plan.model.name}-{self._replica}.log"
        with short_folder() as scratch:
            self._run_the_child(log, scratch)
        if self._process is None or self._error is not None or self._stopping:
            return
        logger.error("engine of %s ended with code %s, see %s", self._plan.model.name, self._process.returncode, log)
        os._exit(1)  # the quickest way for Ray Serve to notice and to start another

    def _run_the_child(self, log: Path, scratch: str) -> None:
        try:
            self._process, port = start_process(self._plan, log, scratch)
            self._url = f"http://{self._plan.host}:{port}"
            wait_until_healthy(self._process, self._url)
        except Exception as error:  # raised again where Ray Serve waits
            name = self._plan.model.name
            known = isinstance(error, StageError)
            self._error = StageError(f"the engine of {name} {error}, see {log}\n{tail(log)}") if known else error
            return
        finally:
            self._started.set()
        self._announce_while_alive(self._process, self._url)

    def _announce_while_alive(self, process: subprocess.Popen[bytes], url: str) -> None:
        ended, beat = end_of(process), 0
        while not ended.is_set():
            beat += 1
            record = directory.EngineRecord(self._replica, self._plan.model.name, url, beat)
            with self._announcing:
                if not self._stopping:
                    directory.announce(self._plan.app, record)
            ended.wait(directory.BEAT_SECONDS)
        directory.withdraw(self._plan.app, self._replica)


def node_address() -> str:
    """This node's address in the cluster."""
    return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]


def end_of(process: subprocess.Popen[bytes]) -> threading.Event:
    """An event that is set when a process has ended; `Popen.wait` with a limit looks twenty times a second instead."""
    ended = threading.Event()

    def wait() -> None:
        process.wait()
        ended.set()

    threading.Thread(target=wait, name="end", daemon=True).start()
    return ended


def start_process(plan: EnginePlan, log: Path, scratch: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start vLLM's server, its output going to `log`; returns the process and the port it listens on.

    It leaves sockets behind in its temporary folder when it is killed: `scratch`, which the caller removes after it.

    Raises StageError when it ends before it has opened its port.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    command = [sys.executable, "-m", "serve.engine.server", "--report-fd", str(writer), "--host", plan.host, "--"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command + vllm_arguments(plan),
            env={**environment(plan), **temporary(scratch)},
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
        )
    os.close(writer)
    with os.fdopen(reader) as pipe:
        report = pipe.read()
    if not report:
        raise StageError(f"ended with code {process.wait()} before it opened a port")
    return process, int(json.loads(report)["port"])


def requests_at(url: str) -> float:
    """Requests that a vLLM server computes or keeps waiting, from its metrics."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as answer:
        return sum(map(float, REQUESTS.findall(answer.read())))


def wait_until_healthy(process: subprocess.Popen[bytes], url: str) -> None:
    """Return when vLLM has loaded the model; raises StageError when its process ends before that."""
    while process.poll() is None:
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=2):
                return
        except OSError:  # refused, reset or silent: not there yet
            time.sleep(0.05)
    raise StageError(f"ended with code {process.returncode} while it loaded the model")


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of an engine's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""


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
    if not on_cpu:
        arguments += ["--gpu-memory-utilization", str(memory_share(engine, plan.num_gpus))]
    cache = engine.kv_cache_memory_bytes or (CPU_KV_CACHE_BYTES if on_cpu else None)
    if cache is not None:
        arguments += ["--kv-cache-memory-bytes", str(cache)]
    return arguments + (lora_arguments(plan) if plan.model.has_adapters else [])


def memory_share(engine: EngineArguments, num_gpus: float) -> float:
    """vLLM's `gpu_memory_utilization`: of a GPU that engines share, no more than this engine's part."""
    return engine.gpu_memory_utilization * min(1.0, num_gpus / engine.tensor_parallel_size)


def lora_arguments(plan: EnginePlan) -> list[str]:
    """vLLM's arguments for adapters."""
    slots, rank = adapter_room(plan.model, plan.arguments)
    arguments = ["--enable-lora", "--max-loras", str(slots), "--max-lora-rank", str(rank)]
    if plan.model.adapters:
        arguments += ["--lora-modules", *(f"{name}={path}" for name, path in plan.model.adapters.items())]
    if plan.num_gpus == 0:
        arguments += ["--worker-extension-cls", CPU_LORA_EXTENSION]
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
    project = str(Path(__file__).resolve().parents[1])
    variables = {
        **{name: value for name, value in os.environ.items() if name != KEYS},
        PARENT: str(os.getpid()),
        "PYTHONPATH": os.pathsep.join(filter(None, [project, os.environ.get("PYTHONPATH")])),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        KEY: plan.key,
        "VLLM_PLUGINS": "danlu_cpu_lora",
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
