"""Correct LoRA on vLLM's CPU build.

vLLM's torch operators index the adapter weights with -1 for rows without an adapter, so that in a mixed batch the
base model's rows get the last adapter's weights (`vllm/lora/ops/torch_ops/lora_ops.py`). The wrapper here adds
an adapter's product to that adapter's rows alone. It also gathers no weights per token, which is faster.
"""

from typing import Any

import torch
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU

Rows = slice | torch.Tensor


class RowwisePunicaWrapper(PunicaWrapperCPU):
    """vLLM's hook for LoRA arithmetic, with rows grouped by adapter once per step."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._token_groups: list[tuple[int, Rows]] = []
        self._sampler_groups: list[tuple[int, Rows]] = []

    def update_metadata(self, *args: Any, **kwargs: Any) -> None:
        """Take over which adapter each row of the coming step uses."""
        super().update_metadata(*args, **kwargs)
        self._token_groups = rows_by_adapter(self.token_lora_indices)
        self._sampler_groups = rows_by_adapter(self.sampler_indices)

    def _apply_shrink(self, y: torch.Tensor, x: torch.Tensor, w_t_all: torch.Tensor, scale: float) -> None:
        shrink(y.view(-1, y.shape[-1]), x, w_t_all, self._token_groups, scale)

    def _apply_expand(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w_t_all: torch.Tensor,
        y_offset: int,
        y_slice_size: int,
        add_inputs: bool = True,
    ) -> None:
        expand(y, x, w_t_all, self._token_groups, y_offset, add_inputs)

    def add_lora_embedding(
        self, y: torch.Tensor, x: torch.Tensor, lora_b_stacked: torch.Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Add the adapters' part of the token embedding: `y += x @ lora_b`."""
        expand(y.view(-1, y.shape[-1]), x.view(-1, x.shape[-1]), lora_b_stacked, self._token_groups, 0, add_inputs)

    def add_lora_logits(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        lora_a_stacked: torch.Tensor,
        lora_b_stacked: torch.Tensor,
        scale: float,
        *,
        buffer: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the adapters' part of the logits: `y += (x @ lora_a) @ lora_b * scale`."""
        x = x.view(-1, x.shape[-1])
        inner = torch.zeros((x.size(0), lora_b_stacked.size(-1)), dtype=torch.float32, device=x.device)
        shrink(inner, x, lora_a_stacked, self._sampler_groups, scale)
        expand(y.view(-1, y.shape[-1]), inner, lora_b_stacked, self._sampler_groups, 0, True)


def rows_by_adapter(indices: torch.Tensor) -> list[tuple[int, Rows]]:
    """Group the rows of a batch by adapter slot.

    `indices`: [rows], the slot of each row, -1 for none. Rows without an adapter are in no group.
    """
    slots = torch.unique(indices).tolist()
    if len(slots) == 1:
        return [(slots[0], slice(0, indices.shape[0]))] if slots[0] >= 0 else []
    return [(slot, (indices == slot).nonzero().squeeze(1)) for slot in slots if slot >= 0]


def shrink(
    out: torch.Tensor, x: torch.Tensor, lora_a: torch.Tensor, groups: list[tuple[int, Rows]], scale: float
) -> None:
    """`out = scale * x @ A.T` for the rows of each adapter; the others become zero.

    `out`: [rows, rank], `x`: [rows, in], `lora_a`: [slots, 1, rank, in] or [slots, rank, in].
    """
    out.zero_()
    for slot, rows in groups:
        weight = lora_a[slot].flatten(0, -2).to(out.dtype)
        out[rows, : weight.shape[0]] = scale * (x[rows].to(out.dtype) @ weight.T)


def expand(
    out: torch.Tensor,
    x: torch.Tensor,
    lora_b: torch.Tensor,
    groups: list[tuple[int, Rows]],
    offset: int,
    add_inputs: bool,
) -> None:
    """`out[:, offset:] += x @ B.T` for the rows of each adapter; the others stay as they are.

    `out`: [rows, columns], `x`: [rows, rank], `lora_b`: [slots, 1, size, rank] or [slots, size, rank].
    """
    for slot, rows in groups:
        weight = lora_b[slot].flatten(0, -2)
        size = min(weight.shape[0], out.shape[1] - offset)
        product = (x[rows].to(out.dtype) @ weight.to(out.dtype).T)[:, :size]
        columns = slice(offset, offset + size)
        out[rows, columns] = out[rows, columns] + product if add_inputs else product
