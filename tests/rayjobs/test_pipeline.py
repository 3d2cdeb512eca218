"""Runs of a recipe, one after the other in the same workspace."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import DataError
from pipelines.recipe.schema import Recipe
from rayjobs import pipeline
from rayjobs.cluster import Cluster
from tests.pipelines.sources.samples import write_lines

LENGTH = {"text_length_filter": {"min_len": 1}}
"""Keeps every row."""


@pytest.mark.usefixtures("ray_cluster")
def test_a_finished_report_stays_until_another_run_has_finished_a_stage(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"query": "问", "response": "答"}])

    def run(*process: Any, last: str | None = None) -> None:
        tree = {"name": "t", "ingest": {"source": str(source)}, "clean": {"process": list(process)}}
        pipeline.run(Recipe.model_validate(tree), Workspace(str(tmp_path / "w")), Cluster(), last=last)

    report = tmp_path / "w" / "report.html"
    run(LENGTH)
    finished = report.read_text(encoding="utf-8")
    assert "unfinished" not in finished
    run(LENGTH, last="ingest")
    with pytest.raises(DataError, match="no column nowhere"):
        run({"specified_numeric_field_filter": {"field_key": "nowhere"}})
    assert report.read_text(encoding="utf-8") == finished
    report.unlink()
    run(LENGTH, last="ingest")
    assert "unfinished" in report.read_text(encoding="utf-8")
    run(LENGTH)
    assert "unfinished" not in report.read_text(encoding="utf-8")
