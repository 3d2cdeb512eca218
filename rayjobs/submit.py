"""A recipe as a job on a Ray cluster: what it names goes along, its log and its exit code come back.

The cluster's nodes have the project installed. What travels is the recipe and the files that it names by relative
paths, each at the same place below the job's folder, so that the recipe is read there as it stands.
"""

import asyncio
import glob
import logging
import os
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipelines.artifacts.workspace import Workspace
from pipelines.clean.custom_source import source_of
from pipelines.direct_http import is_loopback, without_proxy
from pipelines.errors import TERMINATED, InputError, Problem, RecipeError, StageError
from pipelines.progress import STEADY_INTERVAL, say
from pipelines.recipe.paths import paths_read, paths_written
from pipelines.recipe.schema import Recipe
from rayjobs.cluster import REACH_SECONDS

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
"""Where `ray dashboard` brings a cluster's job server to this machine, and where one that runs here has it."""
MAX_BYTES = 200 << 20
"""Of the files that travel with a job; Ray keeps them in the memory of the head and copies them to every node."""
ANSWER_SECONDS = 60
"""How long a cluster may say nothing when it is asked."""
LOST_SECONDS = 600
"""How long a cluster that does not answer is asked again."""
ADDRESSES = ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")
"""Environment variables that may name a cluster; Ray's client puts them before the address that it is given."""
NAME, STAGE, WORKSPACE = "danlu_recipe", "danlu_stage", "danlu_workspace"
"""What a job's metadata tell of it."""


@dataclass(frozen=True)
class Job:
    """A job of ours, as the cluster knows it; times in seconds since 1970."""

    name: str
    recipe: str
    stage: str
    workspace: str
    state: str
    began: float | None
    ended: float | None
    exit_code: int | None
    message: str

    @property
    def goes_on(self) -> bool:
        """Whether it has not ended."""
        return self.state in ("PENDING", "RUNNING")


