"""A Ray cluster on this machine that grows and shrinks: Ray's autoscaler over nodes that are processes here.

`ray.cluster_utils.AutoscalingCluster` reads a file that the wheel lacks, and ends every Ray of the machine.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

from tests.rayjobs.conftest import free_ports, stop

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"


@contextmanager
def autoscaling_cluster(node_types: Mapping[str, Mapping[str, Any]], idle_minutes: float) -> Iterator[str]:
    """A head without CPUs, and workers of the types when they are needed; yields the address for `ray.init`."""
    folder = tempfile.mkdtemp(prefix="da-", dir="/tmp")
    gcs, client, agent = free_ports(3)
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    config = {
        "cluster_name": "grows",
        "max_workers": 8,
        "idle_timeout_minutes": idle_minutes,
        "upscaling_speed": 10,
        "provider": {
            "type": "external",
            "module": PROVIDER,
            "gcs_address": f"127.0.0.1:{gcs}",
            "head_node_id": FAKE_HEAD_NODE_ID,
            "launch_multiple": True,
            "disable_node_updaters": True,
            "disable_launch_config_check": True,
        },
        "auth": {},
        "available_node_types": {"ray.head.default": head, **{name: dict(kind) for name, kind in node_types.items()}},
        "head_node_type": "ray.head.default",
    }
    path = Path(folder, "autoscaling.json")
    path.write_text(json.dumps(config), encoding="utf-8")
    env = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "DANLU_TEST_HEAD": folder,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "RAY_NODE_TYPE_NAME": "ray.head.default",
    }
    start = [
        *("ray", "start", "--head", f"--port={gcs}", "--node-ip-address=127.0.0.1", "--num-cpus=0", "--num-gpus=0"),
        *(f"--temp-dir={folder}/r", "--object-store-memory=80000000", "--disable-usage-stats"),
        *("--include-dashboard=false", f"--ray-client-server-port={client}", f"--dashboard-agent-listen-port={agent}"),
        f"--autoscaling-config={path}",
    ]
    try:
        subprocess.run(start, env=env, check=True, capture_output=True, timeout=240)
        yield f"127.0.0.1:{gcs}"
    finally:
        stop(folder)
        shutil.rmtree(folder, ignore_errors=True)
