"""Which Ray the work runs on: the cluster that is named, or one of our own on this machine."""

import logging
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from types import FrameType, TracebackType
from typing import Any

import psutil

from pipelines.clean_up import clean_up
from pipelines.errors import TERMINATED, InputError, StageError
from pipelines.kill_with_parent import import_path
from pipelines.owned_folder import owned_folder, sweep
from pipelines.progress import say, waiting

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_V2": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONSAFEPATH": "1",
    "RAY_task_oom_retries": "5",
}
"""Environment of every process we start: nothing is reported anywhere, progress is shown once, by us, what the current
folder holds is not imported, whatever its name, and what memory is too small for is not tried for ever."""

SELDOM = {
    "RAY_SERVE_CONTROL_LOOP_INTERVAL_S": "1",
    "RAY_SERVE_METRICS_EXPORT_INTERVAL_MS": "10000",
    "REPORTER_UPDATE_INTERVAL_MS": "60000",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_raylet_check_gc_period_milliseconds": "1000",
    "RAY_object_manager_timer_freq_ms": "1000",
    "RAY_local_fs_monitor_interval_ms": "1000",
}
"""Environment of a Ray of our own, which otherwise looks after itself so often that an engine on two cores feels it.

Events of tasks, statistics of event loops and metrics are for a dashboard, which a Ray of our own does not have.
"""

ALONE = {
    "RAY_API_SERVER_ADDRESS": "http://127.0.0.1:0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
"""Environment of a Ray of our own, beside which others may run on this machine, and which no other machine reaches.

The second has Ray take 127.0.0.1 for its node's address, and listen nowhere else; despite its name it does so on Linux.
For the first: Ray Train asks a dashboard whether its controller lives (`get_address_for_submission_client` in
ray/dashboard/utils.py), and finds that of another Ray where ours has none. That one knows no such actor, and Ray Train
then takes the workers' placement group away. An address at which nothing can answer makes it go on. The third: nobody
drains the only node, and the actor that would look out for it takes two seconds of a core to start.
"""

START_SECONDS = 300
"""What Ray's processes may take to start on a busy machine; Ray itself waits for 30 s."""
STARTS = 3
"""How often they are started at most."""
STOP_SECONDS = 60
"""What they may take to stop."""
LEAVE_SECONDS = 5
"""What workers may take to end after them; one whose own end hangs is killed."""
REACH_SECONDS = 10
"""What a cluster may take to answer at its address."""
WATCH_SECONDS = 1.0
ROOM = 64 << 20
"""Bytes that a Ray of our own must find free for its temporary files: its logs, its sockets and what it spills."""
LITTLE = 4 << 20
"""Bytes free there at which a run is ended: where none are, Ray starts workers that cannot start, again and again."""
LONGEST_SOCKET = 107 - len("/danlu-ray-12345678/r/session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store")
"""The longest path of a folder in which Ray's own can hold its sockets: Linux allows 107 bytes."""
PREFIX = "danlu-ray-"
"""How the names of the folders begin that hold Ray's."""


class Cluster:
    """A Ray cluster that is attached to, or started, when the first stage needs it, and left or stopped at the end.

    It is attached to when an address is given, `RAY_ADDRESS` is set, or the process is a Ray job.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS")
        self._held = ExitStack()
        self._ends = threading.Event()
        self._is_connected = False

    @property
    def is_shared(self) -> bool:
        """Whether it is a cluster that exists without us."""
        return self.address is not None and self.address != "local"

    def connect(self) -> None:
        """Make Ray ready; does nothing where it is."""
        os.environ.update({name: os.environ.get(name, value) for name, value in QUIET.items()})
        import ray

        if ray.is_initialized():
            return
        # Ray says at every start that it made a token for its own cluster; that is as it should be
        logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
        self._is_connected = True
        if self.is_shared:
            self._attach()
        else:
            with waiting("starting Ray on this machine"):
                self._start()
        end_on_sigterm()  # Ray sets a handler of its own, which ends with code 15

    def _attach(self) -> None:
        """Connect to the cluster at the address; StageError where none answers there, soon and with the address."""
        import ray

        address = str(self.address)
        require_answer(address)
        try:
            ray.init(address=address, job_config=job_config(), logging_level=logging.WARNING, log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError, ray.exceptions.RayError) as error:
            raise StageError(f"Ray at {address}: {_first_line(error)}") from error

    def _start(self) -> None:
        """Start Ray's processes on this machine; StageError, with the end of their logs, where they do not start."""
        import ray
        from ray._private import ray_constants

        os.environ.update({name: os.environ.get(name, value) for name, value in {**SELDOM, **ALONE}.items()})
        # A token of this process alone, of which Ray makes no file: a home folder may be shared, or not be writable.
        if not any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "RAY_AUTH_MODE")):
            os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(16)
        try:
            parent = _temporary()
            own = self._held.enter_context(owned_folder(parent, PREFIX))
            free = shutil.disk_usage(own).free
            folder = f"{own}/r"  # Ray opens its own folder to everybody, but not the one that holds it
        except OSError as error:
            raise StageError(f"no folder for Ray's temporary files ({error}); set TMPDIR to one with room") from error
        if free < ROOM:
            raise StageError(
                f"{parent}: {free >> 20} MB free, and Ray's temporary files need {ROOM >> 20}; make room there, or set "
                "TMPDIR to a folder that has it"
            )
        ray_constants.ENABLE_RAY_CLUSTER = False  # what the environment says, if Ray is loaded already
        for left in range(STARTS - 1, -1, -1):
            try:
                with patience(), own_groups():
                    ray.init(
                        address="local",
                        include_dashboard=False,
                        job_config=job_config(),
                        logging_level=logging.WARNING,
                        log_to_driver=False,
                        object_store_memory=512 << 20,
                        _temp_dir=folder,
                    )
                break
            except Exception as error:  # Ray raises bare ones too
                for process in _children(folder):
                    process.kill()
                if not left:
                    why = f"{_first_line(error)}\n{_end_of_logs(folder)}"
                    tries = f"in {STARTS} tries of at most {START_SECONDS} s"
                    raise StageError(f"Ray did not start on this machine {tries}; is it very busy? {why}") from error
                say("  Ray did not start, perhaps since the machine is busy; once more …")
        end_onlookers()
        threading.Thread(target=_watch, args=(self._ends, own), name="watch Ray", daemon=True).start()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ends.set()
        if self._is_connected:
            import ray

            with nullcontext() if self.is_shared else _none_outlives_us():
                clean_up("stopping Ray", ray.shutdown, STOP_SECONDS)
        self._held.close()
        if not self.is_shared:  # what a killed command left, also where this one had no need of a Ray
            with suppress(OSError):
                sweep(_place(), PREFIX)


