"""A workspace that version 0.1.0 made is continued: every manifest is read, and little of it is done again.

Ingest is, since it reads more of what rows say, and a split by groups: where they find the same, what was made of it
stays.

`tests/data/workspace-0.1.0` was written by that version: `tiny` on 200 rows, whole up to the split, of the stages after
it the manifests.
"""

import json
import shutil
from pathlib import Path

import pytest

from pipelines.artifacts.stage import read_manifest
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import DataError
from rayjobs import pipeline
from rayjobs.cluster import Cluster

MADE = Path(__file__).parents[2] / "data" / "workspace-0.1.0"
OVERRIDES = ["ingest.limit=200", "analyze={}"]
STAGES = pipeline.stages_of(pipeline.load("tiny", [*OVERRIDES, "export.path=rows.jsonl"]))


@pytest.fixture
def older(tmp_path: Path, ray_cluster: None) -> Workspace:
    """A copy of that workspace, whose source was read again."""
    workspace = Workspace(str(shutil.copytree(MADE, tmp_path / "workspace")))
    pipeline.run(pipeline.load("tiny", OVERRIDES), workspace, Cluster(), last="ingest")
    return workspace


def test_finished_stages_are_up_to_date(older: Workspace, capsys: pytest.CaptureFixture[str]) -> None:
    done = pipeline.run(pipeline.load("tiny", OVERRIDES), older, Cluster(), last="ingest")
    assert [name for name, output in done.items() if output.is_complete] == ["ingest"]
    assert capsys.readouterr().err.splitlines() == ["ingest: up to date"]


def test_stages_whose_operators_decide_anew_are_not_taken_for_done(older: Workspace) -> None:
    found = pipeline.status(pipeline.load("tiny", OVERRIDES), older)
    assert [name for name, output in found.items() if output.is_complete] == ["ingest"]


@pytest.mark.parametrize("stage", STAGES, ids=[stage.name for stage in STAGES])
def test_every_manifest_is_read_whole(stage: pipeline.AnyStage) -> None:
    (folder,) = (MADE / stage.name).iterdir()
    place = Place(Workspace(str(MADE)), stage.name, folder.name)
    manifest = read_manifest(place, stage.reports)
    written = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    assert manifest is not None
    assert manifest.model_dump(mode="json", exclude_unset=True) == written


@pytest.mark.parametrize("damage", ["unknown key", "missing key", "no manifest"])
def test_a_manifest_of_another_kind_is_refused_by_name(older: Workspace, damage: str) -> None:
    for path in Path(older.root, "ingest").glob("*/manifest.json"):
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if damage == "unknown key":
            manifest["report"]["lines"] = 2
        elif damage == "missing key":
            del manifest["report"]["digest"]
        else:
            manifest = ["ingest"]
        path.write_text(json.dumps(manifest), encoding="utf-8")
    with pytest.raises(DataError, match=r"ingest/.*/manifest.json: not a manifest that this version of danlu reads"):
        pipeline.status(pipeline.load("tiny", OVERRIDES), older)
