"""What requests cost in memory while the gateway holds them for the successor of an engine that is deployed anew.

    python -m benchmarks.held [--quick] [--rounds 3] [--peer none]

As many requests as the gateway's usual bounds admit are sent while it has no engine, then the engine is given back and
each must be answered. Memory is the resident set of the gateway's process, a fresh one for every size and round, before
the requests come, with all of them held, and after they are answered. Beside it stands the least that holding takes,
the requests' bodies. The last line is one JSON object.
"""

import argparse
import asyncio
import json
import re
import statistics
import sys
import time
import urllib.request
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.gateway_roles import ANSWER, KEY, MODEL, role
from benchmarks.http_load import Load, ask_all, request
from pipelines.recipe.serve import Limits
from pipelines.report.page import environment

KIB, MIB = 1 << 10, 1 << 20
BODY_BYTES = (KIB, 4 * KIB, 64 * KIB)
HEADLINE = 4 * KIB
WARM_UP = 64
SETTLE_SECONDS = 0.5
GIVE_UP_SECONDS = 60.0

HELD = re.compile(r"^danlu_requests_(?:in_flight|queued)\{[^}]*\} ([0-9.]+)$", re.MULTILINE)


def main() -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few requests: checks the benchmark, not the memory")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", choices=["none"], default="none", help="no other server holds requests")
    options = parser.parse_args()
    count = 64 if options.quick else Limits().max_in_flight + Limits().max_queued
    rounds = 1 if options.quick else options.rounds
    runs = {f"{size // KIB} KiB": _median([held(count, size) for _ in range(rounds)]) for size in BODY_BYTES}
    _print(runs)
    print(json.dumps(summary(runs), ensure_ascii=False))
    return 0


def summary(runs: dict[str, Any]) -> dict[str, Any]:
    """The last line: the headline is memory per held request of 4 KiB, beside its body alone."""
    ours = runs[f"{HEADLINE // KIB} KiB"]["bytes_each"]
    return {
        "name": "held",
        "ours": ours,
        "peer": HEADLINE,
        "unit": "bytes/request",
        "ratio": round(HEADLINE / ours, 3),
        "equal": all(run["equal"] for run in runs.values()),
        "runs": runs,
        "environment": environment().model_dump(),
    }


def held(count: int, size: int) -> dict[str, Any]:
    """Memory in bytes before, with and after `count` held requests whose bodies have `size` bytes."""
    with role("engine") as engine, role("held", f"http://127.0.0.1:{engine}") as port:
        asyncio.run(ask_all(port, [_request(n, HEADLINE) for n in range(WARM_UP)], WARM_UP))
        before = _tell(port, "rss")
        _tell(port, "hold")
        load, during = asyncio.run(_hold(port, [_request(n, size) for n in range(count)]))
        time.sleep(SETTLE_SECONDS)
        after = _tell(port, "rss")
    answered = load.statuses == {200: count} and load.bodies == [ANSWER] * count
    each = (during - before) / count
    return {"requests": count, "before": before, "with": during, "after": after, "each": each, "equal": answered}


async def _hold(port: int, requests: list[bytes]) -> tuple[Load, int]:
    """Ask over a connection for each, and look at the memory when all are held; then let them be answered."""
    asking = asyncio.create_task(ask_all(port, requests, len(requests)))
    until = time.monotonic() + GIVE_UP_SECONDS
    while (waiting := await asyncio.to_thread(_waiting, port)) < len(requests):
        if asking.done() or time.monotonic() > until:
            raise SystemExit(f"the gateway holds {waiting} of {len(requests)} requests")
        await asyncio.sleep(0.1)
    await asyncio.sleep(SETTLE_SECONDS)
    during = await asyncio.to_thread(_tell, port, "rss")
    await asyncio.to_thread(_tell, port, "release")
    return await asking, during


def _request(number: int, size: int) -> bytes:
    """A request whose body has exactly `size` bytes."""
    without = len(json.dumps({"model": MODEL, "max_tokens": 16, "prompt": f"{number} "}))
    body = {"model": MODEL, "max_tokens": 16, "prompt": f"{number} " + "x" * (size - without)}
    return request("/v1/completions", json.dumps(body).encode(), KEY)


def _tell(port: int, what: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{what}", timeout=10) as answer:
        return int(json.load(answer)["bytes"])


def _waiting(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return round(sum(map(float, HELD.findall(answer.read().decode()))))


def _median(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The medians of all rounds, in MiB, and bytes per request."""
    middle = {key: statistics.median(run[key] for run in found) for key in ("before", "with", "after", "each")}
    return {
        "requests": found[0]["requests"],
        **{f"{key}_mib": round(middle[key] / MIB, 1) for key in ("before", "with", "after")},
        "bytes_each": round(middle["each"]),
        "each_round": [round(run["each"]) for run in found],
        "equal": all(run["equal"] for run in found),
    }


def _print(runs: dict[str, Any]) -> None:
    table = Table("body", "requests held", "MiB before", "with them", "after", "bytes each", "all answered", box=None)
    for size, run in runs.items():
        memory = [f"{run[key]:g}" for key in ("before_mib", "with_mib", "after_mib")]
        table.add_row(size, str(run["requests"]), *memory, str(run["bytes_each"]), "yes" if run["equal"] else "no")
    Console().print(table)


if __name__ == "__main__":
    sys.exit(main())
