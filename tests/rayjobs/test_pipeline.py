"""Runs of a recipe, one after the other in the same workspace."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import DataError, InputError
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


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_finished_is_there_without_its_source_and_nothing_new_is_made_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, moved = write_lines(tmp_path / "a.jsonl", [{"query": "问", "response": "答"}]), tmp_path / "moved"

    def recipe(source: Path, *process: Any) -> Recipe:
        tree = {"name": "t", "ingest": {"source": str(source)}, "clean": {"process": list(process)}}
        return Recipe.model_validate(tree)

    made = pipeline.run(recipe(source, LENGTH), Workspace(str(tmp_path / "w")), Cluster())
    shutil.move(tmp_path / "w", moved)
    source.unlink()
    capsys.readouterr()
    for look in (pipeline.status, lambda of, where: pipeline.run(of, where, Cluster())):
        found = look(recipe(source, LENGTH), Workspace(str(moved)))
        assert [output.is_complete for output in found.values()] == [True, True]
        assert found["clean"].report == made["clean"].report
        assert f"ingest: as it was finished before, because ingest.source {source}: no such" in capsys.readouterr().err
    other = {"text_length_filter": {"min_len": 2}}
    with pytest.raises(InputError, match="no such file"):
        pipeline.run(recipe(source, other), Workspace(str(moved)), Cluster())
    with pytest.raises(InputError, match="no such file"):
        pipeline.run(recipe(source, LENGTH), Workspace(str(moved)), Cluster(), first="clean")
    with pytest.raises(InputError, match=r"b\.jsonl: no such file"):
        pipeline.status(recipe(tmp_path / "b.jsonl", LENGTH), Workspace(str(moved)))
    shutil.rmtree(moved / "ingest")
    with pytest.raises(InputError, match="no such file"):
        pipeline.status(recipe(source, LENGTH), Workspace(str(moved)))
