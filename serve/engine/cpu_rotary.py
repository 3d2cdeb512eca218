"""Correct rotary positions on vLLM's CPU build.

vLLM's kernel takes queries as [tokens, heads × size]. Given [tokens, heads, size], as by latent attention (DeepSeek-V3,
GLM-4.7-Flash), it turns the first head alone, so that the model answers with other tokens.
"""

from typing import Any

import torch
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding

_kernel = RotaryEmbedding.forward_cpu


def rotate(
    self: Any, positions: torch.Tensor, query: torch.Tensor, key: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """vLLM's `RotaryEmbedding.forward_cpu`, by PyTorch where heads have a dimension of their own."""
    turn: Any = _kernel if query.dim() == 2 else RotaryEmbedding.forward_native
    turned: tuple[torch.Tensor, torch.Tensor | None] = turn(self, positions, query, key)
    return turned


def correct_rotary() -> None:
    """Make every layer of this process use `rotate`."""
    RotaryEmbedding.forward_cpu = rotate  # type: ignore[method-assign]
