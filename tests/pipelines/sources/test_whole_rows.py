"""Whole sources: the schema is that of all rows, names are unique, and nothing hostile stops with a traceback."""

import gzip
import json
import math
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipelines.errors import DataError, InputError
from pipelines.recipe.ingest import Ingest
from pipelines.sources import files
from pipelines.sources.read import check_source, describe_source
from tests.pipelines.sources.samples import rows_of, write_lines
from tests.pipelines.sources.test_read import run

pytestmark = pytest.mark.usefixtures("ray_cluster")

PAIR = {"query": "问", "response": "答"}


def folder_of(tmp_path: Path, **contents: Any) -> Path:
    """A folder with files of those names: rows as .jsonl, tables as .parquet."""
    folder = tmp_path / "source"
    for name, content in contents.items():
        suffix = "parquet" if isinstance(content, pa.Table) else "jsonl"
        path = folder / f"{name.replace('__', '/')}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        else:
            write_lines(path, content)
    return folder


def test_columns_that_appear_late_are_carried(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [dict(PAIR) for _ in range(3000)]
    rows[2500]["late"] = {"a": 1}
    rows[2999]["later"] = 2.5
    for size in (1 << 24, 9999):
        report, table, _ = run(tmp_path, write_lines(tmp_path / "a.jsonl", rows), shard_bytes=size)
        assert report.carried == ["late", "later"] and report.columns == table.column_names
        assert table["late"].to_pylist()[2499:2502] == [None, '{"a": 1}', None]
        assert table["later"][2999].as_py() == 2.5
        assert "carried, not trained: late, later" in report.summary


@pytest.mark.parametrize("adapter", ["auto", "columns"])
def test_files_need_not_agree(tmp_path: Path, adapter: str) -> None:
    folder = folder_of(
        tmp_path,
        a=[],
        b=pa.table({"query": ["1"], "response": ["x"], "n": pa.nulls(1)}),
        c=pa.table({"query": ["2"], "response": ["x"], "n": pa.array([2], pa.int32()), "only": ["c"]}),
        d=pa.schema([("query", pa.string()), ("response", pa.string()), ("n", pa.int64())]).empty_table(),
        e=[{**PAIR, "n": 5.5}],
        f=pa.table({"query": pa.array(["3"], pa.string_view()), "response": ["x"], "n": [2**40]}),
    )
    report, table, _ = run(tmp_path, folder, adapter=adapter)
    assert table["query"].to_pylist() == ["1", "2", "问", "3"]
    assert table["n"].to_pylist() == [None, 2.0, 5.5, 2.0**40] and table["n"].type == pa.float64()
    assert table["only"].to_pylist() == [None, "c", None, None]
    assert report.widened == {"n": "double"}


def test_integers_that_doubles_do_not_hold_become_text(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, a=[{**PAIR, "n": 2**60 + 1}], b=[{**PAIR, "n": 0.5}])
    for adapter in ("auto", "columns"):
        assert run(tmp_path, folder, adapter=adapter)[1]["n"].to_pylist() == [str(2**60 + 1), "0.5"]


def test_nested_keys_that_appear_late_are_kept_as_columns(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, a=[{"m": {"a": 1}}], b=[{"m": {"b": [{"c": 1}]}}, {"m": {"b": [{"d": "x"}]}}])
    table = run(tmp_path, folder, adapter="columns")[1]
    assert table["m"].to_pylist() == [
        {"a": 1, "b": None},
        {"a": None, "b": [{"c": 1, "d": None}]},
        {"a": None, "b": [{"c": None, "d": "x"}]},
    ]


def test_each_row_is_read_by_the_schema_that_it_has(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "一"}, {"from": "gpt", "value": "二"}]
    folder = folder_of(tmp_path, a=[PAIR, {"instruction": "三", "output": "四"}], b=[{"conversations": turns}])
    report, table, _ = run(tmp_path, folder)
    assert table["query"].to_pylist() == ["问", "三", "一"]
    assert report.adapter == "alpaca, query_response, sharegpt"


def test_rows_are_named_by_folder_and_line(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, x__a=[PAIR, PAIR], y__a=[PAIR], z=[PAIR])
    assert run(tmp_path, folder)[1]["row_id"].to_pylist() == ["x/a.jsonl:1", "x/a.jsonl:2", "y/a.jsonl:1", "z.jsonl:1"]
    assert run(tmp_path, folder / "x")[1]["row_id"].to_pylist() == ["a.jsonl:1", "a.jsonl:2"]


