from pathlib import Path

from pipelines.train.checkpoint import (
    complete_checkpoints,
    is_complete,
    mark_complete,
    remove_incomplete,
    remove_oldest,
    step_of,
)


def checkpoint(root: Path, step: int, complete: bool = True) -> Path:
    folder = root / f"checkpoint-{step}"
    (folder / f"global_step{step}").mkdir(parents=True)
    (folder / f"global_step{step}" / "rank0.pt").write_bytes(b"x" * 100)
    (folder / "trainer_state.json").write_text("{}")
    if complete:
        mark_complete(folder)
    return folder


def steps(root: Path) -> list[int]:
    return [step_of(folder) for folder in complete_checkpoints(root)]


def test_complete_needs_the_manifest_and_every_file_at_its_size(tmp_path: Path) -> None:
    cut, gone, never = (checkpoint(tmp_path, step, step != 30) for step in (10, 20, 30))
    assert steps(tmp_path) == [10, 20]
    (cut / "global_step10" / "rank0.pt").write_bytes(b"x" * 99)
    (gone / "global_step20" / "rank0.pt").unlink()
    assert not any(map(is_complete, (cut, gone, never)))


def test_checkpoints_are_ordered_by_step_not_by_name(tmp_path: Path) -> None:
    for step in (100, 20, 3):
        checkpoint(tmp_path, step)
    assert steps(tmp_path) == [3, 20, 100]


def test_the_oldest_complete_ones_go_first_and_incomplete_ones_do_not_count(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        checkpoint(tmp_path, step)
    checkpoint(tmp_path, 4, complete=False)
    remove_oldest(tmp_path, keep=2)
    assert steps(tmp_path) == [2, 3]
    remove_incomplete(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-2", "checkpoint-3"]
