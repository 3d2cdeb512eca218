"""Attention over samples that stand one after another in one row: each sample sees itself alone.

Registered with transformers under NAME. The work is the sum of the samples' squares, not the square of their sum.
"""

from itertools import pairwise
from typing import Any

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
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Any, None]:
    """Causal attention of each sample by itself.

    `query` [1, heads, tokens, width]; `key` and `value` may have fewer heads; returns [1, tokens, heads, width]. Where
    ranks share a row, the tokens are this rank's part of it, and `cu_seq_lens_q` the bounds in all of it.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from pipelines.train.sequence import sharing, to_heads, to_tokens

    shared = sharing().size > 1
    if shared:
        query, key, value = to_heads(query), to_heads(key), to_heads(value)

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
    output = torch.cat(outputs, dim=2)
    return (to_tokens(output) if shared else output).transpose(1, 2).contiguous(), None
