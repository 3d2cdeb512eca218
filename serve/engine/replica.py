"""One engine replica: a Ray Serve deployment that keeps vLLM's own server running as a child process."""

import asyncio
import json
import logging
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import ray
from ray import serve as ray_serve

from pipelines.direct_http import fetch
from pipelines.errors import StageError
from serve import discovery
from serve.engine.command import EnginePlan, environment, temporary, vllm_arguments
from serve.engine.scratch import short_folder

logger = logging.getLogger("ray.serve")

IN_FLIGHT = "in_flight"
"""The name of what the engines report for autoscaling."""

SILENT_SECONDS = 60.0
"""After so long without one successful announcement an engine is ill, and Ray Serve starts another."""

PORT_SECONDS = 300.0
"""How long an engine's process may take to open its port, which it does before it loads vLLM."""

LOAD_SECONDS = 3600.0
"""How long vLLM may load a model, from its start to its first healthy answer."""

REQUESTS = re.compile(rb"^vllm:num_requests_(?:running|waiting)\{[^}]*\} ([0-9.e+]+)", re.MULTILINE)


class EngineReplica:
    """vLLM's server as a child process, announced by `discovery` while it lives.

    When the child ends, the replica ends too, and Ray Serve starts another.
    """

    def __init__(self, plan: EnginePlan) -> None:
        self._plan = replace(plan, host=plan.host or node_address())
        self._replica = ray_serve.get_replica_context().replica_id.unique_id
        self._started = threading.Event()
        self._error: Exception | None = None
        self._announcing = threading.Lock()
        self._stopping = False
        self._announced = time.monotonic()
        self._url = ""
        self._process: subprocess.Popen[bytes] | None = None
        # The child's death signal follows the thread that starts it, so one thread owns the child for life.
        self._thread = threading.Thread(target=self._own_the_child, name="engine", daemon=True)
        self._thread.start()
        self._started.wait()
        if self._error is not None:
            with logged("cannot report why the engine did not start"):
                discovery.report_failure(plan.app, str(self._error))
            raise self._error

    async def check_health(self) -> None:
        """Called by Ray Serve, in its event loop; raises when the engine's process is gone, or no one can find it."""
        if self._process is None or self._process.poll() is not None:
            raise RuntimeError(f"the engine of {self._plan.model.name} has ended")
        silent = time.monotonic() - self._announced
        if silent > SILENT_SECONDS and not self._stopping:
            raise RuntimeError(f"the engine of {self._plan.model.name} was not announced for {silent:.0f} s")

    def __del__(self) -> None:
        """Called by Ray Serve when it stops the replica: take no more requests, finish those in hand."""
        if self._process is None or self._process.poll() is not None:
            return
        with self._announcing:
            self._stopping = True
            with logged("cannot say that the engine stops"):
                discovery.retire(self._plan.app, self._replica, self._plan.model.name)
                discovery.withdraw(self._plan.app, self._replica)
        time.sleep(2 * discovery.BEAT_SECONDS)  # until the gateway has seen it
        self._process.send_signal(signal.SIGTERM)
        self._thread.join()

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Called by Ray Serve, which sees none of the requests itself: those the engine computes or keeps waiting."""
        return {IN_FLIGHT: await asyncio.to_thread(requests_at, self._url)}

    def _own_the_child(self) -> None:
        log = Path(self._plan.log_dir) / f"engine-{self._plan.model.name}-{self._replica}.log"
        with short_folder() as scratch, ExitStack() as held:
            self._run_the_child(log, scratch, held)
        if self._process is None or self._error is not None or self._stopping:
            return
        logger.error("engine of %s ended with code %s, see %s", self._plan.model.name, self._process.returncode, log)
        os._exit(1)  # the quickest way for Ray Serve to notice and to start another

    def _run_the_child(self, log: Path, scratch: str, held: ExitStack) -> None:
        try:
            if self._plan.copy is not None:
                held.enter_context(self._plan.copy.here())
            self._process, port = start_process(self._plan, log, scratch)
            self._url = f"http://{self._plan.host}:{port}"
            wait_until_healthy(self._process, self._url)
        except Exception as error:  # raised again where Ray Serve waits
            name = self._plan.model.name
            known = isinstance(error, StageError)
            self._error = StageError(f"the engine of {name} {error}, see {log}\n{tail(log)}") if known else error
            return
        finally:
            self._announced = time.monotonic()  # Ray Serve asks for its health at once, however long it loaded
            self._started.set()
        self._announce_while_alive(self._process, self._url)

    def _announce_while_alive(self, process: subprocess.Popen[bytes], url: str) -> None:
        ended, beat = end_of(process), 0
        length = max_model_len(url, self._plan.key)
        while not ended.is_set():
            beat += 1
            record = discovery.EngineRecord(self._replica, self._plan.model.name, url, beat, length)
            with self._announcing, logged("cannot announce the engine, trying again"):
                if not self._stopping:
                    discovery.announce(self._plan.app, record)
                self._announced = time.monotonic()
            ended.wait(discovery.BEAT_SECONDS)
        with logged("cannot withdraw the engine"):
            discovery.withdraw(self._plan.app, self._replica)


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

    Raises StageError when it ends before it has opened its port, or opens none within `PORT_SECONDS`.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    reader, writer = os.pipe()
    command = [sys.executable, "-P", "-m", "serve.engine.server", "--report-fd", str(writer), "--host", plan.host]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--", *vllm_arguments(plan)],
            env={**environment(plan), **temporary(scratch)},
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=(writer,),
        )
    os.close(writer)
    with os.fdopen(reader) as pipe:
        if not select.select([pipe], [], [], PORT_SECONDS)[0]:
            process.kill()
            raise StageError(f"opened no port within {PORT_SECONDS:g} s")
        report = pipe.read()
    if not report:
        raise StageError(f"ended with code {process.wait()} before it opened a port")
    return process, int(json.loads(report)["port"])


def requests_at(url: str) -> float:
    """Requests that a vLLM server computes or keeps waiting, from its metrics."""
    return sum(map(float, REQUESTS.findall(fetch(f"{url}/metrics", timeout=5))))


def max_model_len(url: str, key: str) -> int | None:
    """Tokens of prompt and answer that a vLLM server takes, from its list of models; None where it does not say."""
    try:
        models = json.loads(fetch(f"{url}/v1/models", timeout=10, headers={"Authorization": f"Bearer {key}"}))["data"]
        return int(models[0]["max_model_len"])
    except (OSError, ValueError, LookupError, TypeError):
        logger.exception("the engine at %s does not say how long its context is", url)
        return None


@contextmanager
def logged(what: str) -> Iterator[None]:
    """Log an exception and go on: Ray's store is away for a moment, and the engine is well."""
    try:
        yield
    except Exception:
        logger.exception(what)


def wait_until_healthy(process: subprocess.Popen[bytes], url: str, timeout: float = LOAD_SECONDS) -> None:
    """Return when vLLM has loaded the model; raises StageError when its process ends before that, or is too slow."""
    until = time.monotonic() + timeout
    while process.poll() is None:
        try:
            fetch(f"{url}/health", timeout=2)
            return
        except OSError as error:  # refused, reset or silent: not there yet
            if time.monotonic() > until:
                process.kill()
                raise StageError(f"did not answer at {url}/health within {timeout:g} s ({error})") from None
            time.sleep(0.05)
    raise StageError(f"ended with code {process.returncode} while it loaded the model")


def tail(log: Path, lines: int = 15) -> str:
    """The last lines of an engine's log."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:]) if log.exists() else ""
