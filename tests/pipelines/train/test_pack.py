import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.train import pack as module
from pipelines.train.pack import pack


@given(st.lists(st.integers(1, 64), max_size=200), st.integers(0, 5))
def test_every_sample_is_in_one_row_and_no_row_is_too_long(lengths: list[int], seed: int) -> None:
    rows = pack(lengths, 64, [seed])
    assert sorted(place for row in rows for place in row) == list(range(len(lengths)))
    assert all(sum(lengths[place] for place in row) <= 64 for row in rows)
    assert len(rows) <= 11 / 9 * -(-sum(lengths) // 64) + 2 + sum(length > 32 for length in lengths)


def test_best_fit_fills_what_first_come_would_not() -> None:
    rows = pack([6, 7, 3, 4, 5, 5], 10, [0])
    assert sorted(sorted(row) for row in rows) == [[0, 3], [1, 2], [4, 5]]


def test_rows_follow_from_the_seed_and_differ_between_epochs() -> None:
    lengths = np.random.default_rng(0).integers(1, 50, 300)
    assert pack(lengths, 100, [1, 0]) == pack(lengths, 100, [1, 0])
    assert pack(lengths, 100, [1, 0]) != pack(lengths, 100, [1, 1])


def test_large_sets_are_packed_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WINDOW", 100)
    lengths = np.random.default_rng(0).integers(1, 50, 1000)
    rows = pack(lengths, 256, [0])
    assert sorted(place for row in rows for place in row) == list(range(1000))
    assert lengths.sum() / (len(rows) * 256) > 0.9
