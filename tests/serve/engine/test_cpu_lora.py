"""The operators against a row-by-row computation."""

import pytest
import torch

pytest.importorskip("vllm")

from serve.engine.cpu_lora import expand, rows_by_adapter, shrink

SLOTS, RANK, INPUT, OUTPUT = 3, 4, 6, 5


@pytest.mark.parametrize("indices", [[-1, 0, 2, -1, 0], [1, 1, 1, 1, 1], [-1] * 5, [2, -1, -1, -1, 1]])
def test_rows_get_their_own_adapter_and_rows_without_one_get_nothing(indices: list[int]) -> None:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(5, INPUT, generator=generator)
    lora_a = torch.randn(SLOTS, 1, RANK, INPUT, generator=generator)
    lora_b = torch.randn(SLOTS, 1, OUTPUT, RANK, generator=generator)
    before = torch.randn(5, OUTPUT + 4, generator=generator)
    inner, out = torch.full((5, RANK), 9.0), before.clone()
    groups = rows_by_adapter(torch.tensor(indices))

    shrink(inner, x, lora_a, groups, 0.5)
    expand(out, inner, lora_b, groups, 2, True)

    for row, slot in enumerate(indices):
        expected = before[row].clone()
        if slot >= 0:
            expected[2 : 2 + OUTPUT] += lora_b[slot, 0] @ (0.5 * lora_a[slot, 0] @ x[row])
        torch.testing.assert_close(out[row], expected)
