"""The dialect `zh` on the rows labelled by hand, with the shipped recipe's limits."""

from pathlib import Path

import pytest

from benchmarks.peer_data_juicer import ASSETS
from benchmarks.quality import Counts, Equal, Side, measured

FLOORS = {
    "language, filter": (0.97, 0.97),
    "flagged_words, filter": (0.95, 0.95),
    "perplexity, filter": (0.90, 0.80),
    "alphanumeric, filter": (0.97, 0.93),
    "promotion, filter": (0.97, 0.95),
    "near_duplicates": (0.98, 0.95),
    "whole recipe": (0.95, 0.95),
}
"""Precision and recall."""
TEXTS = {"html, texts": 0.97, "links, texts": 0.97, "promotion, texts": 0.97, "personal_data, texts": 0.97}


@pytest.mark.slow
def test_cleaning_decides_as_labelled(shared_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("kenlm")
    side = Side("zh", {name: str(shared_data / "assets" / name) for name in ASSETS})
    found = measured(side, shared_data, tmp_path)
    for name, (precision, recall) in FLOORS.items():
        counts = found[name]
        assert isinstance(counts, Counts)
        assert (counts.precision or 0) >= precision and counts.recall >= recall, (name, counts.told(), counts.mistakes)
    for name, share in TEXTS.items():
        equal = found[name]
        assert isinstance(equal, Equal)
        assert equal.equal >= share * equal.rows, (name, equal.mistakes)
