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
def test_a_workspace_goes_on_without_its_sources_from_what_was_read_of_them(
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
    again = pipeline.run(recipe(source, other, LENGTH), Workspace(str(moved)), Cluster())
    assert again["ingest"].report == made["ingest"].report and again["clean"].report.rows == 0
    with pytest.raises(InputError, match="no such file"):
        pipeline.run(recipe(source, LENGTH), Workspace(str(moved)), Cluster(), first="ingest")
    assert not again["ingest"].damaged()
    with pytest.raises(InputError, match=r"b\.jsonl: no such file"):
        pipeline.status(recipe(tmp_path / "b.jsonl", LENGTH), Workspace(str(moved)))
    shutil.rmtree(moved / "ingest")
    with pytest.raises(InputError, match="no such file"):
        pipeline.status(recipe(source, LENGTH), Workspace(str(moved)))


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("damage", ["gone", "empty", "cut"])
def test_a_workspace_that_was_copied_in_part_is_told_and_made_whole_again(tmp_path: Path, damage: str) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"query": "问", "response": "答"}])
    tree = {"name": "t", "ingest": {"source": str(source)}, "clean": {"process": [LENGTH]}}
    tree["export"] = {"path": str(tmp_path / "out.jsonl")}
    recipe, workspace = Recipe.model_validate(tree), Workspace(str(tmp_path / "w"))
    done = pipeline.run(recipe, workspace, Cluster())
    (path,) = (Path(path) for path in done["clean"].paths(done["clean"].report.outputs.rows))
    whole = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(whole[:-1] if damage == "cut" else b"")
    found = pipeline.status(recipe, workspace)
    assert [output.damaged() for output in found.values()] == [None, str(path), None]
    with pytest.raises(DataError, match=rf"{path}: not there, or not whole, .*--from clean"):
        pipeline.run(recipe, workspace, Cluster())
    again = pipeline.run(recipe, workspace, Cluster(), first="clean")["clean"]
    (path,) = (Path(path) for path in again.paths(again.report.outputs.rows))
    assert path.read_bytes() == whole
    assert not any(output.damaged() for output in pipeline.status(recipe, workspace).values())


@pytest.mark.usefixtures("ray_cluster")
def test_a_shard_of_a_stage_that_was_copied_half_done_and_in_part_is_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "a.jsonl", [{"query": f"问{i}", "response": "答" * 20} for i in range(200)])
    tree = {"name": "t", "ingest": {"source": str(source), "shard_bytes": 4096}, "clean": {"process": [LENGTH]}}
    recipe, workspace = Recipe.model_validate(tree), Workspace(str(tmp_path / "w"))
    done = pipeline.run(recipe, workspace, Cluster())

    def damage(stage: str) -> None:
        paths = [Path(path) for path in done[stage].paths(done[stage].report.outputs.rows)]
        assert len(paths) > 3
        paths[0].unlink()
        paths[1].write_bytes(b"")
        paths[2].write_bytes(paths[2].read_bytes()[:-9])
        Path(done[stage].folder.path("manifest.json")).unlink()

    def same(again: pipeline.Outputs) -> bool:
        kept = (again[stage].report.digest == done[stage].report.digest for stage in done)
        return all(kept) and not any(output.damaged() for output in again.values())

    damage("clean")
    capsys.readouterr()
    again = pipeline.run(recipe, workspace, Cluster())
    assert capsys.readouterr().err.count("not there, or not whole; its shard is done again") == 3 and same(again)
    done = again
    damage("ingest")
    damage("clean")  # what is left of it goes on with files that ingest had
    with pytest.raises(DataError, match=r"cannot be read .* danlu run --from STAGE"):
        pipeline.run(recipe, workspace, Cluster())
    assert same(pipeline.run(recipe, workspace, Cluster(), first="ingest"))
