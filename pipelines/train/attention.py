"""Attention over samples that stand one after another in one row: each sample sees itself alone.

Registered with transformers under NAME. The work is the sum of the samples' squares, not the square of their sum.
On CUDA it is one call of PyTorch's own variable-length flash attention; elsewhere one call per sample.
"""

from inspect import signature
from itertools import pairwise
from typing import Any

FLASH_CAPABILITY = (8, 0)
"""The least CUDA compute capability that flash attention runs on."""

NAME = "danlu_per_sample"


def register() -> None:
    """Make NAME a value of `attn_implementation`; it needs `cu_seq_lens_q` passed to the model."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, per_sample_attention)


def per_sample_attention(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    cu_seq_lens_q: Any,
    max_length_q: int,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Causal attention of each sample by itself.

    `query` [1, heads, tokens, width]; `key` and `value` may have fewer heads; returns [1, tokens, heads, width]. Where
    ranks share a row, the tokens are this rank's part of it, and `cu_seq_lens_q` the bounds in all of it.
    """
    # here, because torch stands behind it, and the driver imports this file with loop.py
    from pipelines.train.sequence import sequence_group, to_heads, to_tokens

    shared = sequence_group().size > 1
    if shared:
        query, key, value = to_heads(query), to_heads(key), to_heads(value)
    if dropout == 0 and _has_flash(query):
        output = _flash(query, key, value, scaling, cu_seq_lens_q, max_length_q, sliding_window)
    else:
        output = _one_by_one(query, key, value, scaling, dropout, cu_seq_lens_q, sliding_window)
    return (to_tokens(output) if shared else output).transpose(1, 2).contiguous(), None


def _has_flash(query: Any) -> bool:
    import torch

    if not query.is_cuda or query.dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(query.device) >= FLASH_CAPABILITY


def _flash(
    query: Any, key: Any, value: Any, scaling: float | None, bounds: Any, longest: int, sliding_window: int | None
) -> Any:
    from torch.nn.attention.varlen import varlen_attn

    attend: Any = varlen_attn
    # PyTorch 2.11 groups heads without being told, and has no such argument
    grouped = {"enable_gqa": True} if "enable_gqa" in signature(attend).parameters else {}
    output = attend(
        *(heads[0].transpose(0, 1) for heads in (query, key, value)),
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        **grouped,
    )
    return output.transpose(0, 1)[None]


def _one_by_one(
    query: Any,
    key: Any,
    value: Any,
    scaling: float | None,
    dropout: float,
    cu_seq_lens_q: Any,
    sliding_window: int | None,
) -> Any:
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    grouped = query.shape[1] != key.shape[1]
    bounds = cu_seq_lens_q.tolist()
    outputs = []
    for begin, end in pairwise(bounds):
        window = None
        if sliding_window is not None and end - begin > sliding_window:
            places = torch.arange(end - begin, device=query.device)
            distance = places[:, None] - places[None, :]
            window = (distance >= 0) & (distance < sliding_window)
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, begin:end],
                key[:, :, begin:end],
                value[:, :, begin:end],
                attn_mask=window,
                is_causal=window is None,
                dropout_p=dropout,
                scale=scaling,
                enable_gqa=grouped,
            )
        )
    return torch.cat(outputs, dim=2)
