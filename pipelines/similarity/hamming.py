"""All pairs of 64-bit signatures within a Hamming distance, joined to clusters.

Equal signatures collapse first, so a million equal rows cost one. The bits are cut into distance + 2 blocks: two
signatures within the distance agree in at least two of them (pigeonhole; Manku, Jain, Sarma 2007), so one table
per pair of blocks finds all. A unit of work is one table and a range of its keys; it returns a forest, never
more edges than signatures, and the forests are joined by union-find. Neither the units nor their order matter.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from pipelines.similarity.union_find import flatten, join, join_all, root
from pipelines.similarity.utf8 import Indices

Signatures = npt.NDArray[np.uint64]

KEYS_PER_UNIT = 4_000_000
"""Signatures above which a table is cut into key ranges."""


DENSE = 256
"""Signatures with one key from which on clusters are told apart before all pairs are compared."""
NEIGHBOURS = 32
"""Neighbours in a dense bucket that each signature is compared with first."""
FIELD_BITS = 11
"""Bits of a block that enter a key, at most: agreeing blocks agree in part of their bits."""


@dataclass(frozen=True)
class Unit:
    """One table, by the (shift, width) of the two bit fields that make its key, and a range of keys."""

    fields: tuple[tuple[int, int], tuple[int, int]]
    low: int
    high: int


def units(rows: int, hamming_distance: int) -> list[Unit]:
    """The work that finds all pairs among `rows` distinct signatures."""
    blocks = min(hamming_distance + 2, 64)
    edges = [64 * i // blocks for i in range(blocks + 1)]
    fields = [(low, min(high - low, FIELD_BITS)) for low, high in pairwise(edges)]
    ranges = 1 + rows // KEYS_PER_UNIT
    made = []
    for first, second in combinations(fields, 2):
        keys = 1 << (first[1] + second[1])
        cuts = [keys * i // ranges for i in range(ranges + 1)]
        made += [Unit((first, second), low, high) for low, high in pairwise(cuts)]
    return made


@nb.njit(cache=True, nogil=True)
def _bits(x: Any) -> Any:  # pragma: no cover - compiled
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (x * np.uint64(0x0101010101010101)) >> np.uint64(56)


@nb.njit(cache=True, nogil=True)
def _by_key(signatures: Any, s1: int, w1: int, s2: int, w2: int) -> Any:  # pragma: no cover - compiled
    """Counting sort by key: the order, and where each key begins in it."""
    m1, m2 = np.uint64((1 << w1) - 1), np.uint64((1 << w2) - 1)
    keys = np.empty(len(signatures), dtype=np.int64)
    begins = np.zeros((1 << (w1 + w2)) + 1, dtype=np.int64)
    for i in range(len(signatures)):
        first, second = (signatures[i] >> np.uint64(s1)) & m1, (signatures[i] >> np.uint64(s2)) & m2
        keys[i] = np.int64(first << np.uint64(w2) | second)
        begins[keys[i] + 1] += 1
    begins = np.cumsum(begins)
    order, next_free = np.empty(len(signatures), dtype=np.int64), begins.copy()
    for i in range(len(signatures)):
        order[next_free[keys[i]]] = i
        next_free[keys[i]] += 1
    return order, begins


@nb.njit(cache=True, nogil=True)
def _join_near(
    bucket: Any, members: Any, parent: Any, i: int, low: int, high: int, near: Any
) -> None:  # pragma: no cover
    for j in range(low, high):
        if _bits(bucket[i] ^ bucket[j]) <= near:
            join(parent, members[i], members[j])


@nb.njit(cache=True, nogil=True)
def _join_dense(bucket: Any, members: Any, parent: Any, near: Any) -> None:  # pragma: no cover - compiled
    """Join a large bucket: first each signature with a few neighbours, then only across what is still apart, so that
    a bucket of one cluster costs no square."""
    size = len(bucket)
    for i in range(size):
        _join_near(bucket, members, parent, i, i + 1, min(size, i + 1 + NEIGHBOURS), near)
    roots = np.empty(size, dtype=np.int64)
    for i in range(size):
        roots[i] = root(parent, members[i])
    order = np.argsort(roots)
    bucket, members, roots = bucket[order], members[order], roots[order]
    end = size
    for i in range(size - 1, -1, -1):
        if i + 1 < size and roots[i] != roots[i + 1]:
            end = i + 1
        _join_near(bucket, members, parent, i, end, size, near)


@nb.njit(cache=True, nogil=True)
def _join_within(
    signatures: Any, order: Any, begins: Any, low: int, high: int, distance: int, parent: Any
) -> None:  # pragma: no cover - compiled
    """Join every pair with an equal key in `low:high` and at most `distance` different bits."""
    near = np.uint64(distance)
    bucket = signatures[order]
    for key in range(low, high):
        begin, end = begins[key], begins[key + 1]
        if end - begin > DENSE:
            _join_dense(bucket[begin:end], order[begin:end], parent, near)
            continue
        for i in range(begin, end):
            _join_near(bucket, order, parent, i, i + 1, end, near)


def forest(signatures: Signatures, work: Sequence[Unit], hamming_distance: int) -> tuple[Indices, Indices]:
    """The edges (node, root), each node once, that join what the given units find near."""
    parent = np.arange(len(signatures))
    for unit in work:
        (s1, w1), (s2, w2) = unit.fields
        order, begins = _by_key(signatures, s1, w1, s2, w2)
        _join_within(signatures, order, begins, unit.low, unit.high, hamming_distance, parent)
    flatten(parent)
    nodes = np.flatnonzero(parent != np.arange(len(parent)))
    return nodes, parent[nodes]


Finder = Callable[[Signatures, int], Iterable[tuple[Indices, Indices]]]
"""Finds the forests of distinct signatures within a distance, by whatever workers there are."""


def find_here(signatures: Signatures, hamming_distance: int) -> Iterable[tuple[Indices, Indices]]:
    """The forest found in this process."""
    yield forest(signatures, units(len(signatures), hamming_distance), hamming_distance)


def first_of_near(signatures: Signatures, hamming_distance: int, find: Finder = find_here) -> Indices:
    """For each signature the index of the first one of its cluster, shape (rows,).

    Signatures come in data-set order. Clusters are transitive: two rows share one if a chain of pairs within
    `hamming_distance` bits connects them.
    """
    _, firsts, inverse = np.unique(signatures, return_index=True, return_inverse=True)
    by_first = np.argsort(firsts)  # number the distinct signatures in data-set order, so that the lowest is the first
    distinct = signatures[firsts[by_first]]
    parent = np.arange(len(distinct))
    for nodes, roots in find(distinct, hamming_distance):
        join_all(parent, nodes, roots)
    flatten(parent)
    number = np.empty_like(by_first)
    number[by_first] = np.arange(len(by_first))
    first_row: Indices = firsts[by_first][parent[number[inverse]]]
    return first_row
