"""Rows and tables that are odd but are rows: through the stages, each is read as it is or refused by its name."""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import DataError, RecipeError
from pipelines.recipe.schema import Recipe
from rayjobs import pipeline
from rayjobs.cluster import Cluster
from tests.pipelines.sources.samples import write_lines

pytestmark = pytest.mark.usefixtures("ray_cluster")

PAIR = {"query": "问", "response": "答得很好"}


def done(tmp_path: Path, source: Path, **sections: Any) -> pipeline.Outputs:
    ingest = {"source": str(source), **sections.pop("ingest", {})}
    recipe = Recipe.model_validate({"name": "t", "ingest": ingest, **sections})
    return pipeline.run(recipe, Workspace(str(tmp_path / "w")), Cluster())


def column(outputs: pipeline.Outputs, stage: str, name: str, kind: str = "rows") -> list[Any]:
    output = outputs[stage]
    paths = output.paths(getattr(output.report.outputs, kind))
    return [value for table in read_tables(output.folder.workspace, paths, [name]) for value in table[name].to_pylist()]


@pytest.mark.parametrize("values", [[math.inf, 1.0], [-math.inf, math.inf, 2.0], [math.nan, 1.0, 2.0]])
def test_numbers_that_are_none_are_cleaned_and_drawn(tmp_path: Path, values: list[float]) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{**PAIR, "s": value} for value in values])
    clean = {"process": [{"specified_numeric_field_filter": {"field_key": "s", "min_value": 0}}]}
    outputs = done(tmp_path, source, analyze={}, clean=clean)
    assert column(outputs, "clean", "s") == [value for value in values if math.isfinite(value)]
    page = (tmp_path / "w" / "report.html").read_text(encoding="utf-8")
    assert outputs["analyze"].is_complete and "<svg" in page


@pytest.mark.parametrize("name", ["style", "sample", "name"])
def test_a_column_of_ones_own_with_the_name_of_a_dimension_is_carried(tmp_path: Path, name: str) -> None:
    rows = [{"query": "祝张三生日快乐", "response": "生日快乐", name: "旧列"}]
    refine = {"styles": {"正常": {"min_length": 1}}, "dimensions": {"name": ["张三"]}}
    outputs = done(tmp_path, write_lines(tmp_path / "a.jsonl", rows), refine=refine)
    assert column(outputs, "refine", name) == ["旧列"] and column(outputs, "refine", "response") == ["生日快乐"]


@pytest.mark.parametrize("kind", [pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_texts_are_texts_however_they_are_stored(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["一句话", "两句话"], pa.string())
    table = pa.table({"query": texts.cast(kind), "response": texts.cast(kind)})
    pq.write_table(table, tmp_path / "a.parquet")
    clean = {"process": [{"text_length_filter": {"min_len": 2}}]}
    assert column(done(tmp_path, tmp_path / "a.parquet", clean=clean), "clean", "response") == ["一句话", "两句话"]


@pytest.mark.parametrize("value", [["一", "二"], {"a": "一"}])
def test_what_is_no_text_is_refused_by_row_or_column(tmp_path: Path, value: Any) -> None:
    clean = {"process": [{"text_length_filter": {"min_len": 2}}], "text_keys": "text"}
    source = write_lines(tmp_path / "a.jsonl", [{"text": value}])
    with pytest.raises((DataError, RecipeError), match="text"):
        done(tmp_path, source, ingest={"adapter": "columns"}, clean=clean)
    with pytest.raises(DataError, match=rf"a\.jsonl:1: column text holds {type(value).__name__}, not text"):
        done(tmp_path, source)


@pytest.mark.parametrize("names", [["text", "text"], ["query", "response", "query"]])
def test_two_columns_of_one_name_are_refused(tmp_path: Path, names: list[str]) -> None:
    pq.write_table(pa.table([pa.array(["x"])] * len(names), names=names), tmp_path / "a.parquet")
    with pytest.raises((DataError, RecipeError), match=rf"a\.parquet: column {names[0]} is there twice"):
        done(tmp_path, tmp_path / "a.parquet", ingest={"adapter": "columns"})


@pytest.mark.parametrize(
    "line",
    [
        '{"query": "q", "response": "r", "k\\ud83d": 1}',
        '{"query": "q", "response": "r", "x": {"\\udc00": 1}}',
        '{"query": "q", "response": "r", "x": ' + "[" * 3000 + "]" * 3000 + "}",
    ],
)
def test_a_row_that_no_table_holds_is_set_aside_by_its_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(PAIR)}\n{line}\n", encoding="utf-8")
    outputs = done(tmp_path, tmp_path / "a.jsonl", ingest={"max_broken": 1})
    assert column(outputs, "ingest", "row_id") == ["a.jsonl:1"]
    assert column(outputs, "ingest", "row_id", "dropped") == ["a.jsonl:2"]


def test_tool_roles_reach_a_conversation_with_tools_or_are_refused(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": "{}"}}
    turns = [
        *({"role": "user", "content": "天气"}, {"role": "assistant", "content": None, "tool_calls": [call]}),
        *({"role": "function", "name": "f", "content": "晴"}, {"role": "assistant", "content": "今天晴"}),
    ]
    odd = [*turns[:2], {"role": "ipython", "content": "晴"}, turns[3]]
    rows = [{"messages": turns, "tools": [{"name": "f"}]}, {"messages": odd}, {"messages": turns[2:]}]
    outputs = done(tmp_path, write_lines(tmp_path / "a.jsonl", rows), ingest={"max_broken": 2})
    (talk,) = column(outputs, "ingest", "messages")
    assert [turn["role"] for turn in talk] == ["user", "assistant", "tool", "assistant"]
    assert json.loads(talk[1]["tool_calls"])[0]["function"] == {"name": "f", "arguments": {}}
    first, second = column(outputs, "ingest", "reason", "dropped")
    assert "unknown role 'ipython' in turn 3" in first and "turn 1 has name 'f'" in second


def test_empty_files_and_files_of_nulls_decide_nothing(tmp_path: Path) -> None:
    (tmp_path / "s").mkdir()
    schema = pa.schema([("query", pa.string()), ("response", pa.string()), ("n", pa.int64())])
    pq.write_table(schema.empty_table(), tmp_path / "s" / "a.parquet")
    with pq.ParquetWriter(tmp_path / "s" / "b.parquet", schema):
        pass  # a file without row groups
    pq.write_table(pa.table({**{k: [v] for k, v in PAIR.items()}, "n": pa.nulls(1)}), tmp_path / "s" / "c.parquet")
    (tmp_path / "s" / "d.jsonl").write_text("\n \n")
    write_lines(tmp_path / "s" / "e.jsonl", [{**PAIR, "n": {"late": 1}}, {**PAIR, "n": {"later": [1]}}])
    outputs = done(tmp_path, tmp_path / "s", ingest={"adapter": "columns"})
    assert column(outputs, "ingest", "n") == [None, {"late": 1, "later": None}, {"late": None, "later": [1]}]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "一"}, {"type": "text", "text": "二"}], "一二"),
        (["一", "\n", "二"], "一\n二"),
        ([{"text": "一"}], "一"),
    ],
)
def test_parts_of_text_are_one_text(tmp_path: Path, content: Any, text: str) -> None:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "答"}]
    media = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, turns[1]]
    rows = [{"messages": turns}, {"messages": media}]
    outputs = done(tmp_path, write_lines(tmp_path / "a.jsonl", rows), ingest={"max_broken": 1})
    assert column(outputs, "ingest", "query") == [text]
    assert "its content has a part that is not text" in column(outputs, "ingest", "reason", "dropped")[0]
