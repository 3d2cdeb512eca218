from pathlib import Path

import numpy as np

from pipelines.train.loss_mask import IGNORE_INDEX
from pipelines.train.samples import Samples, Schedule, collate, rows_of_epoch, total_rows
from pipelines.train.tokenize import Tokenized


def tokenized(folder: Path, lengths: list[list[int]], index: list[int]) -> Tokenized:
    """Shards of samples with the given lengths; each token of sample `n` is `n`."""
    shards, number = [], 0
    for shard, sizes in enumerate(lengths):
        tokens = np.concatenate([np.full(size, number + i) for i, size in enumerate(sizes)]).astype(np.int32)
        number += len(sizes)
        paths = {kind: str(folder / f"{shard}.{kind}.npy") for kind in ("tokens", "labels", "sample_offsets")}
        np.save(paths["tokens"], tokens)
        np.save(paths["labels"], tokens)
        np.save(paths["sample_offsets"], np.cumsum([0, *sizes]))
        shards.append({**paths, "samples": len(sizes)})
    np.save(folder / "index.npy", np.array(index))
    return Tokenized(shards, str(folder / "index.npy"), len(index), {})


def test_samples_are_found_through_the_index_in_whichever_shard(tmp_path: Path) -> None:
    samples = Samples(tokenized(tmp_path, [[2, 3], [1], [4, 2]], [4, 0, 2, 0, 3]))
    assert [(int(tokens[0]), len(tokens)) for tokens, _ in (samples[i] for i in range(5))] == [
        (4, 2),
        (0, 2),
        (2, 1),
        (0, 2),
        (3, 4),
    ]


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own(tmp_path: Path) -> None:
    samples = Samples(tokenized(tmp_path, [[1] * 50], list(range(50))))
    schedule = Schedule(samples, 7, 120, None)
    drawn = [int(schedule[number][0][0][0]) for number in range(120)]
    assert sorted(drawn[:50]) == sorted(drawn[50:100]) == list(range(50))
    assert drawn[:50] != drawn[50:100] and drawn[:50] != list(range(50))
    again = Schedule(samples, 7, 120, None)
    assert [int(again[number][0][0][0]) for number in reversed(range(120))] == drawn[::-1]


def test_collated_samples_stand_one_after_another_without_leaking_targets() -> None:
    one = (np.array([5, 6, 7], np.int32), np.array([IGNORE_INDEX, 6, 7], np.int32))
    two = (np.array([8, 9], np.int32), np.array([8, 9], np.int32))  # its first token has no token before it
    batch = collate([[one], [two]])
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["logits_to_keep"].tolist() == [0, 1, 3]
    assert batch["targets"].tolist() == [6, 7, 9]


def test_packed_rows_hold_every_sample_once_an_epoch_and_resume_anywhere(tmp_path: Path) -> None:
    draw = np.random.default_rng(1)
    samples = Samples(tokenized(tmp_path, [draw.integers(1, 20, 40).tolist()], list(range(40))))
    per_epoch = [len(rows_of_epoch(samples, 3, epoch, 32)) for epoch in range(3)]
    assert total_rows(samples, 3, 3.0, 32) == sum(per_epoch)
    assert total_rows(samples, 3, 1.5, 32) == per_epoch[0] + -(-per_epoch[1] // 2)
    schedule = Schedule(samples, 3, sum(per_epoch), 32)
    rows = [[int(tokens[0]) for tokens, _ in schedule[number]] for number in range(sum(per_epoch))]
    first = 0
    for count in per_epoch:
        assert sorted(number for row in rows[first : first + count] for number in row) == list(range(40))
        first += count
    later = Schedule(samples, 3, sum(per_epoch), 32)
    assert [int(tokens[0]) for tokens, _ in later[sum(per_epoch) - 1]] == rows[-1]
    assert [int(tokens[0]) for tokens, _ in later[0]] == rows[0]
