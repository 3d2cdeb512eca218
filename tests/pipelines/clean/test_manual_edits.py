"""Export, edit, import: what a person changes in the file becomes the data, and is counted."""

import csv
import io
import json
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.artifacts.files import Destination
from pipelines.artifacts.reports.clean import CleanReport, EditCounts
from pipelines.artifacts.reports.rows import RowsReport
from pipelines.artifacts.rows import MESSAGES, turns_said
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.clean.manual_edits import _put, export_rows
from pipelines.clean.stage import CleanInputs, CleanStage
from pipelines.errors import DataError, InputError
from pipelines.recipe.clean import Clean
from tests.outputs import finished, finished_rows, rows_of

PROCESS: list[Any] = [{"text_length_filter": {"min_len": 5}}, {"alphanumeric_filter": {"min_ratio": 0.6}}]
TEXTS = ["这是第一个回答", "短", "这是第三个回答", "！！！！！！", "这是第五个回答", "这是第六个回答，很好"]
TABLE = pa.table(
    {
        "row_id": [f"r{i}" for i in range(6)],
        "pos": [0, 10, 20, 30, 40, 50],
        "response": TEXTS,
        "upvotes": pa.array([5, 90, None, 3, 100, 1], pa.int64()),
        "score": [0.5, 1.0, 0.25, 2.0, 3.0, 4.0],
    }
)


def to(path: Path) -> Destination:
    return Destination("--export", str(path), "--overwrite")


def section_of(edited: Path | None = None, dialect: str = "zh", process: list[Any] = PROCESS) -> Clean:
    section = {"process": process, "dialect": dialect, "edited": str(edited) if edited else None}
    return Clean.model_validate(section)


@pytest.fixture
def source(tmp_path: Path) -> Output[RowsReport]:
    return ingested(Workspace(str(tmp_path / "w")), TABLE.slice(0, 3), TABLE.slice(3))


