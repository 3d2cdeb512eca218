"""Reads fastText classifiers with hierarchical softmax, such as lid.176, as plain arrays.

The file format is fastText 0.9.2's (`fasttext.cc`, `dictionary.cc`, `quantmatrix.cc`). Product-quantized rows are
decoded once when the model is loaded, not for every n-gram.
"""

import struct
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from pipelines.errors import DataError

MAGIC, VERSION = 793712314, 12
HIERARCHICAL_SOFTMAX, SUPERVISED = 1, 3
LABEL = b"__label__"
END = b"</s>"

Floats = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Classifier:
    """A loaded model, as plain arrays."""

    labels: list[str]
    """Language codes, without fastText's prefix."""
    rows: Floats
    """Input vectors, shape (words and n-grams, dimensions)."""
    words: Ints
    """Open hash table of word numbers by fastText's hash, -1 where empty; its length is a power of two."""
    word_bytes: npt.NDArray[np.uint8]
    word_offsets: npt.NDArray[np.int64]
    buckets: Ints
    """Row of each n-gram bucket, -1 where it was pruned away."""
    occupied: npt.NDArray[np.uint8]
    """The same as bits, small enough for the processor's cache."""
    ngrams: tuple[int, int]
    """Shortest and longest n-gram, code points."""
    end: int
    """The row of the end of a line."""
    output: Floats
    """One vector per inner node of the tree, shape (labels - 1 or more, dimensions)."""
    children: Ints
    """Left and right child of each inner node, shape (labels - 1, 2); numbers below the count of labels are leaves."""


class _Reader:
    """A cursor over the bytes of a model file."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at = data, 0

    def unpack(self, layout: str) -> tuple[Any, ...]:
        values = struct.unpack_from("<" + layout, self.data, self.at)
        self.at += struct.calcsize("<" + layout)
        return values

    def array(self, dtype: Any, count: int) -> npt.NDArray[Any]:
        values = np.frombuffer(self.data, dtype=dtype, count=count, offset=self.at)
        self.at += values.nbytes
        return values

    def string(self) -> bytes:
        end = self.at
        while self.data[end]:
            end += 1
        value = bytes(self.data[self.at : end])
        self.at = end + 1
        return value


@cache
def load_classifier(path: str) -> Classifier:
    """Read a fastText model file (`.bin` or `.ftz`), once per process; DataError where it is of another kind."""
    with open(path, "rb") as stream:
        reader = _Reader(memoryview(stream.read()))
    try:
        return _read(reader)
    except (struct.error, ValueError, IndexError) as error:
        raise DataError(f"{path}: not a fastText classifier that can be used here ({error})") from None


def _read(reader: _Reader) -> Classifier:
    if reader.unpack("ii") != (MAGIC, VERSION):
        raise ValueError("wrong magic number or version")
    dimensions, _, _, _, _, word_ngrams, loss, kind, bucket, shortest, longest, _ = reader.unpack("12i")
    reader.unpack("d")
    if (loss, kind, word_ngrams) != (HIERARCHICAL_SOFTMAX, SUPERVISED, 1):
        raise ValueError("only supervised models with hierarchical softmax and single words")
    words, labels, counts, pruned = _dictionary(reader)
    rows = _matrix(reader, quantized=bool(reader.unpack("?")[0]))
    output = _matrix(reader, quantized=bool(reader.unpack("?")[0]))
    buckets = np.full(bucket, -1, dtype=np.int32)
    if pruned is None:
        buckets[:] = np.arange(bucket) + len(words)
    else:
        buckets[pruned[:, 0]] = pruned[:, 1] + len(words)
    lengths = [len(word) for word in words]
    return Classifier(
        labels=[label.removeprefix(LABEL).decode() for label in labels],
        rows=rows,
        words=_word_table(words),
        word_bytes=np.frombuffer(b"".join(words), dtype=np.uint8),
        word_offsets=np.cumsum([0, *lengths]),
        buckets=buckets,
        occupied=np.packbits(buckets >= 0, bitorder="little"),
        ngrams=(shortest, longest),
        end=words.index(END),
        output=output[:, :dimensions],
        children=_tree(counts),
    )


def _dictionary(reader: _Reader) -> tuple[list[bytes], list[bytes], list[int], Ints | None]:
    """Words, labels, the labels' counts, and the pruned buckets with their places, if any were pruned."""
    size, word_count, _, _, pruned_size = reader.unpack("iiiqq")
    entries = [(reader.string(), *reader.unpack("qb")) for _ in range(size)]
    words = [entry[0] for entry in entries[:word_count]]
    labels = [entry[0] for entry in entries[word_count:]]
    counts = [entry[1] for entry in entries[word_count:]]
    pruned = reader.array(np.int32, 2 * pruned_size).reshape(-1, 2) if pruned_size >= 0 else None
    return words, labels, counts, pruned


def _matrix(reader: _Reader, quantized: bool) -> Floats:
    if not quantized:
        rows, columns = reader.unpack("qq")
        return reader.array(np.float32, rows * columns).reshape(rows, columns)
    (normed,) = reader.unpack("?")
    rows, _, size = reader.unpack("qqi")
    codes = reader.array(np.uint8, size).reshape(rows, -1)
    decoded = _decoded(codes, *_quantizer(reader))
    if normed:
        norm_codes = reader.array(np.uint8, rows).reshape(rows, 1)
        decoded = decoded * _decoded(norm_codes, *_quantizer(reader))
    return np.ascontiguousarray(decoded)


def _quantizer(reader: _Reader) -> tuple[int, int, Floats]:
    """Dimensions, dimensions per part, and the centroids."""
    dimensions, _, part, _ = reader.unpack("iiii")
    return dimensions, part, reader.array(np.float32, dimensions * 256)


def _decoded(codes: npt.NDArray[np.uint8], dimensions: int, part: int, centroids: Floats) -> Floats:
    """The vectors that product-quantized codes stand for."""
    pieces = []
    for number in range(codes.shape[1]):
        width = min(part, dimensions - number * part)
        table = centroids[number * 256 * part :][: 256 * width].reshape(256, width)
        pieces.append(table[codes[:, number]])
    return np.concatenate(pieces, axis=1)


def _hash(word: bytes) -> int:
    value = 2166136261
    for byte in word:
        value = ((value ^ (byte | 0xFFFFFF00 if byte > 127 else byte)) * 16777619) & 0xFFFFFFFF
    return value


def _word_table(words: list[bytes]) -> Ints:
    size = 1 << (4 * len(words)).bit_length()
    table = np.full(size, -1, dtype=np.int32)
    for number, word in enumerate(words):
        slot = _hash(word) & (size - 1)
        while table[slot] >= 0:
            slot = (slot + 1) & (size - 1)
        table[slot] = number
    return table


def _tree(counts: list[int]) -> Ints:
    """The Huffman tree over labels in falling order of count, as fastText builds it."""
    labels = len(counts)
    weights = [*counts, *([10**15] * (labels - 1))]
    children = np.zeros((labels - 1, 2), dtype=np.int32)
    leaf, node = labels - 1, labels
    for inner in range(labels - 1):
        for side in range(2):
            if leaf >= 0 and weights[leaf] < weights[node]:
                children[inner, side], leaf = leaf, leaf - 1
            else:
                children[inner, side], node = node, node + 1
        weights[labels + inner] = weights[children[inner, 0]] + weights[children[inner, 1]]
    return children
