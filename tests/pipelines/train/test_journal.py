from pathlib import Path
from typing import Any

from pipelines.train.journal import append, best_step, progress_line, read_journal, rewind


def entry(step: int, **more: Any) -> dict[str, Any]:
    numbers = {"loss": 2.5, "grad_norm": 0.81, "lr": 1e-4, "tokens": 400, "loss_tokens": 100, "seconds": 2.0}
    return {"step": step, **numbers, "memory_bytes": 3 << 29, **more}


def test_progress_says_loss_rate_norm_speeds_memory_and_time_left() -> None:
    entries = [entry(1, seconds=6.0), {"step": 1, "eval_loss": 3.0}, entry(2)]
    assert progress_line(entries, entries[-1], 32) == (
        "step 2/32  loss 2.5000  lr 1.00e-04  grad norm 0.81  100 tokens/s, 25 with loss  1.5 GiB  2.0 min left"
    )
    assert "  41% of the peak  " in progress_line([entry(1, mfu=0.41)], entry(1, mfu=0.41), 32)
    assert "norm" not in progress_line(entries, entry(2, grad_norm=None), 32)


def test_a_line_cut_short_is_left_out_and_rewinding_drops_what_comes_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_journal(path) == []
    for step in (1, 2, 3):
        append(path, entry(step))
    with path.open("a") as stream:
        stream.write('{"step": 4, "lo')
    assert [found["step"] for found in read_journal(path)] == [1, 2, 3]
    rewind(path, 2)
    assert [found["step"] for found in read_journal(path)] == [1, 2]
    rewind(path, None)
    assert read_journal(path) == []


def test_the_best_step_is_the_earliest_of_the_lowest_among_those_asked_for() -> None:
    entries = [{"step": step, "eval_loss": loss} for step, loss in ((0, 3.0), (10, 2.0), (20, 1.0), (30, 1.0))]
    assert best_step(entries, [0, 10, 20, 30]) == 20
    assert best_step(entries, [10, 40]) == 10
    assert best_step(entries, [40]) is None