@pytest.mark.parametrize("adapter", ["auto", "columns"])
def test_keys_that_repeat_are_refused_or_left_out(tmp_path: Path, adapter: str) -> None:
    rows = [{**PAIR, "id": 1, "key": "k1"}, {**PAIR, "id": 2, "key": "k2"}, {**PAIR, "id": 1, "key": "k3"}]
    source = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"2 rows have the key '1' \(rows 0, 2 of the data.*ingest\.columns"):
        run(tmp_path, source, adapter=adapter)
    named = {"row_id": "key"}
    assert run(tmp_path, source, adapter=adapter, columns=named)[1]["row_id"].to_pylist() == ["k1", "k2", "k3"]
    table = run(tmp_path, source, adapter=adapter, columns={"row_id": None})[1]
    assert table["row_id"].to_pylist() == ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3"]
    assert table["id"].to_pylist() == [1, 2, 1]


def test_columns_are_read_by_the_names_that_the_recipe_gives(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("问题,答案,来源\n天为什么蓝,散射,书\n", encoding="utf-8-sig")
    (tmp_path / "a.tsv").write_text("问题\t答案\t来源\n天为什么蓝\t散射\t书\n", encoding="utf-8")
    for name in ("a.csv", "a.tsv"):
        report, table, _ = run(tmp_path, tmp_path / name, columns={"query": "问题", "response": "答案"})
        assert (table["query"][0].as_py(), table["response"][0].as_py()) == ("天为什么蓝", "散射")
        assert report.carried == ["来源"] and table["来源"][0].as_py() == "书"
    nested = write_lines(tmp_path / "n.jsonl", [{"qa": {"q": "问", "a": "答", "more": 1}}])
    report, table, _ = run(tmp_path, nested, columns={"query": "qa.q", "response": "qa.a"})
    assert (table["query"][0].as_py(), table["response"][0].as_py()) == ("问", "答")
    assert json.loads(table["qa"][0].as_py())["more"] == 1
    with pytest.raises(InputError, match="query would take the place of the source's own column query"):
        run(tmp_path, write_lines(tmp_path / "c.jsonl", [{**PAIR, "q": "别的"}]), columns={"query": "q"})
    with pytest.raises(ValidationError, match="adapter columns reads no columns by name"):
        Ingest(source="a", adapter="columns", columns={"query": "q"})


def test_a_name_for_a_column_that_no_row_has_is_refused(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [PAIR, {**PAIR, "提示": "S", "meta": {"id": "k"}}])
    assert run(tmp_path, source, columns={"system": "提示"})[1]["system"].to_pylist() == [None, "S"]
    with pytest.raises(DataError, match=r"no row has column 提示词, which ingest\.columns names for system"):
        run(tmp_path, source, columns={"system": "提示词"})
    for adapter in ("auto", "columns"):
        with pytest.raises(DataError, match=r"no row has column meta\.id, which ingest\.columns names for row_id"):
            run(tmp_path, source, adapter=adapter, columns={"row_id": "meta.id"})


@pytest.mark.parametrize("columns", [{}, {"row_id": "key"}, {"row_id": None}])
def test_a_row_id_that_would_be_written_over_sets_its_row_aside(tmp_path: Path, columns: dict[str, Any]) -> None:
    rows = [{**PAIR, "key": "k1", "row_id": 1.5}, {**PAIR, "key": "k2", "row_id": None}]
    folder = folder_of(tmp_path, a=rows, b=pa.Table.from_pylist([{**row, "key": f"{row['key']}b"} for row in rows]))
    _, table, dropped = run(tmp_path, folder, adapter="columns", columns=columns, max_broken=2)
    assert table["key"].to_pylist() == ["k2", "k2b"]
    assert set(dropped["reason"].to_pylist()) == {
        "column row_id holds 1.5, which does not name the row; rename the column"
    }


def test_check_names_what_is_carried_and_refuses_by_name(tmp_path: Path) -> None:
    section = Ingest(source=str(write_lines(tmp_path / "a.jsonl", [{**PAIR, "note": "x"}])))
    assert describe_source(section) == "as query_response; carried, not trained: note"
    for name, row in {"label": {**PAIR, "label": True}, "images": {**PAIR, "images": ["a.jpg"]}}.items():
        with pytest.raises(InputError, match=f"column {name}: "):
            check_source(Ingest(source=str(write_lines(tmp_path / f"{name}.jsonl", [row]))))


def test_names_of_files_are_taken_literally_and_hidden_folders_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a[1].jsonl", "b 2.jsonl", "c*.jsonl", ".ipynb_checkpoints/a.jsonl", "__MACOSX/a.jsonl"):
        (tmp_path / "s" / name).parent.mkdir(parents=True, exist_ok=True)
        write_lines(tmp_path / "s" / name, [PAIR])
    assert run(tmp_path, tmp_path / "s" / "a[1].jsonl")[0].rows == 1
    assert run(tmp_path, tmp_path / "s")[0].rows == 3
    assert "2 hidden files are left out, such as " in capsys.readouterr().err


def test_a_file_whose_name_is_no_text_is_named(tmp_path: Path) -> None:
    name = Path(os.fsdecode(bytes(tmp_path) + b"/\xce\xca.jsonl"))
    write_lines(name, [PAIR])
    with pytest.raises(InputError, match=r"\\udcce\\udcca\.jsonl': its name is not UTF-8"):
        run(tmp_path, tmp_path)


def test_files_put_one_after_another_keep_their_marks_of_utf_8(tmp_path: Path) -> None:
    line = json.dumps(PAIR).encode("utf-8-sig") + b"\n"
    (tmp_path / "a.jsonl").write_bytes(line * 3)
    assert run(tmp_path, tmp_path / "a.jsonl")[0].rows == 3


def test_a_column_without_a_name_is_named_so(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",query,response\n0,问,答\n", encoding="utf-8")
    section = Ingest(source=str(tmp_path / "a.csv"))
    assert describe_source(section) == "as query_response; carried, not trained: (without a name)"
    half = tmp_path / "b.jsonl"
    half.write_text('{"query": "a", "response": "b", "z\\ud83d": 1}\n' + json.dumps(PAIR), encoding="utf-8")
    assert describe_source(Ingest(source=str(half))) == "as query_response"


def test_the_header_of_a_table_names_each_column_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query,response,query\n一,二,三\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv: the header has 'query' more than once"):
        run(tmp_path, tmp_path / "a.csv")
    table = pa.table([pa.array(["x"]), pa.array(["y"])], names=["text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet: column text is there twice"):
        run(tmp_path, tmp_path / "a.parquet", adapter="columns")


HOSTILE: list[str] = [
    '{"query": "a", "response": "b", "x": ' + "[" * 5000 + "]" * 5000 + "}",
    '{"query": "a", "response": "b", "x": ' + "[" * 900 + "]" * 900 + "}",
    '{"query": "a", "response": "b", "x": ' + "9" * 5000 + "}",
    '{"query": "a", "response": "b", "x": 1e999}',
    '{"query": "a", "response": "b", "x": {}}',
    '{"query": "a", "response": "b", "x": [{}, {"y": {}}]}',
    '{"query": "a", "response": "b", "z\\ud83d": 1}',
    '{"query": ["a"], "response": {"b": 1}}',
    '{"query": "a", "response": "b", "id": {"x": 1}}',
    '{"query": "a", "response": "b", "id": true, "row_id": 1e400}',
    '{"messages": [{"role": ["user"], "content": "a"}]}',
    '{"messages": {"role": "user"}}',
    '{"messages": [[]]}',
    '{"messages": [{}]}',
    '{"conversation": [{"input": 1, "output": []}]}',
    '{"chat": {"turn_1": 5}}',
    '{"INSTRUCTION": "a", "RESPONSE": "b", "METADATA": "{\\"upvotes\\": {}}"}',
    '{"INSTRUCTION": "a", "RESPONSE": "b", "METADATA": "[]"}',
    "{}",
    "[]",
    '"text"',
    "\x00",
    '{"query": "a", "response": "b", "": 1}',
    '{"query": "a", "response": "b", "tools": "{"}',
    '{"query": "a", "response": "b", "tools": [1]}',
]


@pytest.mark.parametrize("adapter", ["auto", "columns"])
def test_hostile_rows_are_kept_or_set_aside(tmp_path: Path, adapter: str) -> None:
    good = json.dumps(PAIR)
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join([good, *HOSTILE, good]), encoding="utf-8")
    report, table, dropped = run(tmp_path, source, adapter=adapter, max_broken=len(HOSTILE))
    assert report.rows + report.broken == len(HOSTILE) + 2 == table.num_rows + dropped.num_rows
    assert all(dropped["reason"].to_pylist())
    assert sorted([*table["pos"].to_pylist(), *dropped["pos"].to_pylist()]) == list(range(len(HOSTILE) + 2))
    assert table["pos"][0].as_py() == 0 and table["pos"].to_pylist()[-1] == len(HOSTILE) + 1


def test_numbers_that_are_none_are_kept(tmp_path: Path) -> None:
    rows = [{**PAIR, "s": value} for value in (math.inf, 1.0, math.nan)]
    values = run(tmp_path, write_lines(tmp_path / "a.jsonl", rows))[1]["s"].to_pylist()
    assert values[:2] == [math.inf, 1.0] and math.isnan(values[2])


def test_what_unpacks_to_too_much_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "MAX_UNPACKED", 1 << 16)
    bomb = tmp_path / "a.jsonl.gz"
    bomb.write_bytes(gzip.compress(b" " * (1 << 22)))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz: unpacks to more than \d+ bytes"):
        run(tmp_path, bomb)
    fine = tmp_path / "b.jsonl.gz"
    fine.write_bytes(gzip.compress(write_lines(tmp_path / "b.jsonl", rows_of(3000)).read_bytes()))
    assert run(tmp_path, fine)[0].rows == 3000