class Jobs:
    """The jobs of one cluster. Raises StageError where it cannot be reached, or refuses the token."""

    def __init__(self, address: str | None) -> None:
        environment = (os.environ.get(name, "") for name in ADDRESSES)
        named = (value for value in environment if value.startswith(("http://", "https://")))
        self.address = (address or next(named, DEFAULT_ADDRESS)).rstrip("/")
        host, port = _host_and_port(self.address)
        if is_loopback(self.address):
            os.environ.update(without_proxy(os.environ))
        try:
            socket.create_connection((host, port), REACH_SECONDS).close()
        except OSError as error:
            raise StageError(
                f"no cluster takes jobs at {self.address} ({error}); `ray dashboard cluster.yaml` brings that of a "
                "cluster's launcher here, and --address or RAY_API_SERVER_ADDRESS name another"
            ) from error
        with self._told():
            from ray.exceptions import AuthenticationError
            from ray.job_submission import JobSubmissionClient

            class Client(JobSubmissionClient):  # type: ignore[misc,unused-ignore]
                def _do_request(self, *given: Any, **further: Any) -> Any:  # which would wait forever
                    return super()._do_request(*given, **{"timeout": ANSWER_SECONDS, **further})

            for module in ("dashboard.modules.dashboard_sdk", "dashboard.modules.job.sdk", "_private.runtime_env"):
                logging.getLogger(f"ray.{module}").setLevel(logging.WARNING)  # each sets its own level
            others = {name: os.environ.pop(name) for name in ADDRESSES if name in os.environ}
            try:
                self._client = Client(self.address)
            except (AuthenticationError, UnicodeError):
                raise
            except (RuntimeError, KeyError, TypeError, ValueError) as error:  # what it reads of the answer is not there
                what = str(error).splitlines()[0] if isinstance(error, RuntimeError) else "no version is said"
                raise StageError(f"{self.address}: no Ray dashboard of today answers there ({what})") from error
            finally:
                os.environ.update(others)

    def submit(self, folder: Path, command: list[str], metadata: dict[str, str]) -> str:
        """Start a command in a copy of the folder; returns the job's name."""
        name = f"{metadata[NAME]}-{time.strftime('%Y%m%d-%H%M%S')}"
        with self._told():
            return self._client.submit_job(
                entrypoint=shlex.join(command),
                submission_id=name,
                runtime_env={"working_dir": str(folder)},
                metadata=metadata,
            )

    def all(self) -> list[Job]:
        """Those of ours, the newest first."""
        with self._told():
            found = [detail for detail in self._client.list_jobs() if NAME in (detail.metadata or {})]
        return sorted(map(_job, found), key=lambda job: job.began or 0, reverse=True)

    def find(self, wanted: str) -> Job:
        """The job of that name, or the newest of the recipe of that name; InputError where there is none."""
        there = self.all()
        for job in there:
            if wanted in (job.name, job.recipe):
                return job
        known = ", ".join(job.name for job in there[:5]) or "none"
        raise InputError(f"no job {wanted!r} on {self.address}; the newest: {known}")

    def log(self, name: str) -> str:
        """All that a job has printed so far."""
        with self._told():
            return self._client.get_job_logs(name)

    def stop(self, name: str) -> None:
        """Have a job end, with SIGTERM first."""
        with self._told():
            self._client.stop_job(name)

    async def follow(self, name: str, *, printing: bool) -> Job:
        """Wait until a job has ended; print what it prints, and a line of our own where it says nothing for long."""
        log = _Log(self._client, name)
        reader = asyncio.create_task(log.show()) if printing else None
        began = said = time.monotonic()
        try:
            while (job := await self._reached(name)).goes_on:
                await asyncio.sleep(1.0)
                if time.monotonic() - max(said, log.spoke) >= STEADY_INTERVAL:
                    said = time.monotonic()
                    say(f"  {name}: {job.state.lower()}, {(said - began) / 60:.1f} min")
            if reader is not None:
                await asyncio.wait_for(reader, REACH_SECONDS)
        except TimeoutError:
            say(f"  the end of the log did not come; danlu logs {name}")
        finally:
            if reader is not None:
                reader.cancel()
        return job

    async def _reached(self, name: str) -> Job:
        """A job of that name; asked again while the way to the cluster is broken, since the job goes on meanwhile."""
        lost: float | None = None
        while True:
            try:
                with self._told():
                    return _job(await asyncio.to_thread(self._client.get_job_info, name))
            except StageError as error:
                if lost is None:
                    lost = time.monotonic()
                    say(f"  {error}; trying again, the job may go on meanwhile")
                elif time.monotonic() - lost > LOST_SECONDS:
                    raise
            await asyncio.sleep(2.0)

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Tell what the client raises in one line."""
        import ray.exceptions

        try:
            yield
        except ray.exceptions.AuthenticationError as error:
            raise StageError(f"{self.address} refuses the token: {str(error).splitlines()[0]}") from error
        except UnicodeError as error:
            raise InputError("RAY_AUTH_TOKEN, or its file: a token has no other characters than ASCII") from error
        except (RuntimeError, ConnectionError, OSError) as error:
            raise StageError(f"{self.address}: {str(error).splitlines()[0] if str(error) else error!r}") from error


def _host_and_port(address: str) -> tuple[str, int]:
    try:
        parts = urlsplit(address)
        if parts.scheme in ("http", "https") and parts.hostname:
            return parts.hostname, parts.port or 8265
    except ValueError:  # a port that is none, half a bracket
        pass
    raise InputError(f"--address {address}: a cluster takes jobs at http://HOST:8265, that of its dashboard")


class _Log:
    """What a job prints, as it comes. A connection that breaks is made again, and nothing is shown twice."""

    def __init__(self, client: Any, name: str) -> None:
        self._client, self._name = client, name
        self.spoke = time.monotonic()

    async def show(self) -> None:
        """Print it to its end."""
        import aiohttp

        shown = 0
        while True:
            at = 0  # every connection begins with the first line
            try:
                async for text in self._client.tail_job_logs(self._name):
                    new, at = text[max(shown - at, 0) :], at + len(text)
                    if new:
                        print(new, end="", flush=True)
                        self.spoke = time.monotonic()
                    shown = max(shown, at)
                return
            except (RuntimeError, aiohttp.ClientError):
                await asyncio.sleep(1.0)


def _job(detail: Any) -> Job:
    metadata = detail.metadata
    return Job(
        detail.submission_id,
        metadata[NAME],
        metadata.get(STAGE, ""),
        metadata.get(WORKSPACE, ""),
        str(detail.status.value),
        detail.start_time / 1000 if detail.start_time else None,
        detail.end_time / 1000 if detail.end_time else None,
        detail.driver_exit_code,
        detail.message or "",
    )


def start(jobs: Jobs, recipe: Recipe, file: Path, overrides: list[str], stage: str | None, workspace: Workspace) -> str:
    """Start the recipe as a job, with the files that it names; returns the job's name.

    Raises RecipeError, naming key and path, for files that can neither travel nor be meant for the cluster, InputError
    where a job of this recipe in this workspace goes on already.
    """
    for job in jobs.all():
        if job.goes_on and (job.recipe, job.workspace) == (recipe.name, workspace.root):
            raise InputError(
                f"{recipe.name} in {workspace.root} goes on already, as {job.name}; danlu logs --follow {job.name} "
                f"shows it, danlu stop {job.name} ends it"
            )
    with tempfile.TemporaryDirectory(prefix="danlu-job-") as folder:
        pack(recipe, file, Path(folder))
        command = command_of(file, overrides, stage, workspace)
        metadata = {NAME: recipe.name, STAGE: stage or "", WORKSPACE: workspace.root, "danlu_version": version("danlu")}
        return jobs.submit(Path(folder), command, metadata)


def command_of(file: Path, overrides: list[str], stage: str | None, workspace: Workspace) -> list[str]:
    """What a job runs, in the folder that `pack` filled."""
    command = ["python", "-P", "-m", "rayjobs", "run", file.name, *overrides, "--workspace", workspace.root]
    return command + (["--to", stage] if stage else [])


def pack(recipe: Recipe, file: Path, folder: Path) -> None:
    """Put the recipe's file and what it names by relative paths into a folder, at the same places."""
    written = paths_written(recipe)
    problems = [
        Problem(key, f"{path} would be written to the job's own folder, and lost; give a URL or an absolute path")
        for key, path in written.items()
        if _travels(path)
    ]
    shutil.copy(file, folder / file.name)
    room = MAX_BYTES
    for key, path in paths_read(recipe).items():
        if key in written:
            continue
        if not _travels(path):
            if "://" not in path:
                say(f"  {key}: {path} is read where the job runs, and must be there on every node")
            continue
        if path.startswith("~") or ".." in Path(path).parts:
            problems.append(Problem(key, f"{path} lies outside of this folder, from which files travel with a job"))
            continue
        found = _files(path)
        room -= sum(one.stat().st_size for one in found)
        if not found:
            problems.append(Problem(key, f"{path}: no such file; it would travel with the job"))
        elif room < 0:
            message = f"with {path} more than {MAX_BYTES >> 20} MiB would travel; put it where the nodes see it"
            problems.append(Problem(key, f"{message}, and give its URL or absolute path"))
        elif file.name in (str(one) for one in found):
            problems.append(Problem(key, f"{path} has the name that the recipe gets there; rename one of them"))
        else:
            for one in found:
                (folder / one.parent).mkdir(parents=True, exist_ok=True)
                shutil.copy(one, folder / one)
    if problems:
        raise RecipeError(recipe.name, problems)


