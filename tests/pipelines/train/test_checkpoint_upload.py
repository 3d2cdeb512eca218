"""Copies of checkpoints: each rank's part, whole or not at all, in a folder and on object storage."""

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Output
from pipelines.artifacts.staging import Staging
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import InputError, StageError
from pipelines.recipe.schema import Recipe
from pipelines.train import checkpoint_upload
from pipelines.train.checkpoint import complete_checkpoints, mark_complete, step_of
from pipelines.train.checkpoint_upload import CheckpointUpload, CopiedFile, Part, copies_key, restore
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


@pytest.fixture(params=["folder", "s3", "oss"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "folder":
        return str(tmp_path / "copies")
    return f"{request.getfixturevalue(f'{request.param}_bucket')}/runs"


@pytest.fixture
def run(recipe_of: Callable[..., Recipe], tiny_model: Path, tmp_path: Path, url: str) -> Run:
    section = recipe_of(checkpoint_copies=url).train
    assert section
    return Run(section, 1, 8, tiny_model, tmp_path / "f1", Tokenized([], "", 0, {}), None, b"key")


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
            pipeline._do(stage, place, inputs, Staging(place.workspace), again=again, spread=False)
    assert found == [["checkpoint-2"], []]


def test_storage_that_cannot_be_written_is_told_and_nothing_here_is_lost(
    recipe_of: Callable[..., Recipe], tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a folder")
    section = recipe_of(checkpoint_copies=str(tmp_path / "file")).train
    assert section
    run = Run(section, 1, 8, tiny_model, tmp_path / "f1", Tokenized([], "", 0, {}), None, b"key")
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
    with pytest.raises(StageError, match=r"rng_state_1.pth: not the 2 bytes that were copied"):
        fetch(run)
    assert not complete_checkpoints(run.checkpoints)


def test_a_journal_of_which_half_arrived_is_fetched_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    copied(run, saved(run, 4), 0, 1)
    shutil.rmtree(run.folder)
    whole = checkpoint_upload._pass_on

    def break_off(source: BinaryIO, sink: BinaryIO, size: int) -> CopiedFile:
        if not sink.name.startswith(str(run.journal)):
            return whole(source, sink, size)
        sink.write(source.read(5))
        raise OSError("the line is cut")

    with monkeypatch.context() as patch, pytest.raises(StageError, match="the line is cut"):
        patch.setattr(checkpoint_upload, "_pass_on", break_off)
        fetch(run)
    fetch(run)
    assert read_journal(run.journal) == [{"step": 4, "loss": 1.0}]


# What somebody who can write to the storage, and has no key, may try.


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, made: Path) -> None:
        self.made = made

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.made}",)


def signed_part(by: Run, files: dict[str, CopiedFile], key: bytes, **changed: Any) -> bytes:
    facts = {"run": "f1", "checkpoint": "checkpoint-9", "rank": 0, "ranks": 1, "completed": 1, **changed}
    text = Part.model_validate({**facts, "files": files}).model_dump_json()
    return json.dumps({"part": text, "hmac": checkpoint_upload._hmac(replace(by, copies_key=key), text)}).encode()


def facts_of(data: bytes) -> CopiedFile:
    return CopiedFile(size=len(data), sha256=hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("name", ["../../../out", "/tmp/danlu-test-out", "a/../../out", "./out", "a//out", ""])
@pytest.mark.parametrize("key", [b"somebody's", b"key"])
def test_a_name_that_leads_out_is_refused_even_if_it_is_signed(run: Run, tmp_path: Path, name: str, key: bytes) -> None:
    storage = Workspace(f"{run.section.checkpoint_copies}/f1")
    storage.write(storage.path("checkpoint-9", "complete-0.json"), signed_part(run, {name: facts_of(b"x")}, key))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(StageError, match=r"which lies outside" if key == b"key" else r"checkpoint-9: not signed by"):
        fetch(run)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_unpickled_that_this_run_did_not_sign(run: Run, tmp_path: Path) -> None:
    copied(run, saved(run, 4), 0, 1)
    shutil.rmtree(run.folder)
    storage = Workspace(f"{run.section.checkpoint_copies}/f1")
    payload = pickle.dumps(Hostile(tmp_path / "made"))
    for name in ("rng_state_0.pth", "rng_state_1.pth"):  # same size: only the digest tells
        size = len(storage.read(storage.path("checkpoint-4", name)))
        storage.write(storage.path("checkpoint-4", name), payload[:size])
    with pytest.raises(StageError, match=r"rng_state_\d.pth: not the 2 bytes that were copied"):
        fetch(run)
    assert not complete_checkpoints(run.checkpoints)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "manifest",
    [
        b"",
        b"[]",
        b"{}",
        b"[" * 200_000,
        b'{"ranks": 1, "completed": 1, "files": {"rng_state_0.pth": 2}}',  # as they were before they were signed
        b'{"part": 1, "hmac": 2}',
        b'{"part": "{}", "hmac": "\xc3\xa4"}',
        b" " * (17 << 20),
    ],
)
def test_what_is_no_manifest_is_passed_over_for_an_older_copy_that_is_signed(run: Run, manifest: bytes) -> None:
    copied(run, saved(run, 4), 0, 1)
    shutil.rmtree(run.folder)
    storage = Workspace(f"{run.section.checkpoint_copies}/f1")
    storage.write(storage.path("checkpoint-9", "complete-0.json"), manifest)
    fetch(run)
    assert [step_of(folder) for folder in complete_checkpoints(run.checkpoints)] == [4]


def test_a_copy_of_another_run_or_step_or_rank_is_none_of_this(run: Run) -> None:
    storage = Workspace(f"{run.section.checkpoint_copies}/f1")
    changes: list[dict[str, Any]] = [{"run": "f2"}, {"checkpoint": "checkpoint-8"}, {"rank": 1, "ranks": 2}]
    for changed in changes:
        part = signed_part(run, {"a": facts_of(b"x")}, b"key", **changed)
        storage.write(storage.path("checkpoint-9", "complete-0.json"), part)
        with pytest.raises(StageError, match="checkpoint-9: not signed by this run's key"):
            fetch(run)


def test_links_and_pipes_in_a_folder_of_copies_are_not_followed(
    recipe_of: Callable[..., Recipe], tiny_model: Path, tmp_path: Path
) -> None:
    section = recipe_of(checkpoint_copies=str(tmp_path / "copies")).train
    assert section
    run = Run(section, 1, 8, tiny_model, tmp_path / "f1", Tokenized([], "", 0, {}), None, b"key")
    copied(run, saved(run, 4), 0, 1)
    shutil.rmtree(run.folder)
    folder = tmp_path / "copies" / "f1" / "checkpoint-4"
    (tmp_path / "elsewhere").write_bytes(b"r0")
    (folder / "rng_state_0.pth").unlink()
    (folder / "rng_state_0.pth").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(StageError, match=r"rng_state_0\.pth"):
        fetch(run)
    (folder / "rng_state_0.pth").unlink()
    os.mkfifo(folder / "rng_state_0.pth")
    with pytest.raises(StageError, match=r"rng_state_0\.pth: not the 2 bytes"):
        fetch(run)
    assert not complete_checkpoints(run.checkpoints)


def test_the_key_is_the_environments_or_one_that_only_its_owner_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(checkpoint_upload.KEY, raising=False)
    workspace = Workspace(str(tmp_path / "w"))
    key = copies_key(workspace)
    assert copies_key(workspace) == key != copies_key(Workspace(str(tmp_path / "v")))
    assert (tmp_path / "w" / "copies.key").stat().st_mode & 0o777 == 0o600
    monkeypatch.setenv(checkpoint_upload.KEY, "a secret of the cluster")
    assert copies_key(workspace) == copies_key(Workspace(str(tmp_path / "v"))) != key
    monkeypatch.setenv(checkpoint_upload.KEY, "short")
    with pytest.raises(InputError, match="DANLU_COPIES_KEY: a secret of 16 characters"):
        copies_key(workspace)


@pytest.mark.parametrize("text", ["", "0" * 63, "0" * 64 + "\n"])
def test_a_key_that_is_empty_or_cut_signs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.delenv(checkpoint_upload.KEY, raising=False)
    file = tmp_path / "copies.key"
    file.write_text(text)
    with pytest.raises(InputError, match=r"copies\.key: not a key that was made here"):
        copies_key(Workspace(str(tmp_path)))
    assert file.read_text() == text
