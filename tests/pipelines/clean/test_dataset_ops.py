"""Decisions over the whole data set, and the order of the rows after them."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipelines.clean.column import Column, Indices
from pipelines.clean.dataset_ops import Decisions, decide
from pipelines.clean.fused import apply
from pipelines.clean.operators import OPERATORS, operator
from pipelines.clean.plan import build_plan
from pipelines.clean.stage import _bucket_shards
from pipelines.similarity.hamming import Finder, find_here
from pipelines.similarity.union_find import first_of_equal

TABLE = pa.table(
    {"row_id": ["a", "b", "c"], "pos": [0, 1, 2], "response": ["一二", "三四", "五六七"], "votes": [3, 1, 2]}
)


@pytest.fixture
def own() -> Iterator[None]:
    """A deduplicator and a selector whose names are not the usual ones."""

    def cluster(keys: pa.Array, parameters: Mapping[str, Any], find: Finder) -> Indices:
        return first_of_equal(keys.to_numpy().reshape(-1, 1))

    @operator("deduplicator", cluster=cluster)
    def same_length(column: Column) -> pa.Array:
        return pa.array(column.lengths)

    @operator("selector", reads="field")
    def most_voted_deduplicator(values: pa.Array, *, field_key: str) -> Indices:
        return pc.array_sort_indices(values, order="descending").to_numpy()[:1]

    yield
    del OPERATORS["same_length"], OPERATORS["most_voted_deduplicator"]


def decided(*process: Any) -> Decisions:
    (phase,) = build_plan(process, "zh", "response").phases
    return decide(phase.dataset_ops, apply((), TABLE, "response", phase.dataset_ops).keys, False, find_here)


def test_what_a_row_is_recorded_with_follows_from_the_kind_of_operator_whatever_its_name(own: None) -> None:
    (duplicate,) = decided("same_length").rows.to_pylist()
    assert (duplicate["pos"], duplicate["reason"]) == (1, "duplicate of row a")
    assert duplicate["stats"] == [("cluster", 0.0)]
    selected = decided({"most_voted_deduplicator": {"field_key": "votes"}})
    assert [row["stats"] for row in selected.rows.to_pylist()] == [[("value", 1.0)], [("value", 2.0)]]


def test_buckets_are_put_in_order_by_their_number() -> None:
    """Of which the names have six digits: more than a million buckets would else be in the order of their text."""
    files = {"bucket-1000000": "last", "bucket-999999": "second", "bucket-000000": "first", "dropped": "gone"}
    shards = _bucket_shards([{"index": 0, "files": files, "result": {}}])
    assert shards == [
        {"index": 0, "parts": [{"path": "first"}]},
        {"index": 1, "parts": [{"path": "second"}]},
        {"index": 2, "parts": [{"path": "last"}]},
    ]
