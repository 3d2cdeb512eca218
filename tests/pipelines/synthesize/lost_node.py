"""Synthesize on a Ray of two nodes, of which one is killed in mid-run: python -m … SERVER_URL CELLS FOLDER.

Prints one JSON object: the rows, the failures, and the nodes that workers were on before the kill.
"""

import json
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.util.state import list_actors

from tests.pipelines.synthesize.serving import Server, place, recipe, run


def main() -> None:
    """Start two nodes, run, and kill the second when a third of the requests has come."""
    port, cells, folder = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2, "object_store_memory": 200 << 20, "include_dashboard": True},
    )
    second = cluster.add_node(num_cpus=2, object_store_memory=200 << 20)
    ray.init(address=cluster.address, log_to_driver=False)
    cluster.wait_for_nodes()
    server, nodes = Server(port), set[str]()

    def kill() -> None:
        while len(server.outcomes()) < 2 * cells // 3:
            time.sleep(0.1)
        nodes.update(str(actor.node_id) for actor in list_actors() if "MapWorker" in actor.class_name)
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    what = recipe(server.url, cells=cells, workers=4)
    report = run(what, place(folder)).report
    killer.join()
    lost = second.node_id in nodes
    print(json.dumps({"rows": report.rows, "failed": report.failed, "nodes": len(nodes), "lost": lost}))
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main()
