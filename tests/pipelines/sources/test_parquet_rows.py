"""Parquet sources whole: what no text is, what other rows' structures add, and what Python cannot hold."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import DataError, InputError
from pipelines.recipe.ingest import Ingest
from pipelines.sources.read import check_source
from tests.pipelines.sources.samples import write_lines
from tests.pipelines.sources.test_read import run

pytestmark = pytest.mark.usefixtures("ray_cluster")


def table_in(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "column",
    [pa.array([b"a", b"\xff", b"b"], pa.binary()).view(pa.string()), pa.array([0, 2**30, 1], pa.date32())],
    ids=["not UTF-8", "year 10000"],
)
def test_a_row_of_any_table_that_cannot_be_held_is_set_aside_by_its_column(tmp_path: Path, column: pa.Array) -> None:
    source = table_in(tmp_path / "a.parquet", id=["x", "y", "z"], odd=column)
    with pytest.raises(DataError, match=r"a\.parquet:2: column odd cannot be read \("):
        run(tmp_path, source, adapter="columns")
    report, table, dropped = run(tmp_path, source, adapter="columns", max_broken=1)
    assert (report.rows, report.broken) == (2, 1)
    assert (table["row_id"].to_pylist(), table["pos"].to_pylist()) == (["x", "z"], [0, 2])
    assert (dropped["row_id"].to_pylist(), dropped["pos"].to_pylist()) == (["a.parquet:2"], [1])


def test_tools_and_calls_have_no_fields_of_other_rows(tmp_path: Path) -> None:
    tools = [
        {"name": "weather", "parameters": {"city": {"type": "string"}}},
        {"name": "time", "parameters": {"zone": 1}},
    ]
    arguments = [{"city": "北京"}, {"zone": "UTC", "deep": {"x": 1}}]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "问"},
                {"role": "assistant", "tool_calls": [{"function": {"name": tool["name"], "arguments": given}}]},
                {"role": "tool", "content": "好"},
                {"role": "assistant", "content": "答"},
            ],
            "tools": [tool],
        }
        for tool, given in zip(tools, arguments, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for source in (tmp_path / "a.parquet", write_lines(tmp_path / "a.jsonl", rows)):
        table = run(tmp_path, source)[1]
        calls = [
            json.loads(talk[1]["tool_calls"])[0]["function"]["arguments"] for talk in table["messages"].to_pylist()
        ]
        assert (calls, [json.loads(text)[0] for text in table["tools"].to_pylist()]) == (arguments, tools)
    nulls = json.loads(json.dumps(rows[0]).replace('"\\u5317\\u4eac"', "null"))
    table = run(tmp_path, write_lines(tmp_path / "n.jsonl", [nulls]))[1]
    assert json.loads(table["messages"][0].as_py()[1]["tool_calls"])[0]["function"]["arguments"] == {"city": None}


@pytest.mark.parametrize("value", [b"\x89PNG", {"bytes": b"x", "path": "a.png"}, [b"x"]])
def test_bytes_beside_a_pair_are_refused_by_name_and_stay_bytes_in_any_table(tmp_path: Path, value: Any) -> None:
    source = table_in(tmp_path / "a.parquet", query=["问"], response=["答"], picture=[value])
    with pytest.raises(InputError, match=r"a\.parquet: column picture: holds bytes, which are no text"):
        check_source(Ingest(source=str(source)))
    with pytest.raises((InputError, DataError), match="column picture: holds bytes, which are no text"):
        run(tmp_path, source)
    assert run(tmp_path, source, adapter="columns")[1]["picture"].to_pylist() == [value]
