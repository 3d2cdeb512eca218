"""What a Ray cluster has room for: now, and once its autoscaler has added nodes."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.clean_up import clean_up
from pipelines.errors import StageError
from pipelines.progress import say

Bundle = Mapping[str, float]
"""Amounts of Ray's resources that one node must have together."""

LOOK_SECONDS = 5
SAY_SECONDS = 15
SURE_SECONDS = 12
"""How long the autoscaler must say that it cannot give something: it plans anew every five seconds."""
GROW_SECONDS = 3600
"""How long nodes that the autoscaler wants may take to come; a cloud can be out of a kind of machine for longer."""
RETURN_SECONDS = 900
"""How long a node that was lost may take to be replaced."""
STOP_SECONDS = 15
"""What giving back may take."""
_SLACK = 1e-6


def lacking_for_good(bundles: Sequence[Bundle], what: str, *, patience: float = 0) -> str:
    """What of `bundles` the cluster lacks and does not get; empty once nodes are alive that hold them together.

    Waits, saying `what` it waits for, while the autoscaler can add nodes, at most `GROW_SECONDS`, after which it is a
    StageError. On a cluster that cannot grow, and for what no node type gives, `patience` seconds: nodes may return.
    """
    wanted = [{name: amount for name, amount in bundle.items() if amount > 0} for bundle in bundles]
    wanted = [bundle for bundle in wanted if bundle]
    short = lacking(wanted, alive())
    if not short:
        return ""
    if can_grow():
        return wait_for_growth(wanted, what, patience=patience)
    began = said = time.monotonic()
    while short and time.monotonic() - began < patience:
        said = _say_now_and_then(said, began, f"{what}: waiting for nodes to return")
        time.sleep(min(LOOK_SECONDS, patience))
        short = lacking(wanted, alive())
    return short


def wait_for_growth(bundles: Sequence[Bundle], what: str, *, patience: float = 0) -> str:
    """Have the autoscaler make room that nobody else holds; returns what it cannot give, as `lacking_for_good`."""
    from ray.util.placement_group import placement_group, remove_placement_group

    # Demand that ends with this job, whatever becomes of it; `ray.autoscaler.sdk.request_resources` would stay.
    group = placement_group([dict(bundle) for bundle in bundles], strategy="PACK")
    began = said = time.monotonic()
    refused: float | None = None
    try:
        while not group.wait(LOOK_SECONDS):
            now = time.monotonic()
            if not _is_infeasible(group.id.hex()):
                refused = None
            elif refused is None:
                refused = now
            elif now - refused >= max(SURE_SECONDS, patience):
                return lacking(bundles, alive()) or "nodes that nothing else holds, and adds none"
            if now - began >= GROW_SECONDS:
                raise StageError(
                    f"{what}: the cluster did not grow to it in {GROW_SECONDS // 60} minutes; `ray status` says why. "
                    "The same command waits again, and goes on from what is finished"
                )
            said = _say_now_and_then(said, began, f"{what}: waiting for the cluster to grow")
    finally:
        clean_up("giving back what the cluster grew by", lambda: remove_placement_group(group), STOP_SECONDS)
    return ""


def alive() -> list[dict[str, float]]:
    """What each node that is alive has in all."""
    import ray

    library: Any = ray
    return [node["Resources"] for node in library.nodes() if node["Alive"]]


def can_grow() -> bool:
    """Whether an autoscaler plans this cluster; that of `ray up` and of KubeRay does, since Ray 2.50."""
    from ray.autoscaler.v2.utils import is_autoscaler_v2

    return bool(is_autoscaler_v2(fetch_from_server=True))


def lacking(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> str:
    """What `nodes` have too little of to hold all `bundles`, for people; empty where they hold them.

    Exact for bundles that are all alike, as those of workers and engines are.
    """
    names = list(dict.fromkeys(name for bundle in bundles for name in bundle))
    needed = {name: sum(bundle.get(name, 0) for bundle in bundles) for name in names}
    there = {name: sum(node.get(name, 0) for node in nodes) for name in names}
    short = [name for name in names if needed[name] > there[name] + _SLACK]
    if short:
        return ", ".join(f"{needed[name]:g} {name} (there: {there[name]:g})" for name in short)
    left = [dict(node) for node in nodes]
    for bundle in bundles:
        node = next((node for node in left if _holds(node, bundle)), None)
        if node is None:
            return "nodes with room for " + ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
        for name, amount in bundle.items():
            node[name] -= amount
    return ""


def nodes_for(bundle: Bundle) -> int:
    """How many of the nodes that are alive could hold one."""
    return sum(_holds(node, bundle) for node in alive())


def _holds(node: Bundle, bundle: Bundle) -> bool:
    return all(node.get(name, 0) + _SLACK >= amount for name, amount in bundle.items())


def _say_now_and_then(said: float, began: float, text: str) -> float:
    """Say it each `SAY_SECONDS`, with the time it has taken; returns when it was said last."""
    now = time.monotonic()
    if now - said < SAY_SECONDS:
        return said
    say(f"  {text} ({now - began:.0f} s)")
    return now


def _is_infeasible(group: str) -> bool:
    """Whether the autoscaler says that it can give a placement group to no nodes that it may have."""
    import ray
    from ray.core.generated import autoscaler_pb2

    messages: Any = autoscaler_pb2
    raylet: Any = ray._raylet
    client = raylet.GcsClient(ray.get_runtime_context().gcs_address)
    reply = messages.GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=10))
    return any(group in request.details for request in reply.autoscaling_state.infeasible_gang_resource_requests)
