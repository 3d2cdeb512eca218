"""torch's process group over nodes whose names may stand for nothing that another node reaches."""

import os
from typing import Any

import psutil
import ray
from ray.train.torch import TorchConfig

Backend: Any = TorchConfig().backend_cls


class ReachableConfig(TorchConfig):
    """Ray Train's setup of torch, in which gloo's ranks meet at the addresses by which Ray reaches their nodes.

    Gloo by itself gives the others what its host's name stands for: 127.0.0.1 on many a machine.
    `GLOO_SOCKET_IFNAME` in a node's environment comes first.
    """

    @property
    def backend_cls(self) -> Any:
        """What Ray Train does to workers before it has them work."""
        return _ReachableBackend


class _ReachableBackend(Backend):  # type: ignore[misc]
    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_choose_interface)
        super().on_start(worker_group, backend_config)


def _choose_interface() -> None:
    if name := interface_of(ray.util.get_node_ip_address()):  # type: ignore[no-untyped-call]
        os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


def interface_of(address: str) -> str | None:
    """The name of this machine's network interface that has an address; None where none has, as inside a NAT."""
    interfaces = psutil.net_if_addrs().items()
    return next((name for name, found in interfaces if address in {one.address for one in found}), None)
