"""A real server in a process of its own, a recipe that sends it requests, and the stage that does."""

import asyncio
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.answering_server import Behaviour, listen
from pipelines.artifacts.reports.synthesize import SynthesizeReport
from pipelines.artifacts.stage import Inputs, Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.recipe.schema import Recipe
from pipelines.synthesize.grid import Grid
from pipelines.synthesize.stage import SynthesizeStage, grid_of
from tests.outputs import finished

PROJECT = Path(__file__).parents[3]


class Server:
    """A running answering server and what it saw."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}/v1"

    def log(self) -> dict[str, Any]:
        """Its requests as [time, digest of the prompt, outcome], and the most that were in flight."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/log") as answer:
            log: dict[str, Any] = json.load(answer)
        return log

    def outcomes(self) -> list[str]:
        """How it answered each request."""
        return [outcome for _, _, outcome in self.log()["requests"]]


@contextmanager
def running(delay: float, faults: dict[str, float]) -> Iterator[Server]:
    command = [sys.executable, "-m", "benchmarks.answering_server"]
    command += ["--delay", str(delay), "--faults", json.dumps(faults)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT)
    assert process.stdout
    try:
        yield Server(int(process.stdout.readline().split()[1]))
    finally:
        process.kill()
        process.communicate()


def recipe(url: str, cells: int = 4, **section: Any) -> Recipe:
    """A grid of `cells` times two styles times `samples_per_cell`."""
    endpoint = {"base_url": url, "max_in_flight": 32, **section.pop("endpoint", {})}
    return Recipe.model_validate(
        {
            "name": "t",
            "synthesize": {
                "model": "m",
                "endpoints": [endpoint],
                "dimensions": {"name": [f"人{number}" for number in range(cells)]},
                "styles": {
                    "正常": {"template": "祝{name}"},
                    "严肃": {"template": "敬祝{name}", "query_suffix": ",严肃风格"},
                },
                "queries": ["祝{name}"],
                "query_system": "送祝福大师",
                **section,
            },
        }
    )


def place(folder: Path, name: str = "f") -> Place:
    """Where the stage writes."""
    return Place(Workspace(str(folder / "w")), "synthesize", name)


def stage(what: Recipe) -> SynthesizeStage:
    """The recipe's stage."""
    assert what.synthesize
    return SynthesizeStage(what.synthesize, what.serve, what.seed)


def grid(what: Recipe) -> Grid:
    """The recipe's grid."""
    assert what.synthesize
    return grid_of(what.synthesize, what.seed)


def run(what: Recipe, where: Place) -> Output[SynthesizeReport]:
    """Run the stage, and mark it complete."""
    return finished(where, stage(what).run(where, Inputs()))


@contextmanager
def in_thread(behaviour: Behaviour) -> Iterator[str]:
    """A server with this behaviour in a thread; yields its address."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(listen(behaviour), loop).result()
    yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


def most_in_a_minute(times: list[float]) -> int:
    """The most of these moments, in order, that any sliding minute holds."""
    first = most = 0
    for last, at in enumerate(times):
        while times[first] < at - 60:
            first += 1
        most = max(most, last - first + 1)
    return most