def test_keys_that_repeat_are_counted_over_many_shards(tmp_path: Path) -> None:
    rows = [{**PAIR, "id": f"k{n if n % 100 else 0}"} for n in range(3000)]
    source = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=r"30 rows have the key 'k0' \(rows 0, 100, 200, 300, 400 .*, and 1 keys are"):
        run(tmp_path, source, shard_bytes=9999)


def test_keys_that_name_no_row_are_carried(tmp_path: Path) -> None:
    rows = [{**PAIR, "id": value} for value in (1.5, {"$oid": "x"}, "k", None)]
    report, table, _ = run(tmp_path, write_lines(tmp_path / "a.jsonl", rows))
    assert table["row_id"].to_pylist() == ["a.jsonl:1", "a.jsonl:2", "k", "a.jsonl:4"]
    assert table["id"].to_pylist()[:2] == ["1.5", '{"$oid": "x"}'] and report.carried == ["id"]


def test_a_column_that_an_adapter_would_write_over_refuses_the_row(tmp_path: Path) -> None:
    row = {"INSTRUCTION": "问", "RESPONSE": "答", "METADATA": '{"upvotes": "赞同 3"}'}
    source = write_lines(tmp_path / "a.jsonl", [{**row, "upvotes": votes} for votes in (99, 3, None)])
    _, table, dropped = run(tmp_path, source, max_broken=1)
    assert table["upvotes"].to_pylist() == [3, 3]
    assert dropped["reason"].to_pylist() == [
        "column upvotes differs from the one that adapter zhihu_kol makes; rename it"
    ]


