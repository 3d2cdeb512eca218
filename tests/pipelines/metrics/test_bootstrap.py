"""The bootstrap interval against what is known of it."""

import pytest

from pipelines.metrics.bootstrap import bootstrap


def test_bootstrap_interval_of_equal_differences_is_a_point() -> None:
    interval = bootstrap([0.5] * 10, seed=1)
    assert (interval.value, interval.low, interval.high, interval.rows) == (0.5, 0.5, 0.5, 10)


def test_bootstrap_weighs_rows() -> None:
    interval = bootstrap([1.0, 0.0], seed=1, weights=[3, 1])
    assert interval.value == 0.75
    assert (interval.low, interval.high) == (0.0, 1.0)


def test_bootstrap_interval_has_the_width_of_the_normal_one() -> None:
    values = [0.0, 1.0] * 200  # standard error 0.5 / sqrt(400) = 0.025
    interval = bootstrap(values, seed=7)
    assert interval.low == pytest.approx(0.5 - 1.96 * 0.025, abs=0.006)
    assert interval.high == pytest.approx(0.5 + 1.96 * 0.025, abs=0.006)
