"""Reading a source whole: its rows, in order, and what cannot be read."""

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.reports.rows import IngestReport
from pipelines.artifacts.rows import RowDigest, messages_of
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import DataError, InputError
from pipelines.recipe.ingest import Ingest
from pipelines.sources import recode
from pipelines.sources.read import check_source, describe_source, first_rows, read_once, read_source
from tests.pipelines.sources.samples import rows_of, write_lines, written

pytestmark = pytest.mark.usefixtures("ray_cluster")


def run(tmp_path: Path, source: Path | str, **section: Any) -> tuple[IngestReport, pa.Table, pa.Table]:
    place = Place(Workspace(str(tmp_path / "w")), "ingest", "f")
    place.clear()
    report = read_source(Ingest(source=str(source), **section), place)
    return report, table_of(place, report.outputs.rows), table_of(place, report.outputs.dropped)


def table_of(place: Place, names: list[str]) -> pa.Table:
    return pa.concat_tables([pq.read_table(place.path(name)) for name in names])


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    rows = rows_of(500)
    lines = write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet", row_group_size=90)
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    with pa.CompressedOutputStream(str(tmp_path / "e.jsonl.zst"), "zstd") as stream:
        stream.write(lines.read_bytes())
    wanted = [(row["query"], row["response"], row["upvotes"]) for row in rows]
    for name in ("a.jsonl", "b.json", "c.parquet", "d.jsonl.gz", "e.jsonl.zst"):
        report, table, _ = run(tmp_path, tmp_path / name, shard_bytes=4096)
        found = list(zip(*(table[column].to_pylist() for column in ("query", "response", "upvotes")), strict=True))
        assert found == wanted, name
        assert table["pos"].to_pylist() == list(range(500))
        assert table["row_id"][3].as_py() == f"{name}:4"
        assert report.adapter == "query_response"


def test_earlier_runs_and_folders_of_conversations_are_merged(tmp_path: Path, shared_data: Path) -> None:
    wishes = json.loads((shared_data / "tianji-wishes-chinese-v0.1.json").read_text(encoding="utf-8"))
    (tmp_path / "old").mkdir()
    parts = [wishes[:40], wishes[40:45], wishes[45:100]]
    for number, part in enumerate(parts):
        path = tmp_path / "old" / f"run-{number}.json"
        path.write_text(json.dumps(part, ensure_ascii=False), encoding="utf-8")
    for source in (tmp_path / "old", tmp_path / "old" / "run-*.json"):
        report, table, _ = run(tmp_path, source)
        assert (report.rows, report.adapter) == (100, "conversation")
        answers = [entry["conversation"][0]["output"] for entry in wishes[:100]]
        assert table["response"].to_pylist() == answers


def test_parts_are_gone_when_they_are_read(tmp_path: Path) -> None:
    rows = [{"query": str(i), "response": "答"} for i in range(300)]
    for name in ("a.csv", "a.csv.gz", "a.json"):
        _, table, _ = run(tmp_path, written(tmp_path / name, rows), shard_bytes=1000)
        assert table["query"].to_pylist() == [row["query"] for row in rows]
        assert table["row_id"][7].as_py() == f"{name}:8"
        assert not list((tmp_path / "w").rglob("*.zst"))


