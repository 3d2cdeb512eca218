"""A stage is complete with its manifest, which is read as it was written, also where an earlier version wrote it."""

from pathlib import Path

import pytest

from pipelines.artifacts.reports.rows import RowFiles, RowsReport
from pipelines.artifacts.stage import Environment, Manifest, Output, read_manifest
from pipelines.artifacts.workspace import Place, Workspace, to_json
from pipelines.errors import DataError
from tests.outputs import finished


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    root = str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"
    return Place(Workspace(root), "clean", "abc")


def report() -> RowsReport:
    return RowsReport(summary="1 row", digest="d", rows=1, outputs=RowFiles(rows=["x/1.parquet"]))


def test_a_stage_is_complete_only_with_its_manifest(place: Place) -> None:
    assert read_manifest(place, RowsReport) is None
    with pytest.raises(DataError, match="stage clean is not complete; run it again"):
        Output("clean", place).report  # noqa: B018
    output = finished(place, report())
    assert read_manifest(place, RowsReport) == output.manifest
    assert output.report.digest == "d"
    assert output.paths(output.report.outputs.rows) == [place.path("x/1.parquet")]
    assert place.relative(output.paths(["x/1.parquet"])) == ["x/1.parquet"]
    place.clear()
    assert read_manifest(place, RowsReport) is None


def test_a_manifest_is_read_as_it_was_written(place: Place) -> None:
    written = Manifest[RowsReport](
        stage="clean",
        fingerprint="abc",
        inputs={"ingest": "f"},
        began=1.5,
        seconds=2.0,
        environment=Environment(danlu="1.0", packages={"ray": "2"}),
        report=report(),
    )
    written.write(place)
    assert read_manifest(place, RowsReport) == written
    assert set(place.workspace.read_json(place.path("manifest.json"))) == {
        "stage", "fingerprint", "inputs", "began", "seconds", "environment", "report",
    }  # fmt: skip


def test_a_damaged_manifest_is_named(place: Place) -> None:
    place.finish(b"{")
    with pytest.raises(DataError, match=r"clean/abc/manifest\.json: not valid JSON"):
        read_manifest(place, RowsReport)
    place.finish(to_json({"report": {**report().model_dump(), "lines": 3}}))
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest .*\(report\.lines: .*delete the folder"):
        read_manifest(place, RowsReport)