def require_answer(address: str) -> None:
    """InputError where that cannot be a cluster's address, StageError where none answers there.

    Ray itself would try for minutes, and hear no Ctrl-C meanwhile.
    """
    if address == "auto":
        return
    match = re.fullmatch(r"(?:ray://)?(?:\[([0-9A-Fa-f:]+)\]|([^\s:/\[\]]+)):([0-9]{1,5})", address)
    if match is None or not 0 < int(match[3]) < 65536:
        raise InputError(f"Ray at {address!r}: an address is HOST:PORT, ray://HOST:PORT, auto or local")
    try:
        with socket.create_connection((match[1] or match[2], int(match[3])), REACH_SECONDS) as connection:
            # What every gRPC server answers: its settings, after ours (RFC 9113, 3.4).
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            answer = connection.recv(9)
    except OSError as error:
        raise StageError(f"Ray at {address}: nothing answers there ({error}); is RAY_ADDRESS an old one?") from error
    if answer[3:4] != b"\4":
        raise StageError(f"Ray at {address}: what answers there is not Ray; give the port of Ray's control store, 6379")


def end_on_sigterm() -> None:
    """Let SIGTERM end this process with one line and exit code 143, after the clean-up; a second one at once."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, lambda *_: os._exit(TERMINATED))
    say("terminated; what is finished is kept, and the same command goes on from there")
    raise SystemExit(TERMINATED)


def _place() -> str:
    usual = tempfile.gettempdir()
    return usual if len(usual.encode()) <= LONGEST_SOCKET else "/tmp"


def _temporary() -> str:
    """Where Ray's own folder goes: to TMPDIR, or where that is of no use, to what Python takes instead, and says it."""
    usual, taken = tempfile.gettempdir(), _place()
    wanted = os.environ.get("TMPDIR")
    if wanted and os.path.abspath(wanted) != taken:
        why = "too long for Ray's sockets" if taken != usual else "nothing can be written there"
        say(f"  TMPDIR {wanted}: {why}; Ray's temporary files go to {taken}")
    return taken


@contextmanager
def patience() -> Iterator[None]:
    """Have Ray wait longer for its node to be registered, on a machine that is busy with other things.

    ConnectionError where its raylet ended meanwhile, for which Ray would wait all the same.
    """
    from ray._private import services

    library: Any = services
    ask = library.get_node
    deadline = time.monotonic() + START_SECONDS

    def get_node(*arguments: Any, **named: Any) -> Any:
        while True:
            try:
                return ask(*arguments, **named)
            except RuntimeError as error:
                if time.monotonic() > deadline:
                    raise
                # It gives up where its agents are not up in time, and Ray would go on to wait for it.
                if not any(process.name() == "raylet" for process in _children("raylet")):
                    raise ConnectionError("its raylet ended while it started") from error
                time.sleep(0.5)

    library.get_node = get_node
    try:
        yield
    finally:
        library.get_node = ask


