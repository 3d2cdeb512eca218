"""Attention over samples that stand one after another in one row: each sample sees itself alone.

Registered with transformers under NAME, and under ONE_SAMPLE for rows of one sample. The work is the sum of the
samples' squares, not the square of their sum. On CUDA it is one call of PyTorch's own variable-length flash attention;
elsewhere one call per sample.
"""

from inspect import signature
from itertools import pairwise
from typing import Any

from pipelines.errors import StageError
from pipelines.recipe.train import Train

FLASH_CAPABILITY = (8, 0)
"""The least CUDA compute capability that flash attention runs on."""

NAME, ONE_SAMPLE = "danlu_per_sample", "danlu_one_sample"


def register() -> None:
    """Make NAME and ONE_SAMPLE values of `attn_implementation`; NAME needs `cu_seq_lens_q` passed to the model."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, per_sample_attention)
    AttentionInterface.register(ONE_SAMPLE, one_sample_attention)


def has_one_sample_a_row(section: Train) -> bool:
    """Whether no forward pass has more than one sample, so that none needs to be kept from another."""
    return not section.packing and section.per_device_train_batch_size == 1 and section.sequence_parallel_size == 1


UNDERSTOOD = frozenset(
    {
        *("scaling", "dropout", "sliding_window", "softcap", "s_aux", "cu_seq_lens_q", "max_length_q"),
        "attention_mask",  # where it is none
        *("cu_seq_lens_k", "max_length_k"),  # the same as for queries: samples attend to themselves
        "position_ids",  # what attends to what follows from the bounds; rotation was done before
        "is_causal",  # where it is not false
        *("labels", "shift_labels", "num_items_in_batch", "output_router_logits"),  # what the loss is made of
        *("use_cache", "output_attentions", "output_hidden_states", "past_key_values"),  # where they are not true
    }
)
"""The arguments that models may hand to attention."""


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
    softcap: float | None = None,
    s_aux: Any = None,
    **others: Any,
) -> tuple[Any, None]:
    """Causal attention of each sample by itself.

    `query` [1, heads, tokens, width]; `key` and `value` may have fewer heads; returns [1, tokens, heads, width]. Where
    ranks share a row, the tokens are this rank's part of it, and `cu_seq_lens_q` the bounds in all of it. `softcap`
    bounds the scores by a tanh (Gemma 2); `s_aux` [heads] are scores of a sink that takes a share of the attention
    (gpt-oss). StageError for any other argument that could change the result.
    """
    # here, because torch stands behind it, and the driver imports this file with loop.py
    from pipelines.train.sequence import sequence_group, to_heads, to_tokens

    require_understood(module, attention_mask, others)
    group = sequence_group()
    shared = group.size > 1
    if shared:
        query, key, value = to_heads(query), to_heads(key), to_heads(value)
        s_aux = None if s_aux is None else s_aux.reshape(group.size, -1)[group.rank]
    if softcap is not None or s_aux is not None:
        output = _with_scores(query, key, value, scaling, dropout, cu_seq_lens_q, sliding_window, softcap, s_aux)
    elif dropout == 0 and _has_flash(query):
        output = _flash(query, key, value, scaling, cu_seq_lens_q, max_length_q, sliding_window)
    else:
        output = _one_by_one(query, key, value, scaling, dropout, cu_seq_lens_q, sliding_window)
    return (to_tokens(output) if shared else output).transpose(1, 2).contiguous(), None


def one_sample_attention(
    module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: float | None = None, **options: Any
) -> tuple[Any, None]:
    """The same where the row is one sample, for models that do not hand its bounds on to attention."""
    import torch

    length = query.shape[2]
    bounds = torch.arange(2, dtype=torch.int32, device=query.device) * length
    given = {**options, "cu_seq_lens_q": bounds, "max_length_q": length}
    return per_sample_attention(module, query, key, value, attention_mask, scaling, **given)


def require_understood(module: Any, attention_mask: Any, others: dict[str, Any]) -> None:
    """StageError where a model asks for attention that is not computed here."""
    asked = {name for name, value in others.items() if name not in UNDERSTOOD and value is not None}
    asked |= {name for name in ("use_cache", "output_attentions", "output_hidden_states") if others.get(name)}
    asked |= {name for name in ("past_key_values",) if others.get(name) is not None}
    if attention_mask is not None:
        asked.add("attention_mask")
    if others.get("is_causal", getattr(module, "is_causal", True)) is False:
        asked.add("is_causal=False")
    if asked:
        raise StageError(
            f"train.model: {type(module).__name__} asks for attention with {', '.join(sorted(asked))}, which training "
            "does not compute; use another model"
        )


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


def _with_scores(
    query: Any,
    key: Any,
    value: Any,
    scaling: float | None,
    dropout: float,
    cu_seq_lens_q: Any,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Any,
) -> Any:
    """Attention of each sample by its matrix of scores, for what PyTorch's own attention does not compute."""
    import torch

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
    outputs = []
    for begin, end in pairwise(cu_seq_lens_q.tolist()):
        scores = query[:, :, begin:end] @ key[:, :, begin:end].transpose(2, 3) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        places = torch.arange(end - begin, device=query.device)
        distance = places[:, None] - places[None, :]
        seen = distance >= 0
        if sliding_window is not None:
            seen &= distance < sliding_window
        scores = scores.float().masked_fill(~seen, float("-inf"))
        if sinks is not None:
            sink = sinks.float().reshape(1, -1, 1, 1).expand(1, -1, end - begin, 1)
            scores = torch.cat([scores, sink], dim=-1)
        weights = torch.softmax(scores, dim=-1)[..., : end - begin].to(value.dtype)
        weights = torch.nn.functional.dropout(weights, dropout, training=dropout > 0)
        outputs.append(weights @ value[:, :, begin:end])
    return torch.cat(outputs, dim=2)
