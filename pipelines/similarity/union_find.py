"""Clusters as a forest: `parent[i]` is a node of the same cluster, and a root is its own parent (Tarjan 1975).

The root of a cluster is always its lowest node.
"""

from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from pipelines.similarity.utf8 import Indices


@nb.njit(cache=True, nogil=True)
def root(parent: Any, i: int) -> int:  # pragma: no cover - compiled
    """The node that stands for the cluster of node `i`; the way to it is shortened."""
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@nb.njit(cache=True, nogil=True)
def join(parent: Any, i: int, j: int) -> None:  # pragma: no cover - compiled
    """Join two clusters; the lower number becomes the root."""
    a, b = root(parent, i), root(parent, j)
    if a < b:
        parent[b] = a
    else:
        parent[a] = b


@nb.njit(cache=True, nogil=True)
def flatten(parent: Any) -> None:  # pragma: no cover - compiled
    """Make every node point to the root of its cluster."""
    for i in range(len(parent)):
        parent[i] = root(parent, i)


@nb.njit(cache=True, nogil=True)
def join_all(parent: Any, nodes: Any, roots: Any) -> None:  # pragma: no cover - compiled
    """Join the clusters of `nodes[k]` and `roots[k]` for every k."""
    for k in range(len(nodes)):
        join(parent, nodes[k], roots[k])


def first_of_equal(keys: npt.NDArray[Any]) -> Indices:
    """For each row the first one of its cluster, where rows that agree in any column of `keys` (rows, columns) are
    joined, and clusters are transitive."""
    parent = np.arange(len(keys))
    for column in keys.T:
        _, firsts, inverse = np.unique(column, return_index=True, return_inverse=True)
        join_all(parent, np.arange(len(keys)), firsts[inverse])
    flatten(parent)
    return parent