def test_what_no_row_is_in_csv_and_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("query,response\n甲,乙\n\n一,二,三\n丙,丁\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:2: not as many fields as the header: \['一', '二', '三'\]"):
        run(tmp_path, tmp_path / "a.csv")
    (tmp_path / "a.json").write_text('[{"query": "甲", "response": "乙"}, 7]', encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.json:2: not a JSON object: 7"):
        run(tmp_path, tmp_path / "a.json")
    (tmp_path / "b.csv").write_bytes("query,response\n甲,乙\n".encode("gb18030"))
    with pytest.raises(DataError, match=r"b\.csv:2: not UTF-8 text .*ingest\.encoding: gb18030"):
        run(tmp_path, tmp_path / "b.csv")
    (tmp_path / "c.jsonl").write_bytes('{"query": "甲", "response": "乙"}\n'.encode("gb18030"))
    with pytest.raises(DataError, match=r"c\.jsonl:1: not valid JSON: .*set ingest\.encoding"):
        run(tmp_path, tmp_path / "c.jsonl")


@pytest.mark.parametrize(
    ("name", "encoding"), [("a.csv", "gb18030"), ("a.jsonl.gz", "gbk"), ("a.json", "big5"), ("a.csv.zst", "utf-16")]
)
def test_other_encodings_are_read(tmp_path: Path, name: str, encoding: str) -> None:
    rows = [{"query": f"第{i}行，\n一問", "response": "答" * (i % 9)} for i in range(300)]
    source = written(tmp_path / name, rows)
    whole = source.read_bytes()
    plain = gzip.decompress(whole) if name.endswith(".gz") else whole
    if name.endswith(".zst"):
        with pa.CompressedInputStream(pa.BufferReader(whole), "zstd") as stream:
            plain = stream.read()
    data = plain.decode("utf-8-sig").encode(encoding)
    packed = {".gz": gzip.compress, ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True)}
    source.write_bytes(packed.get(source.suffix, bytes)(data))
    _, table, _ = run(tmp_path, source, encoding=encoding, shard_bytes=2000)
    assert table.select(["query", "response"]).to_pylist() == rows
    assert table["row_id"][7].as_py() == f"{name}:8"
    assert not [file for file in (tmp_path / "w").rglob("a.*") if file.is_file()]  # the copies are gone
    source.write_bytes(packed.get(source.suffix, bytes)(data + b"\xff"))
    with pytest.raises(DataError, match=rf"{name}:\d+: not {encoding} text"):
        run(tmp_path, source, encoding=encoding)


@pytest.mark.parametrize(("name", "encoding"), [("a.csv", "gb18030"), ("a.jsonl", "utf-16"), ("a.json.gz", "big5")])
def test_files_in_another_encoding_are_looked_into_before_they_are_read(
    tmp_path: Path, name: str, encoding: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recode, "BEGINNING", 300)
    rows = [{"問題": f"第{i}行，\n一問", "答案": "答", "日期": "2024/3/7"} for i in range(300)]
    source = written(tmp_path / name, rows)
    plain = gzip.decompress(source.read_bytes()) if name.endswith(".gz") else source.read_bytes()
    data = plain.decode("utf-8-sig").encode(encoding)
    source.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    columns = {"query": "問題", "response": "答案"}
    section = Ingest(source=str(source), encoding=encoding, columns=columns)
    assert describe_source(section) == "as query_response; carried, not trained: 日期"
    check_source(section)
    assert [row["query"] for row in first_rows(section, 2)] == ["第0行，\n一問", "第1行，\n一問"]
    with pytest.raises(InputError, match=rf"{source}: no adapter reads columns 問題, 答案, 日期; say what they are"):
        check_source(Ingest(source=str(source), encoding=encoding))
    with pytest.raises(
        DataError, match=rf"{source}(:\d+: not utf-32 text|: begins as utf-16 does).*mend ingest\.encoding"
    ):
        check_source(Ingest(source=str(source), encoding="utf-32"))


@pytest.mark.parametrize(
    ("marked", "encoding", "said"),
    [
        ("utf-8-sig", "gb18030", "utf-8"),
        ("utf-8-sig", "latin-1", "utf-8"),
        ("utf-16", "gb18030", "utf-16"),
        ("utf-16", "latin-1", "utf-16"),
        ("utf-32", "utf-16-le", "utf-32"),
        ("utf-32", "big5", "utf-32"),
    ],
)
def test_a_file_with_the_mark_of_another_encoding_is_refused(
    tmp_path: Path, marked: str, encoding: str, said: str
) -> None:
    source = tmp_path / "a.csv"
    source.write_bytes("query,response\n甲,乙\n".encode(marked))
    told = f"a.csv: begins as {said} does, and not as {encoding}; mend ingest.encoding"
    with pytest.raises(DataError, match=told):
        check_source(Ingest(source=str(source), encoding=encoding))
    with pytest.raises(DataError, match=told):
        run(tmp_path, source, encoding=encoding)


def test_rows_without_an_answer_are_counted(tmp_path: Path) -> None:
    rows = [{"query": f"问{i}", "response": response} for i, response in enumerate(["答", "", " \n", "谢邀"])]
    report, table, _ = run(tmp_path, written(tmp_path / "a.jsonl", rows))
    assert table.num_rows == 4 and report.counts == {"rows without an answer": 2}
    assert "; 2 rows without an answer" in report.summary


