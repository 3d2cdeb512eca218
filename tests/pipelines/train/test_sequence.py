from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from pipelines.errors import RecipeError
from pipelines.recipe.load import load_recipe
from pipelines.train import sequence
from pipelines.train.loss_mask import IGNORE_INDEX
from pipelines.train.samples import Schedule, collate
from pipelines.train.sequence import SequenceGroup, check_heads, own_part


@pytest.mark.parametrize("size", [2, 3, 4])
def test_the_parts_of_a_row_make_up_the_row(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    draw = np.random.default_rng(0)
    samples = []
    for length in (5, 9, 3):
        tokens = draw.integers(1, 99, length).astype(np.int32)
        samples.append((tokens, np.where(draw.random(length) < 0.5, tokens, IGNORE_INDEX).astype(np.int32)))
    whole = collate([samples])
    parts = []
    for rank in range(size):
        monkeypatch.setattr(sequence, "_group", SequenceGroup(None, rank, size))
        parts.append(own_part(whole))
    assert len({part["input_ids"].shape for part in parts}) == 1
    for name in ("input_ids", "position_ids"):
        joined = torch.cat([part[name] for part in parts], dim=1)
        assert joined[0, :17].tolist() == whole[name][0].tolist()
    assert [target for part in parts for target in part["targets"].tolist()] == whole["targets"].tolist()
    width = parts[0]["input_ids"].shape[1]
    places = [rank * width + place for rank, part in enumerate(parts) for place in part["logits_to_keep"].tolist()]
    assert places == whole["logits_to_keep"].tolist()
    bounds = parts[0]["cu_seq_lens_q"].tolist()
    assert bounds[:4] == [0, 5, 14, 17] and bounds[-1] == size * width
    monkeypatch.setattr(sequence, "_group", SequenceGroup(None, 0, 1))
    assert own_part(whole) is whole


def test_ranks_that_share_rows_get_the_same_ones() -> None:
    numbers: Any = range(8)  # samples that are their own numbers
    alone = Schedule(numbers, 3, 8, None)
    order = [alone[number][0] for number in range(8)]
    shared = Schedule(numbers, 3, 8, None, copies=2, batch=2)
    assert len(shared) == 16
    batches = [[shared[2 * batch + row][0] for row in range(2)] for batch in range(8)]  # the n-th to rank n % 4
    assert batches[0::2] == batches[1::2] == [order[:2], order[2:4], order[4:6], order[6:]]


def test_heads_that_cannot_be_dealt_out_are_refused() -> None:
    check_heads(SimpleNamespace(num_attention_heads=8, num_key_value_heads=2), 4)
    for heads, pairs, size in ((8, 2, 3), (12, 4, 6)):
        with pytest.raises(RecipeError, match=f"{heads} heads, {pairs} of them.*{size} ranks cannot share"):
            check_heads(SimpleNamespace(num_attention_heads=heads, num_key_value_heads=pairs), size)
    with pytest.raises(RecipeError, match="num_workers 2 is not a multiple of sequence_parallel_size 4"):
        load_recipe("tiny", ["train.sequence_parallel_size=4"])
