"""The stage ingest: what its output follows from, and what stops it beforehand."""

from pathlib import Path

import pytest

from pipelines.artifacts.stage import Inputs
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.ingest.stage import IngestStage
from pipelines.recipe.ingest import Ingest
from tests.pipelines.sources.samples import rows_of, write_lines


def test_fingerprint_follows_the_content(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", rows_of(5))
    stage, faster = (
        IngestStage(Ingest(source=str(source), concurrency=count, shard_bytes=99 * count)) for count in (1, 2)
    )
    before = stage.fingerprint_inputs()
    assert before == faster.fingerprint_inputs()
    write_lines(source, rows_of(6))
    assert stage.fingerprint_inputs() != before


def test_what_workspaces_are_found_by_stays(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"query": "一", "response": "甲"}\n', encoding="utf-8")
    section = {"adapter": "auto", "encoding": "utf-8-sig", "system": None, "replace": {}, "limit": None}
    assert IngestStage(Ingest(source=str(tmp_path / "a.jsonl"))).fingerprint_inputs() == {
        "section": {**section, "shard_bytes": 16 << 20},
        "files": [["a.jsonl", "c47c684495c94577ac5167cd18a1aa0e"]],
    }
    assert IngestStage(Ingest(source="hf://owner/name", limit=3)).fingerprint_inputs() == {
        "section": {**section, "limit": 3, "shard_bytes": 16 << 20},
        "files": "hf://owner/name",
    }


@pytest.mark.usefixtures("ray_cluster")
def test_the_stage_reads_its_source(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", rows_of(5))
    stage = IngestStage(Ingest(source=str(source)))
    assert stage.preflight() == []
    report = stage.run(Place(Workspace(str(tmp_path / "w")), "ingest", "f"), Inputs())
    assert isinstance(report, stage.reports)
    assert (report.rows, report.summary) == (
        5,
        "5 rows from 1 file as query_response, 0 broken; carried, not trained: upvotes",
    )
    source.unlink()
    (problem,) = stage.preflight()
    assert problem.key == "" and problem.message.startswith(f"ingest.source {source}: no such file")