def ingested(workspace: Workspace, *tables: pa.Table) -> Output[RowsReport]:
    place = Place(workspace, "ingest", "in")
    names = [f"rows/{index}.parquet" for index in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with workspace.parquet_writer(place.path(name), table.schema) as writer:
            writer.write_table(table)
    return finished_rows(place, sum(table.num_rows for table in tables), names)


def cleaned(source: Output[RowsReport], name: str, section: Clean) -> Output[CleanReport]:
    place = Place(source.folder.workspace, "clean", name)
    return finished(place, CleanStage(section).run(place, CleanInputs(source)))


def read(output: Output[CleanReport]) -> list[dict[str, Any]]:
    return rows_of(output, output.report.outputs.rows)


def lines_of(path: Path) -> list[dict[str, Any]]:
    with open(path, encoding="utf-8-sig", newline="") as stream:
        return list(csv.DictReader(stream)) if path.suffix == ".csv" else [json.loads(line) for line in stream]


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as stream:
        if path.suffix == ".csv":
            writer = csv.DictWriter(stream, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
        else:
            stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_what_was_exported_and_edited_becomes_the_data(
    source: Output[RowsReport], tmp_path: Path, ray_cluster: None, suffix: str
) -> None:
    before = cleaned(source, "before", section_of())
    path = tmp_path / f"rows.{suffix}"
    assert export_rows(before, source, to(path)) == 6
    lines = {line["row_id"]: line for line in lines_of(path)}
    assert [str(lines[f"r{i}"]["kept"]).lower() for i in range(6)] == ["true", "false", "true", "false", "true", "true"]
    assert lines["r1"]["operator"] == "text_length_filter" and "text_len 1 is below" in lines["r1"]["reason"]
    assert float(lines["r3"]["alnum_ratio"]) == 0 and float(lines["r0"]["text_len"]) == 7
    untouched = cleaned(source, "untouched", section_of(path))
    assert untouched.report.manual_edits == EditCounts(untouched=4) and read(untouched) == read(before)
    lines["r0"]["response"] = "改过的第一个回答"
    lines["r3"]["kept"], lines["r3"]["response"] = "true", "放回来的回答"
    lines["r4"]["kept"] = "false"
    lines["r5"]["upvotes"] = "17" if suffix == "csv" else 17
    del lines["r2"]
    write_lines(path, list(lines.values()))
    after = cleaned(source, "after", section_of(path))
    assert after.report.manual_edits == EditCounts(changed=3, dropped=1, restored=1)
    assert after.report.summary.startswith("4 of 6 rows stay; dropped: ")
    assert after.report.summary.endswith("; by hand: 3 changed, 1 dropped, 1 restored")
    assert [(row["row_id"], row["pos"], row["response"], row["upvotes"], row["score"]) for row in read(after)] == [
        ("r0", 0, "改过的第一个回答", 5, 0.5),
        ("r2", 20, TEXTS[2], None, 0.25),
        ("r3", 30, "放回来的回答", 3, 2.0),
        ("r5", 50, TEXTS[5], 17, 4.0),
    ]
    dropped = rows_of(after, after.report.outputs.dropped)
    assert ("r4", "edited_by_hand") in [(row["row_id"], row["operator"]) for row in dropped]
    assert after.report.rows == 4


def test_where_cleaning_reorders_a_row_comes_back_at_the_end(
    source: Output[RowsReport], tmp_path: Path, ray_cluster: None
) -> None:
    top = [*PROCESS, {"topk_specified_field_selector": {"field_key": "score", "topk": 3}}]
    write_lines(tmp_path / "rows.jsonl", [{"row_id": "r2", "kept": True}])
    after = cleaned(source, "top", section_of(tmp_path / "rows.jsonl", "data_juicer", top))
    assert [(row["row_id"], row["pos"]) for row in read(after)] == [("r5", 0), ("r4", 1), ("r0", 2), ("r2", 3)]


def test_somebodys_work_is_not_written_over(source: Output[RowsReport], tmp_path: Path, ray_cluster: None) -> None:
    before = cleaned(source, "before", section_of())
    path = tmp_path / "rows.csv"
    path.write_text("hours of work", encoding="utf-8")
    with pytest.raises(InputError, match=r"rows\.csv exists already; name another file"):
        export_rows(before, source, to(path))
    assert path.read_text(encoding="utf-8") == "hours of work"
    before.folder.workspace.remove(source.paths(source.report.outputs.rows)[1])
    with pytest.raises(DataError):
        export_rows(before, source, to(tmp_path / "new.jsonl"))
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["rows.csv"]  # no half of a file


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_what_is_changed_in_a_conversation_is_changed_where_it_is_trained(
    tmp_path: Path, ray_cluster: None, suffix: str
) -> None:
    said = [("system", "你是医生"), ("user", "问一"), ("assistant", "答一"), ("user", "问二"), ("assistant", "答二")]
    talk = [{"role": role, "content": text} for role, text in said]
    columns = {name: [text] * 3 for name, text in (("system", "你是医生"), ("query", "问二"), ("response", "答二"))}
    table = pa.table(
        {"row_id": ["a", "b", "c"], "pos": [0, 1, 2], **columns, "messages": pa.array([talk] * 3, MESSAGES)}
    )
    source = ingested(Workspace(str(tmp_path / "w")), table)
    keep: list[Any] = [{"text_length_filter": {"min_len": 1}}]
    before = cleaned(source, "before", section_of(process=keep))
    file = tmp_path / f"rows.{suffix}"
    export_rows(before, source, to(file))
    lines = lines_of(file)
    lines[0]["response"], lines[0]["system"] = "改过的答", "你是护士"
    third = [*talk[:4], {"role": "assistant", "content": "整段改过"}]
    lines[2]["messages"] = json.dumps(third, ensure_ascii=False) if suffix == "csv" else third
    write_lines(file, lines)
    after = cleaned(source, "after", section_of(file, process=keep))
    assert after.report.manual_edits == EditCounts(changed=2, untouched=1)
    first, second, last = read(after)
    assert [turn["content"] for turn in first["messages"]] == ["你是护士", "问一", "答一", "问二", "改过的答"]
    assert turns_said(second) == talk
    assert (turns_said(last), last["response"]) == (third, "整段改过")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"row_id": "zz", "kept": True}, r"row zz \(1 in all\) is not among the rows"),
        ({"row_id": "r0", "kept": True, "upvotes": "viele"}, "row r0: upvotes cannot be 'viele'"),
    ],
)
def test_rows_and_values_that_do_not_fit_are_named(
    source: Output[RowsReport], tmp_path: Path, ray_cluster: None, line: dict[str, Any], said: str
) -> None:
    write_lines(tmp_path / "rows.jsonl", [line])
    with pytest.raises(DataError, match=said):
        cleaned(source, "wrong", section_of(tmp_path / "rows.jsonl"))


def test_the_file_is_part_of_what_decides_the_output(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(InputError, match="no such file"):
        CleanStage(section_of(path)).fingerprint_inputs()
    write_lines(path, [{"row_id": "r0", "kept": True}])
    first = CleanStage(section_of(path)).fingerprint_inputs()
    path.write_text('{"row_id": "r0", "kept": false}')
    second = CleanStage(section_of(path)).fingerprint_inputs()
    assert second != first != CleanStage(section_of()).fingerprint_inputs()


def test_what_json_has_not_is_refused_by_its_row() -> None:
    with pytest.raises(DataError, match=r"^row a:1: JSON has no such value \(.*date.*\)"):
        _put(io.StringIO(), {"row_id": "a:1", "born": date(2020, 1, 1)})
