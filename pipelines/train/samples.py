"""Tokenized samples in memory-mapped arrays, in a seeded order that nothing but seed and epoch decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.train.chat import IGNORED
from pipelines.train.tokenize import KINDS, Tokenized

Sample = tuple[NDArray[np.int32], NDArray[np.int32]]
"""Tokens and labels of one chat."""


class Samples:
    """The samples of an index, by their place in it; opened once per process, read page by page."""

    def __init__(self, data: Tokenized) -> None:
        shards = [{kind: np.load(Path(shard[kind]), mmap_mode="r") for kind in KINDS} for shard in data.shards]
        self._shards = shards
        self._starts = np.cumsum([0, *[shard["samples"] for shard in data.shards]])
        self._index = np.load(data.index)

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, place: int) -> Sample:
        number = int(self._index[place])
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        shard = self._shards[which]
        begin, end = shard["sample_offsets"][number - self._starts[which] :][:2]
        return shard["tokens"][begin:end], shard["labels"][begin:end]


@dataclass
class Schedule:
    """The samples of a whole run, numbered through: sample `i` is the same on any number of workers.

    Epoch after epoch, each in an order that follows from seed and epoch; so an optimizer step that ends one epoch
    begins the next, and to resume at a step means to start at its number.
    """

    samples: Samples
    seed: int
    total: int

    def __post_init__(self) -> None:
        self._epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return self.total

    def __getitem__(self, number: int) -> Sample:
        epoch, place = divmod(number, len(self.samples))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.samples))
        return self.samples[int(self._order[place])]


def collate(samples: Sequence[Sample]) -> dict[str, Any]:
    """Samples one after another in one row, with no padding: attention goes by `cu_seq_lens_q`.

    Of shape [1, tokens]: `input_ids` and `position_ids`, which begin at 0 in each sample. `cu_seq_lens_q`: where
    samples begin and end, [samples + 1]. `logits_to_keep`: places whose next token has loss; `targets`: that token.
    """
    import torch

    lengths = [len(tokens) for tokens, _ in samples]
    bounds = np.cumsum([0, *lengths])
    following = np.concatenate([np.append(labels[1:], IGNORED) for _, labels in samples])
    places = np.flatnonzero(following != IGNORED)
    cumulative = torch.from_numpy(bounds.astype(np.int32))
    return {
        "input_ids": torch.from_numpy(np.concatenate([tokens for tokens, _ in samples]).astype(np.int64))[None],
        "position_ids": torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None],
        "cu_seq_lens_q": cumulative,
        "cu_seq_lens_k": cumulative,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
        "logits_to_keep": torch.from_numpy(places),
        "targets": torch.from_numpy(following[places].astype(np.int64)),
    }
