"""An endpoint of small engines with a gateway on each of a test cluster's two nodes: python -m … LOGS.

Prints the gateways' addresses. With a line of input, or at its end, it stops the endpoint and prints `stopped`; with
another it ends Ray.
"""

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import ray
import uvicorn
from ray.cluster_utils import Cluster

from pipelines.kill_with_parent import PARENT, child_environment, die_with_parent
from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Limits, Serve
from rayjobs.cluster import patience
from serve.app import claim_port, endpoint, wait_until_ready
from serve.engine.command import EnginePlan
from serve.engine.replica import EngineReplica, node_address
from serve.gateway.gateway_replica import GatewayPlan, GatewayReplica
from tests.serve.fake_engine import Engine

NODES = ("127.0.0.2", "127.0.0.3")
"""All of 127.0.0.0/8 is this machine; Ray puts another address in the place of 127.0.0.1."""

STREAMS = 64
"""Requests that the gateways together let through at a time."""


class OnItsNode(GatewayReplica):
    """A gateway that listens at its node's address alone: both nodes are one machine, and the port is the same."""

    def __init__(self, plan: GatewayPlan) -> None:
        super().__init__(replace(plan, host=node_address()))


class OfSmallEngine(EngineReplica):
    """An engine replica whose child is the small engine instead of vLLM's server."""

    def __init__(self, plan: EnginePlan) -> None:
        with patch("serve.engine.replica.start_process", start_process):
            super().__init__(plan)


def start_process(plan: EnginePlan, log: Path, scratch: str) -> tuple[subprocess.Popen[bytes], int]:
    """Start the small engine as a process of its own; returns it and its port."""
    listener = socket.create_server((plan.host, 0), backlog=256)
    command = [sys.executable, "-P", "-m", "tests.serve.two_nodes", "--engine", str(listener.fileno())]
    environment = {**child_environment(), PARENT: str(os.getpid())}
    with listener, log.open("wb") as output:
        fds = (listener.fileno(),)
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT, pass_fds=fds)
        return process, int(listener.getsockname()[1])


def serve_small_engine(fd: int) -> None:
    """Answer as the small engine on a socket that listens already."""
    die_with_parent()
    uvicorn.run(Engine(), fd=fd, log_level="warning", lifespan="off")


def main(logs: str) -> None:
    """Start the endpoint, and stop it when told to."""
    with patience():
        size = {"num_cpus": 1, "object_store_memory": 100 << 20}
        nodes = Cluster(initialize_head=True, head_node_args={**size, "node_ip_address": NODES[0]})
        nodes.add_node(**size, node_ip_address=NODES[1])
        ray.init(address=nodes.address, _node_ip_address=NODES[0], log_to_driver=False)
    models, section = [ServedModel("base", "/models/base")], Serve(gateway_per_node=True)
    limits, port = Limits(max_in_flight=STREAMS), claim_port("", None)
    with (
        patch("serve.app.GatewayReplica", OnItsNode),
        patch("serve.app.EngineReplica", OfSmallEngine),
        endpoint(models, section, host=NODES[0], port=port, log_dir=Path(logs), limits=limits),
    ):
        wait_until_ready(NODES[1], port)
        print(json.dumps([f"http://{node}:{port}" for node in NODES]), flush=True)
        sys.stdin.readline()
    print("stopped", flush=True)
    sys.stdin.readline()
    ray.shutdown()
    nodes.shutdown()


if __name__ == "__main__":
    if sys.argv[1] == "--engine":
        serve_small_engine(int(sys.argv[2]))
    else:
        main(sys.argv[1])