def test_what_is_wrong_with_a_copy_is_said_of_the_file(tmp_path: Path) -> None:
    source = tmp_path / "a.json"
    source.write_bytes('[{"query": "问", "response": "答"},\n{"query": "问"'.encode("gb18030"))
    for look in (check_source, lambda section: run(tmp_path, source, encoding=section.encoding)):
        with pytest.raises(DataError, match=rf"{source}: broken after element 1"):
            look(Ingest(source=str(source), encoding="gb18030"))


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        ("编号,问题,答案\n1,问,答\n", {}, r"say what they are, such as 'ingest.columns={query: 问题, response: 答案}'"),
        ("ID,Title,Reply text\n1,问,答\n", {}, r"rename them to one of these sets"),
        ("编号;问题;答案\n1;问;答\n", {}, r"if ; is what separates them, save the file with commas"),
        ("编号,问题,答案\n1,问,答\n", {"问题": "query"}, r"the name that is read comes first: {query: 问题}"),
        (
            "编号,问题,答案\n1,问,答\n",
            {"query": "提问", "response": "答案"},
            r"提问, which ingest.columns names for query",
        ),
    ],
)
def test_columns_that_nothing_reads_are_refused_with_a_way_out(
    tmp_path: Path, text: str, columns: dict[str, str | None], said: str
) -> None:
    source = tmp_path / "a.csv"
    source.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        check_source(Ingest(source=str(source), columns=columns))


def test_a_column_that_is_named_and_not_there_is_told_before_all_is_read(tmp_path: Path) -> None:
    source = written(tmp_path / "a.csv", [{"问题": "问", "答案": "答", "点赞数": 7}])
    columns = {"query": "问题", "response": "答案", "upvotes": "点赞"}
    section = Ingest(source=str(source), columns=columns)
    told = describe_source(section)
    assert told.endswith("in none of the first rows: 点赞, which ingest.columns names")
    with pytest.raises(DataError, match=r"no row has column 点赞, which ingest\.columns names for upvotes"):
        run(tmp_path, source, columns=columns)


def test_utf_16_is_told_by_its_mark(tmp_path: Path) -> None:
    source = tmp_path / "a.csv"
    source.write_bytes("query,response\n问,答\n".encode("utf-16"))
    with pytest.raises(DataError, match=r"a\.csv:1: not UTF-8 text .*ingest\.encoding: utf-16$"):
        check_source(Ingest(source=str(source)))


def test_what_is_not_in_the_encoding_at_all_is_named_with_its_file(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    source.write_bytes(b'{"query": "q", "response": "r"}')  # UTF-16 begins with a mark that is not there
    with pytest.raises(DataError, match=rf"{source}:\d+: not utf-16 text .*mend ingest\.encoding"):
        run(tmp_path, source, encoding="utf-16")


def test_a_long_field_is_no_obstacle(tmp_path: Path) -> None:
    source = written(tmp_path / "a.csv", [{"query": "长", "response": "文" * 140_000}])
    _, table, _ = run(tmp_path, source)
    assert len(table["response"][0].as_py()) == 140_000


def test_csv_carries_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('query,response,note\n"问,甲","第一行\n第二行",x\n乙,答,y\n', encoding="utf-8")
    _, table, _ = run(tmp_path, tmp_path / "a.csv")
    assert table["response"].to_pylist() == ["第一行\n第二行", "答"]
    assert table["note"].to_pylist() == ["x", "y"]


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ('q1,"never closed\nq2,r2\n', ["q0"]),
        ('q1,"r1" more\nq2,r2\n', ["q0", "q2"]),
        ('q1,"closed in the next row\nq2,"r2"\nq3,r3\n', ["q0", "q3"]),
        ('q1,"he said "yes""\nq2,r2\n', ["q0", "q2"]),
        ('"q1\n', ["q0"]),
    ],
)
@pytest.mark.parametrize("size", [1 << 24, 10])
@pytest.mark.parametrize("adapter", ["auto", "columns"])
def test_quotation_marks_do_not_make_one_row_of_several(
    tmp_path: Path, text: str, read: list[str], size: int, adapter: str
) -> None:
    source = tmp_path / "b.csv"
    source.write_text(f"query,response\nq0,r0\n{text}", encoding="utf-8")
    report, table, dropped = run(tmp_path, source, max_broken=1, shard_bytes=size, adapter=adapter)
    assert table["query"].to_pylist() == read and report.broken == 1
    assert dropped["row_id"].to_pylist() == ["b.csv:2"]
    assert dropped["reason"][0].as_py().startswith("its quotation marks cannot be told apart")


def test_quotation_marks_inside_plain_fields_are_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('query,response\n他说"好",""\n"他说""好""",答"\n', encoding="utf-8")
    table = run(tmp_path, tmp_path / "a.csv")[1]
    assert table.select(["query", "response"]).to_pylist() == [
        {"query": '他说"好"', "response": ""},
        {"query": '他说"好"', "response": '答"'},
    ]