def _travels(path: str) -> bool:
    """Whether a path is one of this machine: neither a URL nor absolute."""
    return "://" not in path and not os.path.isabs(path)


def _files(path: str) -> list[Path]:
    """The files that a relative path or pattern names, those of folders included.

    With Python's, the modules and packages beside it that it imports.
    """
    named = [Path(path)] if os.path.exists(path) else [Path(one) for one in glob.glob(path, recursive=True)]
    python = [one for one in named if one.suffix == ".py"]
    beside = [one.parent / helper for one in python for helper, _ in source_of(str(one)).helpers]
    inside = [other for one in named if one.is_dir() for other in one.rglob("*")]
    return sorted({one for one in (*named, *beside, *inside) if one.is_file()})


def exit_code(job: Job) -> int:
    """What a command ends with that waited for a job: the job's own exit code, SIGTERM's where it was stopped."""
    if job.state == "SUCCEEDED":
        return 0
    if job.state == "STOPPED":
        return TERMINATED
    if job.exit_code is None or job.exit_code == 0:
        return 1
    return job.exit_code if job.exit_code > 0 else 128 - job.exit_code


def closing_line(job: Job) -> str:
    """How a job ended, and what goes on from there."""
    where = f"{job.name} in {job.workspace}"
    if job.state == "SUCCEEDED":
        return f"{where}: done"
    again = "what is finished is kept, and the same danlu submit goes on from there"
    if job.state == "STOPPED":
        return f"{where}: stopped; {again}"
    if job.exit_code:
        return f"{where}: ended with exit code {job.exit_code}; {again}"
    return f"{where}: {' '.join(job.message.split())[:500]}"