@contextmanager
def own_groups() -> Iterator[None]:
    """Have Ray's processes start in process groups of their own.

    A signal to the group of a command (a scheduler's SIGTERM, `timeout`) would else end them before the command has
    cleaned up, and Ray ends a command whose raylet is gone with exit code 1. That they do not outlive the command is
    seen to by Ray (PR_SET_PDEATHSIG).
    """
    from ray._private import services

    library: Any = services
    usual = library.ConsolePopen
    library.ConsolePopen = partial(usual, process_group=0)
    try:
        yield
    finally:
        library.ConsolePopen = usual


def _children(named: str) -> list[psutil.Process]:
    """Living processes that this one started and whose command line holds that text."""
    found = []
    for process in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE and named in " ".join(process.cmdline()):
                found.append(process)
    return found


def _watch(ends: threading.Event, folder: str) -> None:
    """End this process where Ray cannot go on: a call to it would wait for ever, or end in a crash's dump.

    That is where one of its own processes has died, or where `folder`, which holds what it writes, has no room left.
    """
    from ray._private.worker import _global_node

    node: Any = _global_node
    parent = os.path.dirname(folder)
    while not ends.wait(WATCH_SECONDS):
        dead = [name for name, process in node.dead_processes() if name in ("raylet", "gcs_server")]
        has_room = shutil.disk_usage(parent).free >= LITTLE
        if ends.is_set() or (not dead and has_room):
            continue
        why = (
            f"Ray's {dead[0]} was killed, perhaps for want of memory (dmesg tells)"
            if dead
            else f"{parent}: no room left for Ray's temporary files; make some, or set TMPDIR"
        )
        say(f"error: {why}; what is finished is kept, and the same command goes on from there")
        with _none_outlives_us():
            node.kill_all_processes(check_alive=False, allow_graceful=False)
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


@contextmanager
def _none_outlives_us() -> Iterator[None]:
    """See that Ray's workers, and what they started, have ended a little after Ray was stopped.

    They end by themselves where their raylet is gone, but a worker may hang in Ray's own end, and stay for ever.
    """
    from ray._private.worker import _global_node

    node: Any = _global_node  # None where Ray's start was broken off early
    raylets = {str(info.process.pid) for info in node.all_processes.get("raylet", [])} if node else set()
    try:
        yield
    finally:
        until = time.monotonic() + LEAVE_SECONDS
        while (left := _started_by(raylets)) and time.monotonic() < until:
            time.sleep(0.1)
        for process in left:
            with suppress(psutil.Error):
                process.kill()


def _started_by(raylets: set[str]) -> list[psutil.Process]:
    """Living processes that those raylets' process ids were told."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # ended, a zombie, or another user's
            if process.environ().get("RAY_RAYLET_PID") in raylets:
                found.append(process)
    return found


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def _end_of_logs(folder: str) -> str:
    """The last lines that Ray's processes wrote; their folder goes with this process."""
    lines = []
    for name in ("gcs_server.out", "raylet.out"):
        with suppress(OSError), open(f"{folder}/session_latest/logs/{name}", errors="replace") as stream:
            said = [line.rstrip() for line in stream if re.search(r" [EFC] \d+ |Check failed|[Ee]rror", line)]
            lines += [f"  {name}: {line}" for line in said[-3:]]
    return "\n".join(lines)


def job_config() -> Any:
    """Ray's configuration of our jobs: workers import the danlu that runs here, and nothing from the current folder.

    Ray puts the driver's current folder first on its workers' path, unless the job has a working directory of its own
    (`connect` in ray/_private/worker.py). A folder called `pipelines` there would be imported in place of ours.
    """
    from ray.job_config import JobConfig

    config: Any = JobConfig(_py_driver_sys_path=import_path())
    config._runtime_env_has_working_dir = lambda: True  # asked for nothing else, and Ray has no argument for it
    return config


def end_onlookers() -> None:
    """End what a head node runs for a dashboard, for an autoscaler and for drivers that are shown their workers' logs.

    A Ray of our own has none of them, and Ray has no argument that leaves them out. They take 280 MB, the time in which
    they start, and a little of every second.
    """
    from ray._private.worker import _global_node

    node: Any = _global_node
    node.kill_dashboard(check_alive=False)
    node.kill_monitor(check_alive=False)
    node.kill_log_monitor(check_alive=False)