def test_rows_do_not_depend_on_the_shards(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", rows_of(700))
    digests = {
        run(tmp_path, source, shard_bytes=size, concurrency=c)[0].digest
        for size, c in ((1000, 2), (9999, 1), (1 << 20, None))
    }
    assert len(digests) == 1


def test_limit_and_own_ids(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"id": f"k{i}", **row} for i, row in enumerate(rows_of(50))])
    report, table, _ = run(tmp_path, source, limit=20, shard_bytes=500)
    assert report.rows == 20
    assert table["row_id"].to_pylist() == [f"k{i}" for i in range(20)]
    assert "id" not in table.column_names


def test_broken_lines_are_set_aside_and_counted(tmp_path: Path) -> None:
    rows = rows_of(40)
    source = write_lines(tmp_path / "a.jsonl", rows)
    lines = source.read_bytes().splitlines()
    lines[6] = b'{"query": "x", "resp'
    lines[17] = '{"query": "只有问题"}'.encode()
    lines[30] = b'{"query": "\xff", "response": "y"}'
    lines[35] = b"[1]"
    source.write_bytes(b"\n".join(lines))
    with pytest.raises(DataError) as caught:
        run(tmp_path, source)
    message = str(caught.value)
    assert "4 broken rows, read as query_response; ingest.max_broken allows 0. Mend them, or raise it" in message
    for number, reason in (
        (7, "not valid JSON"),
        (18, "column response is missing; the row has query"),
        (31, "not valid JSON"),
        (36, "not a JSON object"),
    ):
        assert f"a.jsonl:{number}: {reason}" in message
    report, table, dropped = run(tmp_path, source, max_broken=4)
    assert (report.rows, report.broken) == (36, 4)
    assert dropped["row_id"].to_pylist() == ["a.jsonl:7", "a.jsonl:18", "a.jsonl:31", "a.jsonl:36"]
    assert table["pos"].to_pylist() == [i for i in range(40) if i not in (6, 17, 30, 35)]


@pytest.mark.parametrize("adapter", ["auto", "columns"])
def test_half_a_character_breaks_its_row_alone(tmp_path: Path, adapter: str) -> None:
    rows = rows_of(1200)
    rows[0]["response"], rows[7]["query"], rows[1100]["upvotes"] = "半\ud83d", "\ude00", 10**30
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(DataError, match=r"2 broken rows(.|\n)*a\.jsonl:1: holds half a character"):
        run(tmp_path, source, adapter=adapter)
    report, table, dropped = run(tmp_path, source, adapter=adapter, max_broken=2)
    assert (report.rows, report.broken) == (1198, 2)
    assert dropped["row_id"].to_pylist() == ["a.jsonl:1", "a.jsonl:8"]
    assert "半\\ud83d" in dropped["text"][0].as_py()
    assert table["pos"].to_pylist() == [i for i in range(1200) if i not in (0, 7)]
    assert report.widened == {"upvotes": "string"} and table["upvotes"][1098].as_py() == str(10**30)


def test_a_value_of_another_type_widens_its_column_in_all_rows(tmp_path: Path) -> None:
    rows = rows_of(1500)
    rows[1200]["upvotes"] = "many"
    for size in (2000, 1 << 20):
        report, table, _ = run(tmp_path, write_lines(tmp_path / "a.jsonl", rows), shard_bytes=size)
        assert table["upvotes"].to_pylist() == [str(row["upvotes"]) for row in rows]
        assert report.widened == {"upvotes": "string"} and "widened: upvotes to string" in report.summary


