"""Near-duplicates among millions of texts: the work shared out over the cluster's CPUs."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from pipelines.similarity.hamming import Signatures, forest, units
from pipelines.similarity.minhash import ANSWER_BANDS, alike
from pipelines.similarity.utf8 import Indices

ALONE = 2_000_000
"""Signatures up to which near-duplicates are found in this process: it takes less time than to start workers."""

FEW_ANSWERS = 20_000
"""The same of answers."""


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


def find_alike(pairs: npt.NDArray[np.uint32], starts: Indices, threshold: float) -> Indices:
    """The pairs of answers that are alike, as `minhash.alike` finds them, from as many Ray tasks as there are CPUs.

    Each task looks at some of the bands; the answers' character pairs are in Ray's store, once for all of them.
    """
    import ray

    if len(starts) <= FEW_ANSWERS or not ray.is_initialized():
        return alike(pairs, starts, threshold, range(ANSWER_BANDS))
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    workers = min(ANSWER_BANDS, max(1, int(resources.get("CPU", 1))))
    shared = ray.put(pairs), ray.put(starts)
    task = ray.remote(num_cpus=1)(alike)
    bands = [range(part, ANSWER_BANDS, workers) for part in range(workers)]
    found = ray.get([task.remote(*shared, threshold, part) for part in bands])
    return np.unique(np.concatenate(found), axis=0)
