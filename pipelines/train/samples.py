"""Tokenized samples in memory-mapped arrays, in a seeded order that nothing but seed and epoch decides."""

import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.train.loss_mask import IGNORE_INDEX
from pipelines.train.pack import pack
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

    @cached_property
    def lengths(self) -> NDArray[np.int64]:
        """The tokens of each sample."""
        every = np.concatenate([np.diff(shard["sample_offsets"]) for shard in self._shards])
        lengths: NDArray[np.int64] = every[self._index]
        return lengths


class Schedule:
    """The rows of a whole run, numbered through: row `i` is the same on any number of workers.

    A row is a list of samples: one, or with `packed_to` as many as fit into that many tokens. Epoch after epoch,
    each in an order that follows from seed and epoch; so an optimizer step that ends one epoch begins the next,
    and to resume at a step means to start at its number.
    """

    def __init__(
        self, samples: Samples, seed: int, total: int, packed_to: int | None, copies: int = 1, batch: int = 1
    ) -> None:
        """`copies`: ranks that follow one another get the same `batch` rows, to share their tokens."""
        self._copies, self._batch = copies, batch
        self._samples = samples
        self._seed = seed
        self._total = total
        self._packed_to = packed_to
        self._first = 0  # number of the first row of the epoch below
        self._epoch = 0
        self._rows = self._rows_of(0)

    def __len__(self) -> int:
        return self._total * self._copies

    def __getitem__(self, number: int) -> list[Sample]:
        number = number // self._batch // self._copies * self._batch + number % self._batch
        if number < self._first:
            self._first, self._epoch, self._rows = 0, 0, self._rows_of(0)
        while number >= self._first + len(self._rows):
            self._first += len(self._rows)
            self._epoch += 1
            self._rows = self._rows_of(self._epoch)
        return [self._samples[place] for place in self._rows[number - self._first]]

    def _rows_of(self, epoch: int) -> list[list[int]]:
        return rows_of_epoch(self._samples, self._seed, epoch, self._packed_to)


def rows_of_epoch(samples: Samples, seed: int, epoch: int, packed_to: int | None) -> list[list[int]]:
    """Which samples stand in which row of an epoch, in the order they are trained."""
    if packed_to is not None:
        return pack(samples.lengths, packed_to, (seed, epoch))
    return [[int(place)] for place in np.random.default_rng([seed, epoch]).permutation(len(samples))]


def total_rows(samples: Samples, seed: int, epochs: float, packed_to: int | None) -> int:
    """Rows in that many epochs; a part of an epoch counts by its part."""
    if packed_to is None:
        return math.ceil(epochs * len(samples))
    whole = sum(len(rows_of_epoch(samples, seed, epoch, packed_to)) for epoch in range(int(epochs)))
    part = epochs - int(epochs)
    return whole + math.ceil(part * len(rows_of_epoch(samples, seed, int(epochs), packed_to)) if part else 0)


BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What of a collated row says where its samples begin and end."""


def collate(rows: Sequence[Sequence[Sample]]) -> dict[str, Any]:
    """The samples of some rows one after another in one row, with no padding: attention goes by `cu_seq_lens_q`.

    Of shape [1, tokens]: `input_ids` and `position_ids`, which begin at 0 in each sample. `cu_seq_lens_q`: where
    samples begin and end, [samples + 1]. `logits_to_keep`: places whose next token has loss; `targets`: that token;
    `owners`: the sample it is of.
    """
    import torch

    samples = [sample for row in rows for sample in row]
    lengths = [len(tokens) for tokens, _ in samples]
    bounds = np.cumsum([0, *lengths])
    following = np.concatenate([np.append(labels[1:], IGNORE_INDEX) for _, labels in samples])
    places = np.flatnonzero(following != IGNORE_INDEX)
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
        "owners": torch.from_numpy(np.repeat(np.arange(len(samples)), lengths)[places]),
    }