def test_wrong_adapter_names_the_one_that_fits(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", rows_of(3))
    with pytest.raises(InputError, match=r"needs column .*INSTRUCTION.*adapter query_response fits") as caught:
        run(tmp_path, source, adapter="zhihu_kol")
    assert caught.value.exit_code == 2
    other = write_lines(tmp_path / "b.jsonl", [{"a": 1}])
    with pytest.raises(InputError, match=r"no adapter reads columns a; .* query, response \(query_response\); "):
        run(tmp_path, other)
    other = write_lines(tmp_path / "c.jsonl", [{"Query": "问", "respnse": "答"}])
    with pytest.raises(InputError, match=r"; rename Query to query and respnse to response for adapter query_response"):
        run(tmp_path, other)


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.parquet", b"PAR1junk"), ("a.jsonl.gz", b"junk"), ("a.json", b'[{"query": "a", "response": "b"},')],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        run(tmp_path, tmp_path / name)


def test_rows_stand_in_name_order_whichever_shard_is_done_first(tmp_path: Path) -> None:
    files = {"part-0": range(400), "part-1": range(400, 410), "part-2": range(410, 430)}
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("part-2", "part-0", "part-1"):
        write_lines(folder / f"{name}.jsonl", [{"query": f"问题{i}", "response": "答"} for i in files[name]])
    section = Ingest(source=str(folder), shard_bytes=5000)
    place = Place(Workspace(str(tmp_path / "w")), "ingest", "f")
    digests = set()
    for late in ([], [0, 1], [3]):
        for index in late:  # done again, and so after all others
            place.local("rows", "commits", f"{index:05d}.json").unlink()
        report = read_source(section, place)
        commits = sorted(place.local("rows", "commits").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        assert len(commits) > 5
        assert {int(path.stem) for path in commits[len(commits) - len(late) :]} == set(late)
        table = table_of(place, report.outputs.rows)
        assert table["query"].to_pylist() == [f"问题{i}" for i in range(430)]
        assert table["pos"].to_pylist() == list(range(430))
        digests.add(report.digest)
    assert len(digests) == 1


def test_the_system_prompt_stands_where_it_is_trained(tmp_path: Path) -> None:
    talk = [
        {"from": who, "value": said} for who, said in (("human", "一"), ("gpt", "二"), ("human", "三"), ("gpt", "四"))
    ]
    told = {"from": "system", "value": "自带"}
    source = write_lines(
        tmp_path / "a.jsonl", [{"conversations": turns} for turns in (talk, [told, *talk], talk[:2], [told, *talk[:2]])]
    )
    rows = run(tmp_path, source, system="你是{{谁}}", replace={"{{谁}}": "医生"})[1].to_pylist()
    assert [row["system"] for row in rows] == ["你是医生", "自带"] * 2
    said = [[(turn["role"], turn["content"]) for turn in messages_of(row)] for row in rows]
    chat = [("user", "一"), ("assistant", "二"), ("user", "三"), ("assistant", "四")]
    assert said == [[("system", system), *turns] for turns in (chat, chat[:2]) for system in ("你是医生", "自带")]


def test_real_zhihu_sample(tmp_path: Path, shared_data: Path) -> None:
    report, table, _ = run(tmp_path, shared_data / "zhihu_kol_sample.parquet", shard_bytes=1 << 20)
    assert (report.adapter, report.rows, report.broken) == ("zhihu_kol", 6540, 0)
    digest = RowDigest()
    digest.update(table)
    assert digest.hexdigest() == report.digest
    assert table.schema.field("upvotes").type == pa.int64()


def test_a_further_source_is_read_once(tmp_path: Path) -> None:
    section = Ingest(source=str(write_lines(tmp_path / "a.jsonl", rows_of(30))))
    place = Place(Workspace(str(tmp_path / "w")), "train", "f").within("data", "1")
    assert place.path() == str(tmp_path / "w" / "train" / "f" / "data" / "1")
    first = read_once(section, place)
    assert table_of(place, first.report.outputs.rows)["upvotes"].to_pylist() == list(range(30))
    (tmp_path / "a.jsonl").unlink()
    again = read_once(section, place)
    assert again.report == first.report and again.paths(again.report.outputs.rows) == first.paths(
        first.report.outputs.rows
    )


def test_what_an_earlier_version_has_read_is_not_read_again(tmp_path: Path) -> None:
    section = Ingest(source=str(write_lines(tmp_path / "a.jsonl", rows_of(3))))
    place = Place(Workspace(str(tmp_path / "w")), "split/f", "test_source")
    report = {
        "summary": "3 rows from 1 file as query_response, 0 broken",
        "digest": "0" * 32,
        "rows": 3,
        "broken": 0,
        "adapter": "query_response",
        "source": section.source,
        "columns": ["row_id", "pos", "query", "response", "upvotes"],
        "outputs": {"rows": ["rows/data/00000-0.rows.parquet"], "dropped": ["rows/data/00000-0.dropped.parquet"]},
    }
    place.finish(json.dumps({"report": report}).encode())
    read = read_once(section, place)
    assert read.report.model_dump(exclude_unset=True) == report
    assert read.paths(read.report.outputs.rows) == [place.path("rows/data/00000-0.rows.parquet")]
