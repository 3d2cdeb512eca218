"""The digest over rows: the same for the same rows however they are cut, and another one for any difference."""

from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.rows import RowDigest


def digest(table: pa.Table) -> str:
    found = RowDigest()
    found.update(table)
    assert found.rows == table.num_rows
    return found.hexdigest()


def test_cuts_order_and_empty_columns_do_not_matter(shared_data: Any) -> None:
    table = pq.read_table(shared_data / "zhihu_kol_sample.parquet").slice(0, 5000)
    table = table.append_column("pos", pa.array(range(5000)))
    whole, parts = digest(table), RowDigest()
    for begin in reversed(range(0, 5000, 617)):
        part = RowDigest()
        part.update(table.slice(begin, 617))
        parts.add(part.hexdigest(), part.rows)
    assert (parts.hexdigest(), parts.rows) == (whole, 5000)
    large = table.set_column(0, table.column_names[0], table[0].cast(pa.large_string()))
    assert digest(large.append_column("none", pa.nulls(5000, pa.int64()))) == whole
    assert digest(table.select(sorted(table.column_names, reverse=True))) == whole


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"a": ["xy"], "b": ["z"]}, {"a": ["x"], "b": ["yz"]}),
        ({"a": ["1"]}, {"a": [1]}),
        ({"a": [1]}, {"a": [True]}),
        ({"a": [1]}, {"a": [1.0]}),
        ({"a": [""]}, {"a": pa.array([None], pa.string())}),
        ({"a": ["x"], "b": ["y"]}, {"a": ["y"], "b": ["x"]}),
        ({"a": ["x\nb text1 y"], "b": pa.array([None], pa.string())}, {"a": ["x"], "b": ["y"]}),
        ({"a": [[{"role": "user"}]]}, {"a": [[{"role": "system"}]]}),
        ({"pos": [0, 1], "a": ["x", "y"]}, {"pos": [0, 1], "a": ["y", "x"]}),
    ],
)
def test_any_difference_is_one(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert digest(pa.table(one)) != digest(pa.table(other))
    assert digest(pa.table(one)) == digest(pa.table(one))
