"""Sequence parallelism: ranks that share their rows, each with a part of the tokens (Ulysses, arXiv:2309.14509).

All but attention works token by token. For attention the ranks of a group exchange: from all heads of some tokens to
some heads of all tokens, and back.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.nn.functional import all_to_all_single

from pipelines.errors import Problem, RecipeError

PADDING = 0
"""Token that fills a row up so that it divides; it is a sample of its own, which nothing learns from."""


@dataclass(frozen=True)
class SequenceGroup:
    """The group of ranks that this one shares its rows with, its place among them, and how many they are."""

    group: Any
    rank: int
    size: int


_group = SequenceGroup(None, 0, 1)


def init_sequence_parallel(size: int) -> None:
    """Let every `size` ranks that follow one another share their rows; every rank must call it."""
    global _group
    _group = SequenceGroup(None, 0, 1)
    for first in range(0, dist.get_world_size(), size) if size > 1 else ():
        ranks = dist.new_group(list(range(first, first + size)))
        if first <= dist.get_rank() < first + size:
            _group = SequenceGroup(ranks, dist.get_rank() - first, size)


def sequence_group() -> SequenceGroup:
    """The group of this rank; it is by itself where `init_sequence_parallel` was not called."""
    return _group


def check_heads(config: Any, size: int) -> None:
    """RecipeError unless a model's heads can be dealt out to `size` ranks."""
    heads = config.num_attention_heads
    pairs = getattr(config, "num_key_value_heads", None) or heads
    if heads % size or (pairs % size and size % pairs):
        message = f"the model has {heads} heads, {pairs} of them for keys and values, which {size} ranks cannot share"
        raise RecipeError("the recipe", [Problem("train.sequence_parallel_size", message)])


def own_part(batch: dict[str, Any]) -> dict[str, Any]:
    """This rank's tokens of a collated row, with the targets among them; attention still gets the bounds of all."""
    size, rank = _group.size, _group.rank
    if size == 1:
        return batch
    length = batch["input_ids"].shape[1]
    missing = -length % size
    part = (length + missing) // size
    begin, end = rank * part, (rank + 1) * part
    mine = (batch["logits_to_keep"] >= begin) & (batch["logits_to_keep"] < end)
    bounds = batch["cu_seq_lens_q"]
    if missing:
        bounds = torch.cat([bounds, bounds[-1:] + missing])
    return {
        **batch,
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, missing), value=PADDING)[:, begin:end],
        "position_ids": _places(batch["position_ids"], missing)[:, begin:end],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "logits_to_keep": batch["logits_to_keep"][mine] - begin,
        "targets": batch["targets"][mine],
        "owners": batch["owners"][mine],
    }


def _places(places: torch.Tensor, missing: int) -> torch.Tensor:
    return torch.cat([places, torch.arange(missing)[None].to(places)], dim=1)


def to_heads(states: torch.Tensor) -> torch.Tensor:
    """[1, heads, tokens / size, width] of this rank's tokens to [1, heads / size, tokens, width] of its heads.

    Where there are fewer heads than ranks, each is given to several ranks.
    """
    size = _group.size
    if states.shape[1] < size:
        states = states.repeat_interleave(size // states.shape[1], dim=1)
    _, heads, tokens, width = states.shape
    parts = _exchange(states.reshape(size, heads // size, tokens, width))
    return parts.transpose(0, 1).reshape(1, heads // size, size * tokens, width)


def to_tokens(states: torch.Tensor) -> torch.Tensor:
    """[1, heads / size, tokens, width] of this rank's heads to [1, heads, tokens / size, width] of its tokens."""
    size = _group.size
    _, heads, tokens, width = states.shape
    parts = _exchange(states.reshape(heads, size, tokens // size, width).transpose(0, 1))
    return parts.reshape(1, size * heads, tokens // size, width)


def _exchange(parts: torch.Tensor) -> torch.Tensor:
    """The n-th part to the n-th rank of the group, and from each its part for this one; gradients go back likewise."""
    parts = parts.contiguous()
    received: torch.Tensor = all_to_all_single(torch.empty_like(parts), parts, group=_group.group)
    return received
