"""Export: where it may write, and what it writes."""

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.files import refusal
from pipelines.artifacts.reports.rows import IngestReport, RowFiles
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import InputError
from pipelines.export.stage import ExportInputs, ExportStage
from pipelines.recipe.paths import paths_read
from pipelines.recipe.schema import Recipe
from pipelines.recipe.split import Export
from tests.outputs import finished, finished_rows


def refused(path: str, **sections: Any) -> list[str]:
    """The keys whose files would be written over."""
    recipe = Recipe.model_validate({"name": "r", "ingest": {"source": "rows.jsonl"}, **sections})
    for overwrite in (True, False):  # whatever is said
        (target,) = ExportStage(Export(path=path, overwrite=overwrite), paths_read(recipe)).destinations()
        reason = refusal(target, None)
    if reason is None:
        return []
    assert target.name == "export.path"
    assert reason.startswith(f"{path} is what ")
    assert reason.endswith(" names, and would be written over; give it another name")
    return [reason.removeprefix(f"{path} is what ").partition(" names, ")[0]]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("rows.jsonl", "rows.jsonl"),
        ("./data/../rows.jsonl", "file://{here}/rows.jsonl"),
        ("{here}/data/all.jsonl", "data"),
        ("data/all.jsonl", "data/*.jsonl"),
        ("data/a/all.jsonl", "data/**/*.jsonl"),
        ("s3://bucket/rows.parquet", "s3://bucket/"),
        ("link.jsonl", "rows.jsonl"),
    ],
)
def test_what_the_recipe_reads_is_not_written_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to("rows.jsonl")
    path, source = path.format(here=tmp_path), source.format(here=tmp_path)
    assert refused(path, ingest={"source": source}) == ["ingest.source"]
    assert refused(path, split={"test_source": source}, ingest={"source": "x.jsonl"}) == ["split.test_source"]


def test_nor_is_any_other_file_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "questions").mkdir()
    (tmp_path / "template.jsonl").write_text("{% for m in messages %}{% endfor %}", encoding="utf-8")
    edited = {"process": ["clean_email_mapper"], "edited": "edited.jsonl", "assets": {"m": "a/m.jsonl#sha256=0"}}
    train = {
        "model": "model",
        "data": ["train#10", "more.jsonl#5", "names", "hf://owner/name"],
        "sources": {"names": {"source": "names/*.jsonl"}},
        "chat_template": "template.jsonl",
    }
    sections = {
        "clean": edited,
        "split": {"test_ratio": 0.1},
        "train": train,
        "evaluate": {"datasets": ["test", {"benchmark": "general_qa", "path": "questions", "subsets": ["a"]}]},
    }
    for path, key in {
        "edited.jsonl": "clean.edited",
        "a/m.jsonl": "clean.assets.m",
        "more.jsonl": "train.data[1]",
        "names/all.jsonl": "train.sources.names.source",
        "model/rows.parquet": "train.model",
        "template.jsonl": "train.chat_template",
        "questions/a.jsonl": "evaluate.datasets[1].path",
    }.items():
        assert refused(path, **sections) == [key]
    for path in ("train/rows.jsonl", "names.jsonl", "rows-clean.jsonl", "a/n.jsonl"):
        assert refused(path, **sections) == []


def test_other_files_may_be_written() -> None:
    for source in ("rows.jsonl", "data/*.csv", "data", "hf://owner/name", "s3://bucket/in/*.jsonl"):
        assert refused("rows-clean.jsonl", ingest={"source": source}) == []
        assert refused("memory://bucket/out/rows.jsonl", ingest={"source": source}) == []


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_columns_are_those_that_were_read(tmp_path: Path, suffix: str) -> None:
    workspace = Workspace(str(tmp_path / "w"))
    table = pa.table({"row_id": ["a", "b"], "pos": [4, 7], "response": ["甲", None], "added": [1, 2]})
    place = Place(workspace, "clean", "f")
    with workspace.parquet_writer(place.path("0.parquet"), table.schema) as writer:
        writer.write_table(table)
    rows = finished_rows(place, 2, ["0.parquet"], digest="c")
    columns = ["row_id", "pos", "response"]
    ingest = finished(
        Place(workspace, "ingest", "f"),
        IngestReport(
            summary="", digest="i", rows=2, broken=0, adapter="columns", source="x", columns=columns,
            outputs=RowFiles(rows=[]),
        ),
    )  # fmt: skip
    path = tmp_path / f"rows.{suffix}"
    stage = ExportStage(Export(path=str(path)), {})
    inputs = ExportInputs(rows, ingest)
    report = stage.run(Place(workspace, "export", "f"), inputs)
    assert report.model_dump() == {
        "summary": f"2 rows in {path}",
        "digest": "c",
        "rows": 2,
        "written": {str(path): path.stat().st_size},
    }
    wanted = [{"row_id": "a", "response": "甲"}, {"row_id": "b", "response": None}]
    assert read(path) == wanted
    assert inputs.digests() == {"clean": "c"}
    stage.run(Place(workspace, "export", "f"), ExportInputs(rows, None))
    assert read(path) == table.to_pylist()


def read(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_bytes_are_not_written_as_text(tmp_path: Path) -> None:
    workspace = Workspace(str(tmp_path / "w"))
    table = pa.table({"row_id": ["a"], "pos": [0], "picture": [{"bytes": b"x"}]})
    place = Place(workspace, "ingest", "f")
    with workspace.parquet_writer(place.path("0.parquet"), table.schema) as writer:
        writer.write_table(table)
    inputs = ExportInputs(finished_rows(place, 1, ["0.parquet"]), None)
    with pytest.raises(InputError, match=r"export\.path: column picture holds bytes, which JSON has not; end it in"):
        ExportStage(Export(path=str(tmp_path / "rows.jsonl")), {}).run(Place(workspace, "export", "f"), inputs)
    ExportStage(Export(path=str(tmp_path / "rows.parquet")), {}).run(Place(workspace, "export", "f"), inputs)
    assert read(tmp_path / "rows.parquet") == table.to_pylist()
