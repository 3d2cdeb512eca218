import time

import numpy as np
import pytest

from pipelines.similarity import hamming as module
from pipelines.similarity.hamming import Signatures, first_of_near, forest, units
from pipelines.similarity.utf8 import Indices


def brute_force(signatures: list[int], distance: int) -> list[int]:
    """First row of each row's cluster, by looking at all pairs."""
    first = list(range(len(signatures)))
    for i, a in enumerate(signatures):
        for j, b in enumerate(signatures[:i]):
            if (a ^ b).bit_count() <= distance and first[i] != first[j]:
                low, high = sorted((first[i], first[j]))
                first = [low if f == high else f for f in first]
    return first


def clustered(seed: int, rows: int) -> Signatures:
    """Signatures around a few centres, some equal, as real ones are."""
    random = np.random.default_rng(seed)
    centres = random.integers(0, 2**64, size=rows // 8, dtype=np.uint64)
    chosen = random.choice(centres, size=rows)
    for _ in range(5):
        flips = np.uint64(1) << random.integers(0, 64, size=rows, dtype=np.uint64)
        chosen = np.where(random.random(rows) < 0.6, chosen ^ flips, chosen)
    return chosen


@pytest.mark.parametrize("distance", [1, 3, 4, 6, 9])
def test_agrees_with_all_pairs(distance: int) -> None:
    signatures = clustered(distance, 300)
    assert first_of_near(signatures, distance).tolist() == brute_force([int(s) for s in signatures], distance)


def test_chains_join_whatever_their_order() -> None:
    ends = [0, 0b111111, 0b111111 << 6, (0b111111 << 6) | 0b111111]
    assert first_of_near(np.array(ends, np.uint64), 6).tolist() == [0, 0, 0, 0]
    assert first_of_near(np.array([ends[0], ends[3]], np.uint64), 6).tolist() == [0, 1]


def test_units_of_work_may_be_cut_and_done_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    signatures = clustered(7, 3000)
    whole = first_of_near(signatures, 6)
    monkeypatch.setattr(module, "KEYS_PER_UNIT", 500)

    def shuffled(distinct: Signatures, distance: int) -> list[tuple[Indices, Indices]]:
        work = units(len(distinct), distance)
        assert len(work) > 28
        order = np.random.default_rng(1).permutation(len(work))
        return [forest(distinct, [work[i]], distance) for i in order]

    assert (first_of_near(signatures, 6, shuffled) == whole).all()


def test_clusters_do_not_depend_on_the_order_of_the_rows() -> None:
    signatures = clustered(3, 2000)
    order = np.random.default_rng(2).permutation(len(signatures))
    plain, permuted = first_of_near(signatures, 6), first_of_near(signatures[order], 6)
    assert len(set(plain)) == len(set(permuted))
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    pairs = set(zip(plain.tolist(), permuted[back].tolist(), strict=True))
    assert len(pairs) == len(set(plain))  # the clusters are the same sets
    assert (plain[plain] == plain).all() and (plain <= np.arange(len(plain))).all()  # each named by its first row


def test_a_million_equal_rows_cost_one() -> None:
    first_of_near(np.zeros(2, np.uint64), 6)
    began = time.perf_counter()
    clusters = first_of_near(np.full(1_000_000, 12345, np.uint64), 6)
    assert time.perf_counter() - began < 60
    assert not clusters.any()


def test_nothing_and_one() -> None:
    assert first_of_near(np.zeros(0, np.uint64), 6).tolist() == []
    assert first_of_near(np.zeros(1, np.uint64), 6).tolist() == [0]


def test_a_dense_ball_of_distinct_signatures_is_no_square() -> None:
    bits = [1 << b for b in range(64)]
    ball = [0, *bits, *(a | b for a in bits for b in bits if a < b)]
    ball += [a | b | c for a in bits[:40] for b in bits[:40] for c in bits[:40] if a < b < c]
    signatures = np.array(ball, np.uint64)
    far = np.array([2**64 - 1, 2**64 - 2], np.uint64)
    clusters = first_of_near(np.concatenate([signatures, far]), 6)
    assert not clusters[:-2].any()
    assert clusters[-2:].tolist() == [len(signatures)] * 2
