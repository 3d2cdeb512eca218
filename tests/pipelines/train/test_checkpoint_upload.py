"""Copies of checkpoints: each rank's part, whole or not at all, in a folder and on object storage."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import StageError
from pipelines.recipe.schema import Recipe
from pipelines.train import checkpoint_upload
from pipelines.train.checkpoint import complete_checkpoints, mark_complete, step_of
from pipelines.train.checkpoint_upload import CheckpointUpload, restore
from pipelines.train.journal import append, read_journal
from pipelines.train.run import Run
from pipelines.train.stage import TrainInputs, TrainStage
from pipelines.train.tokenize import Tokenized
from rayjobs import pipeline
from tests.pipelines.train.conftest import train_stage

FILES = {
    "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt": b"zero",
    "global_step4/zero_pp_rank_1_mp_rank_00_optim_states.pt": b"one, longer",
    "global_step4/mp_rank_00_model_states.pt": b"model",
    "rng_state_0.pth": b"r0",
    "rng_state_1.pth": b"r1",
    "trainer_state.json": b"{}",
}


@pytest.fixture(params=["folder", "s3"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "copies") if request.param == "folder" else f"{request.getfixturevalue('bucket')}/runs"


@pytest.fixture
def run(recipe_of: Callable[..., Recipe], tiny_model: Path, tmp_path: Path, url: str) -> Run:
    section = recipe_of(checkpoint_copies=url).train
    assert section
    return Run(section, 1, 8, tiny_model, tmp_path / "f1", Tokenized([], "", 0, {}), None)


def saved(run: Run, step: int) -> Path:
    """A complete checkpoint of two ranks, and a journal up to it."""
    folder = run.checkpoints / f"checkpoint-{step}"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    mark_complete(folder)
    append(run.journal, {"step": step, "loss": 1.0})
    return folder


def copied(run: Run, folder: Path, *ranks: int) -> None:
    assert run.section.checkpoint_copies
    for rank in ranks:
        upload = CheckpointUpload(run, run.section.checkpoint_copies, rank, 2)
        upload.begin(folder)
        upload.finish()


def fetch(run: Run) -> None:
    assert run.section.checkpoint_copies
    restore(run, run.section.checkpoint_copies)


def content(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def test_what_both_ranks_copied_is_fetched_after_the_disk_is_lost(run: Run) -> None:
    copied(run, saved(run, 4), 0, 1)
    shutil.rmtree(run.folder)
    fetch(run)
    (folder,) = complete_checkpoints(run.checkpoints)
    assert step_of(folder) == 4 and content(folder) == FILES
    assert read_journal(run.journal) == [{"step": 4, "loss": 1.0}]


def test_each_rank_copies_what_it_owns(run: Run) -> None:
    copied(run, saved(run, 4), 1)
    storage = Workspace(f"{run.section.checkpoint_copies}/f1")
    assert [path.rpartition("/")[2] for path in storage.list(storage.path("checkpoint-4"))] == [
        "complete-1.json",
        "global_step4",
        "rng_state_1.pth",
    ]


def test_a_part_that_is_missing_or_of_another_time_is_not_fetched(run: Run) -> None:
    folder = saved(run, 2)
    copied(run, folder, 0, 1)
    copied(run, saved(run, 4), 0)
    copied(run, saved(run, 6), 0, 1)
    mark_complete(run.checkpoints / "checkpoint-6")  # taken again, and copied by one rank only
    copied(run, run.checkpoints / "checkpoint-6", 1)
    shutil.rmtree(run.checkpoints)
    fetch(run)
    assert [step_of(found) for found in complete_checkpoints(run.checkpoints)] == [2]


def test_what_lies_here_is_not_fetched_over(run: Run) -> None:
    copied(run, saved(run, 4), 0, 1)
    own = run.checkpoints / "checkpoint-4" / "trainer_state.json"
    own.write_bytes(b"[]")
    fetch(run)
    assert own.read_bytes() == b"[]"


def test_copies_of_checkpoints_that_were_deleted_here_are_deleted_there(run: Run) -> None:
    copied(run, saved(run, 2), 0, 1)
    shutil.rmtree(run.checkpoints / "checkpoint-2")
    storage = Workspace(f"{run.section.checkpoint_copies}/f1")
    copied(run, saved(run, 4), 0)
    assert checkpoint_upload._names(storage) == ["checkpoint-2", "checkpoint-4"]  # the later one is not whole yet
    copied(run, run.checkpoints / "checkpoint-4", 1, 0)
    assert checkpoint_upload._names(storage) == ["checkpoint-4"]


def test_a_run_that_is_done_again_finds_no_copies(
    run: Run,
    recipe_of: Callable[..., Recipe],
    split_in: Callable[[Path, int], Output[SplitReport]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inputs = TrainInputs(split_in(tmp_path / "work", 2))
    place = Place(Workspace(str(tmp_path / "work")), "train", run.folder.name)
    copied(run, saved(run, 2), 0, 1)
    storage = Workspace(f"{run.section.checkpoint_copies}/f1")
    found: list[list[str]] = []

    def work(stage: TrainStage, place: Place, inputs: TrainInputs) -> TrainReport:
        found.append(checkpoint_upload._names(storage))
        raise StageError("this far")

    monkeypatch.setattr(TrainStage, "run", work)
    stage = train_stage(recipe_of(checkpoint_copies=run.section.checkpoint_copies))
    for again in (False, True):
        with pytest.raises(StageError, match="this far"):
            pipeline._do(stage, place, inputs, again=again)
    assert found == [["checkpoint-2"], []]


def test_storage_that_cannot_be_written_is_told_and_nothing_here_is_lost(
    recipe_of: Callable[..., Recipe], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    section = recipe_of(checkpoint_copies=str(tmp_path / "file")).train
    assert section
    run = Run(section, 1, 8, tiny_model, tmp_path / "f1", Tokenized([], "", 0, {}), None)
    folder = saved(run, 4)
    upload = CheckpointUpload(run, str(tmp_path / "file"), 0, 2)
    upload.begin(folder)
    with pytest.raises(StageError, match=r"train.checkpoint_copies .*file/f1: .*what is in .* is kept"):
        upload.finish()
    assert content(folder) == FILES


def test_a_damaged_copy_is_told(run: Run) -> None:
    copied(run, saved(run, 4), 0, 1)
    storage = Workspace(f"{run.section.checkpoint_copies}/f1")
    storage.write(storage.path("checkpoint-4", "rng_state_1.pth"), b"longer than it was")
    shutil.rmtree(run.folder)
    with pytest.raises(StageError, match=r"rng_state_1.pth: 18 bytes, and 2 were copied"):
        fetch(run)
    assert not complete_checkpoints(run.checkpoints)


def test_a_journal_of_which_half_arrived_is_fetched_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(run, saved(run, 4), 0, 1)
    shutil.rmtree(run.folder)

    def break_off(source: BinaryIO, sink: BinaryIO, length: int) -> None:
        sink.write(source.read(5))
        if sink.name.startswith(str(run.journal)):
            raise OSError("the line is cut")
        sink.write(source.read())

    with monkeypatch.context() as patch, pytest.raises(StageError, match="the line is cut"):
        patch.setattr(checkpoint_upload.shutil, "copyfileobj", break_off)
        fetch(run)
    fetch(run)
    assert read_journal(run.journal) == [{"step": 4, "loss": 1.0}]
