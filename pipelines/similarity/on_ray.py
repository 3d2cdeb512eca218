"""Near-duplicates among millions of signatures: the work shared out over the cluster's CPUs."""

from collections.abc import Iterator

from pipelines.similarity.hamming import Signatures, forest, units
from pipelines.similarity.utf8 import Indices

ALONE = 2_000_000
"""Signatures up to which near-duplicates are found in this process: it takes less time than to start workers."""


def find_near(signatures: Signatures, hamming_distance: int) -> Iterator[tuple[Indices, Indices]]:
    """The forests of near signatures, from as many Ray tasks as there are CPUs; few are found right here."""
    import ray

    work = units(len(signatures), hamming_distance)
    if len(signatures) <= ALONE or not ray.is_initialized():
        yield forest(signatures, work, hamming_distance)
        return
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = min(len(work), max(1, int(resources.get("CPU", 1))))
    shared = ray.put(signatures)
    task = ray.remote(num_cpus=1)(forest)
    pending = [task.remote(shared, work[part::workers], hamming_distance) for part in range(workers)]
    while pending:
        ready, pending = ray.wait(pending)
        yield from ray.get(ready)
