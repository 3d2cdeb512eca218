"""Export, edit, import: what a person changes in the file becomes the data, and is counted."""

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from pipelines.clean.by_hand import export_rows, read_edited
from pipelines.clean.stage import clean, determinants
from pipelines.errors import DataError, InputError
from pipelines.recipe import Recipe
from pipelines.shards import read_tables
from pipelines.workspace import Place, Workspace

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


def recipe(edited: Path | None = None, dialect: str = "zh", process: list[Any] = PROCESS) -> Recipe:
    section = {"process": process, "dialect": dialect, "edited": str(edited) if edited else None}
    return Recipe.model_validate({"name": "r", "ingest": {"source": "none"}, "clean": section})


@pytest.fixture
def source(tmp_path: Path) -> Place:
    workspace = Workspace(str(tmp_path / "w"))
    found = Place(workspace, "ingest", "in")
    paths = [found.path("rows", f"{index}.parquet") for index in range(2)]
    for index, path in enumerate(paths):
        with workspace.parquet_writer(path, TABLE.schema) as writer:
            writer.write_table(TABLE.slice(3 * index, 3))
    found.finish({"report": {"digest": "d", "outputs": {"rows": found.relative(paths)}}})
    return found


def cleaned(source: Place, name: str, made: Recipe) -> tuple[Place, dict[str, Any]]:
    found = Place(source.workspace, "clean", name, {"ingest": source})
    report = clean(made, found)
    found.finish({"report": report})
    return found, report


def read(place: Place, kind: str = "rows") -> list[dict[str, Any]]:
    return [row for table in read_tables(place.workspace, place.outputs(kind)) for row in table.to_pylist()]


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
    source: Place, tmp_path: Path, ray_cluster: None, suffix: str
) -> None:
    before, _ = cleaned(source, "before", recipe())
    path = tmp_path / f"rows.{suffix}"
    assert export_rows(before, path) == 6
    lines = {line["row_id"]: line for line in lines_of(path)}
    assert [str(lines[f"r{i}"]["kept"]).lower() for i in range(6)] == ["true", "false", "true", "false", "true", "true"]
    assert lines["r1"]["operator"] == "text_length_filter" and "text_len 1 is below" in lines["r1"]["reason"]
    assert float(lines["r3"]["alnum_ratio"]) == 0 and float(lines["r0"]["text_len"]) == 7
    untouched, report = cleaned(source, "untouched", recipe(path))
    assert report["by_hand"] == {"untouched": 4} and read(untouched) == read(before)
    lines["r0"]["response"] = "改过的第一个回答"
    lines["r3"]["kept"], lines["r3"]["response"] = "true", "放回来的回答"
    lines["r4"]["kept"] = "false"
    lines["r5"]["upvotes"] = "17" if suffix == "csv" else 17
    del lines["r2"]
    write_lines(path, list(lines.values()))
    after, report = cleaned(source, "after", recipe(path))
    assert report["by_hand"] == {"changed": 3, "dropped": 1, "restored": 1}
    assert "by hand: 3 changed, 1 dropped, 1 restored" in report["summary"]
    assert [(row["row_id"], row["pos"], row["response"], row["upvotes"], row["score"]) for row in read(after)] == [
        ("r0", 0, "改过的第一个回答", 5, 0.5),
        ("r2", 20, TEXTS[2], None, 0.25),
        ("r3", 30, "放回来的回答", 3, 2.0),
        ("r5", 50, TEXTS[5], 17, 4.0),
    ]
    assert ("r4", "edited_by_hand") in [(row["row_id"], row["operator"]) for row in read(after, "dropped")]
    assert report["rows"] == 4


def test_where_cleaning_reorders_a_row_comes_back_at_the_end(source: Place, tmp_path: Path, ray_cluster: None) -> None:
    top = [*PROCESS, {"topk_specified_field_selector": {"field_key": "score", "topk": 3}}]
    write_lines(tmp_path / "rows.jsonl", [{"row_id": "r2", "kept": True}])
    after, _ = cleaned(source, "top", recipe(tmp_path / "rows.jsonl", "data_juicer", top))
    assert [(row["row_id"], row["pos"]) for row in read(after)] == [("r5", 0), ("r4", 1), ("r0", 2), ("r2", 3)]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"row_id": "r0"}', "rows.jsonl:1: kept is None, not true or false"),
        ('{"kept": true}', "rows.jsonl:1: no row_id"),
        ('{"row_id": "r0", "kept": true}\n{"row_id": "r0", "kept": false}', "rows.jsonl:2: row r0 is there twice"),
        ('{"row_id": "r0", "kept": tr', "rows.jsonl:1: Expecting value"),
        ("[1]", "rows.jsonl:1: not a JSON object"),
    ],
)
def test_a_line_that_cannot_be_used_is_named(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_edited(str(path))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"row_id": "zz", "kept": True}, r"row zz \(1 in all\) is not among the rows"),
        ({"row_id": "r0", "kept": True, "upvotes": "viele"}, "row r0: upvotes cannot be 'viele'"),
    ],
)
def test_rows_and_values_that_do_not_fit_are_named(
    source: Place, tmp_path: Path, ray_cluster: None, line: dict[str, Any], said: str
) -> None:
    write_lines(tmp_path / "rows.jsonl", [line])
    with pytest.raises(DataError, match=said):
        cleaned(source, "wrong", recipe(tmp_path / "rows.jsonl"))


def test_the_file_is_part_of_what_decides_the_output(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with pytest.raises(InputError, match="no such file"):
        determinants(recipe(path))
    write_lines(path, [{"row_id": "r0", "kept": True}])
    first = determinants(recipe(path))
    path.write_text('{"row_id": "r0", "kept": false}')
    assert determinants(recipe(path)) != first != determinants(recipe())