def test_what_python_cannot_hold_breaks_its_row_alone(tmp_path: Path) -> None:
    texts = pa.Array.from_buffers(pa.string(), 3, pa.array([b"a", b"\xff", b"c"]).buffers())
    times = pa.array([0, 0, 2**58], pa.timestamp("us"))
    folder = folder_of(tmp_path, a=pa.table({"query": texts, "response": ["1", "2", "3"], "time": times}))
    _, table, dropped = run(tmp_path, folder, max_broken=2)
    assert table["query"].to_pylist() == ["a"] and table.num_rows + dropped.num_rows == 3
    reasons = [reason.partition(" (")[0] for reason in dropped["reason"].to_pylist()]
    assert reasons == ["column query cannot be read", "column time cannot be read"]


def test_files_that_are_left_out_of_a_folder_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path, a=[PAIR])
    (folder / "b.JSONL.bz2").write_bytes(b"x")
    (folder / "c.jsonl").symlink_to(tmp_path / "nowhere.jsonl")
    assert run(tmp_path, folder)[0].rows == 1
    said = capsys.readouterr().err
    assert "1 files of other formats are left out, such as " in said and "b.JSONL.bz2" in said
    assert "1 links lead nowhere and are left out, such as " in said and "c.jsonl" in said


def test_a_row_with_a_key_twice_is_set_aside(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text(
        json.dumps(PAIR) + '\n{"query": "a", "response": "b", "response": "c"}\n' + json.dumps(PAIR), encoding="utf-8"
    )
    _, table, dropped = run(tmp_path, source, max_broken=1)
    assert table["row_id"].to_pylist() == ["a.jsonl:1", "a.jsonl:3"]
    assert dropped["reason"][0].as_py().startswith("key 'response' is there twice; delete one: ")
