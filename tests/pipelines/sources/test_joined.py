"""Several sources, each read in its own way, and rows of one's own beside synthesized ones, are one data set."""

from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.artifacts.reports.rows import IngestReport
from pipelines.artifacts.stage import Inputs, Manifest, Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import DataError, RecipeError
from pipelines.ingest.stage import CombineInputs, CombineStage, IngestStage
from pipelines.recipe.ingest import Ingest
from rayjobs import pipeline
from tests.pipelines.sources.samples import rows_of, write_lines
from tests.pipelines.sources.test_read import table_of

pytestmark = pytest.mark.usefixtures("ray_cluster")

TURNS = {"messages": [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "一二三四", strict=True)]}


def sources_of(tmp_path: Path) -> Ingest:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("正文。", encoding="utf-8")
    write_lines(tmp_path / "rows.jsonl", [*rows_of(5), {"query": "x"}])
    write_lines(tmp_path / "turns.jsonl", [{**TURNS, "upvotes": 2.5, "id": n} for n in (7, 8)])
    chat = [{"sender": s, "time": 1e9 + n, "text": t} for n, (s, t) in enumerate([("小明", "问"), ("爱莉", "答")])]
    write_lines(tmp_path / "chat.jsonl", [*chat, {"sender": "小明", "time": 1e9 + 9, "text": "嗯"}])
    return Ingest.model_validate(
        {
            "source": str(tmp_path / "rows.jsonl"),
            "max_broken": 1,
            "sources": {
                "turns": {"source": str(tmp_path / "turns.jsonl"), "system": "你是诗人"},
                "chat": {"source": str(tmp_path / "chat.jsonl"), "chat_log": {"assistant": "爱莉"}},
                "docs": {"source": str(tmp_path / "docs")},
            },
        }
    )


def test_each_source_is_read_in_its_own_way(tmp_path: Path) -> None:
    stage = IngestStage(sources_of(tmp_path))
    assert stage.preflight() == []
    place = Place(Workspace(str(tmp_path / "w")), "ingest", "f")
    report = stage.run(place, Inputs())
    table, dropped = table_of(place, report.outputs.rows), table_of(place, report.outputs.dropped)
    assert table["row_id"].to_pylist() == [
        *(f"rows.jsonl:{n}" for n in range(1, 6)),
        *("turns/7", "turns/8", "chat/chat.jsonl:1", "docs/a.md:1"),
    ]
    assert table["response"].to_pylist()[5:] == ["四", "四", "答", "正文。"]
    assert table["system"].to_pylist() == [None] * 5 + ["你是诗人"] * 2 + [None] * 2
    assert len(table["messages"][5].as_py()) == 5 and table["speaker"][7].as_py() == "小明"
    assert table["upvotes"].to_pylist()[4:7] == [4.0, 2.5, 2.5] and report.widened == {"upvotes": "double"}
    assert dropped["row_id"].to_pylist() == ["rows.jsonl:6", "chat/chat.jsonl:3"]
    places = [*table["pos"].to_pylist(), *dropped["pos"].to_pylist()]
    assert len(set(places)) == len(places) and table["pos"].to_pylist() == sorted(table["pos"].to_pylist())
    assert (report.rows, report.broken, report.columns) == (9, 1, table.column_names)
    assert report.adapter == "chat_log, messages, query_response, text"
    assert report.counts == {"messages left out: one word that says little": 1}


def test_what_decides_the_rows_is_in_the_fingerprint_and_faults_are_named(tmp_path: Path) -> None:
    section = sources_of(tmp_path)
    before = IngestStage(section).fingerprint_inputs()
    (tmp_path / "docs" / "a.md").write_text("改了。", encoding="utf-8")
    assert IngestStage(section).fingerprint_inputs() != before
    (tmp_path / "docs" / "a.md").unlink()
    (problem,) = IngestStage(section).preflight()
    assert problem.key == "ingest.sources.docs" and "no such file" in problem.message


def test_names_that_meet_are_refused(tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"query": "问", "response": "答", "id": "b/1"}])
    write_lines(tmp_path / "b.jsonl", [{"query": "问", "response": "答", "id": "1"}])
    sources = {"b": {"source": str(tmp_path / "b.jsonl")}}
    section = Ingest.model_validate({"source": str(tmp_path / "a.jsonl"), "sources": sources})
    with pytest.raises(DataError, match="2 rows have the key 'b/1'"):
        IngestStage(section).run(Place(Workspace(str(tmp_path / "w")), "ingest", "f"), Inputs())


def ingested(tmp_path: Path, name: str, rows: list[dict[str, object]]) -> Output[IngestReport]:
    place = Place(Workspace(str(tmp_path / "w")), name, "f")
    source = write_lines(tmp_path / f"{name}.jsonl", rows)
    report = IngestStage(Ingest(source=str(source))).run(place, Inputs())
    return Output(name, place, Manifest[IngestReport](report=report))


def test_rows_of_ones_own_and_synthesized_ones_are_combined(tmp_path: Path) -> None:
    own = ingested(tmp_path, "ingest", [{"query": "问", "response": "答", "n": 1, "who": "我"}])
    made = ingested(tmp_path, "synthesize", [{"query": "造", "response": "造的", "style": "严肃", "n": 2}])
    place = Place(Workspace(str(tmp_path / "w")), "combine", "f")
    report = CombineStage().run(place, CombineInputs(own, made))
    table: pa.Table = table_of(place, report.outputs.rows)
    assert table["query"].to_pylist() == ["问", "造"] and table["pos"].to_pylist() == [0, 1]
    assert table["style"].to_pylist() == [None, "严肃"] and table["who"].to_pylist() == ["我", None]
    assert report.rows == 2 and report.outputs.dropped


def test_a_recipe_may_have_both(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    text = """
name: both
ingest: {source: rows.jsonl}
synthesize:
  model: m
  endpoints: [{base_url: http://127.0.0.1:1/v1}]
  dimensions: {a: [b]}
  styles: {s: {template: "{a}"}}
  queries: [q]
refine: {}
split: {test_ratio: 0.1}
"""
    recipe.write_text(text, encoding="utf-8")
    names = [stage.name for stage in pipeline.stages_of(pipeline.load(str(recipe)))]
    assert names == ["ingest", "synthesize", "refine", "combine", "split"]
    recipe.write_text("name: none\nsplit: {test_ratio: 0.1}\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="ingest"):
        pipeline.load(str(recipe))
