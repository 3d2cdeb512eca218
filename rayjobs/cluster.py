"""Which Ray the work runs on: the cluster that is named, or one of our own on this machine."""

import logging
import os
import shutil
import tempfile
from types import TracebackType
from typing import Any

from pipelines.kill_with_parent import import_path
from pipelines.progress import waiting

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_V2": "1",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "PYTHONSAFEPATH": "1",
}
"""Environment of every process we start: nothing is reported anywhere, progress is shown once, by us, and what the
current folder holds is not imported, whatever its name."""

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


class Cluster:
    """A Ray cluster that is attached to, or started, when the first stage needs it, and left or stopped at the end.

    It is attached to when an address is given, `RAY_ADDRESS` is set, or the process is a Ray job.
    """

    def __init__(self, address: str | None = None) -> None:
        self.address = address or os.environ.get("RAY_ADDRESS")
        self._folder: str | None = None

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
        if self.is_shared:
            ray.init(address=self.address, job_config=job_config(), logging_level=logging.WARNING, log_to_driver=False)
        else:
            with waiting("starting Ray on this machine"):
                self._start()

    def _start(self) -> None:
        import ray

        os.environ.update({name: os.environ.get(name, value) for name, value in SELDOM.items()})
        self._folder = tempfile.mkdtemp(prefix="danlu-ray-")
        ray.init(
            address="local",
            include_dashboard=False,
            job_config=job_config(),
            logging_level=logging.WARNING,
            log_to_driver=False,
            object_store_memory=512 << 20,
            _temp_dir=self._folder,
        )
        end_onlookers()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import sys

        ray = sys.modules.get("ray")
        if ray is not None and ray.is_initialized():
            ray.shutdown()
        if self._folder and error is None:
            shutil.rmtree(self._folder, ignore_errors=True)


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
