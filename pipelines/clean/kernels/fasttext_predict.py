"""A fastText classifier's best label for every text of an Arrow column.

Answers as fastText 0.9.2 does (`fasttext.cc`, `dictionary.cc`, `loss.cc`), to the last bit: the same rows are added in
the same order in single precision. N-grams are hashed in the column's own bytes.
"""

import sys
from functools import cache
from typing import Any

import numba as nb
import numpy as np
import numpy.typing as npt

from pipelines.clean.kernels.fasttext_model import LABEL, Classifier, Floats, Ints
from pipelines.clean.kernels.trie import lower_table
from pipelines.similarity.utf8 import decode


@cache
def _one_line() -> Ints:
    """Lower case, and a space for a newline."""
    table = lower_table().copy()
    table[ord("\n")] = ord(" ")
    return table


@nb.njit(cache=True, nogil=True)
def _encode(point: int, out: Any, at: int) -> int:  # pragma: no cover - compiled
    """Write a code point as UTF-8; returns where the next one goes."""
    if point < 0x80:
        out[at] = point
        return at + 1
    if point < 0x800:
        out[at], out[at + 1] = 0xC0 | point >> 6, 0x80 | point & 0x3F
        return at + 2
    if point < 0x10000:
        out[at], out[at + 1], out[at + 2] = 0xE0 | point >> 12, 0x80 | point >> 6 & 0x3F, 0x80 | point & 0x3F
        return at + 3
    out[at], out[at + 1] = 0xF0 | point >> 18, 0x80 | point >> 12 & 0x3F
    out[at + 2], out[at + 3] = 0x80 | point >> 6 & 0x3F, 0x80 | point & 0x3F
    return at + 4


@nb.njit(cache=True, nogil=True)
def _lowered(data: Any, begin: int, end: int, lower: Any, out: Any) -> int:  # pragma: no cover - compiled
    """The text in lower case, as UTF-8 in `out`; its length, or -1 where the table cannot say."""
    size, i = 0, begin
    while i < end:
        point, i = decode(data, i)
        mapped = lower[point]
        if mapped < 0:
            return -1
        size = _encode(mapped, out, size)
    return size


@nb.njit(cache=True, nogil=True)
def _fnv(value: Any, byte: Any) -> Any:  # pragma: no cover - compiled
    signed = np.uint32(byte) | (np.uint32(0xFFFFFF00) if byte > 127 else np.uint32(0))
    return np.uint32((value ^ signed) * np.uint32(16777619))


@nb.njit(cache=True, nogil=True)
def _find_word(token: Any, begin: int, end: int, words: Any, word_bytes: Any, offsets: Any) -> Any:  # pragma: no cover
    value = np.uint32(2166136261)
    for i in range(begin, end):
        value = _fnv(value, token[i])
    slot = np.int64(value) & (len(words) - 1)
    while words[slot] >= 0:
        number = words[slot]
        first = offsets[number]
        if offsets[number + 1] - first == end - begin:
            same = True
            for i in range(end - begin):
                if word_bytes[first + i] != token[begin + i]:
                    same = False
                    break
            if same:
                return np.int64(number)
        slot = (slot + 1) & (len(words) - 1)
    return -1


@nb.njit(cache=True, nogil=True)
def _add(hidden: Any, rows: Any, row: int) -> None:  # pragma: no cover - compiled
    for d in range(len(hidden)):
        hidden[d] += rows[row, d]


@nb.njit(cache=True, nogil=True)
def _add_ngrams(
    token: Any, begin: int, end: int, ngrams: Any, buckets: Any, occupied: Any, rows: Any, hidden: Any
) -> int:  # pragma: no cover - compiled
    """Add the vectors of the n-grams of `token[begin:end]`, word marks included; returns how many there were."""
    added, bucket_count = 0, np.uint32(len(buckets))
    for i in range(begin, end):
        if token[i] & 0xC0 == 0x80:
            continue
        value, j = np.uint32(2166136261), i
        for n in range(1, ngrams[1] + 1):
            if j >= end:
                break
            value = _fnv(value, token[j])
            j += 1
            while j < end and token[j] & 0xC0 == 0x80:
                value = _fnv(value, token[j])
                j += 1
            if n < ngrams[0] or (n == 1 and (i == begin or j == end)):
                continue
            bucket = value % bucket_count
            if occupied[bucket >> np.uint32(3)] >> (bucket & np.uint32(7)) & 1:
                _add(hidden, rows, buckets[bucket])
                added += 1
    return added


@nb.njit(cache=True, nogil=True)
def _is_space(byte: Any) -> Any:  # pragma: no cover - compiled
    return byte == 32 or 9 <= byte <= 13 or byte == 0


@nb.njit(cache=True, nogil=True)
def _is_label(token: Any, begin: int, end: int, label: Any) -> bool:  # pragma: no cover - compiled
    matched = 0
    while matched < len(label) and begin + matched < end and token[begin + matched] == label[matched]:
        matched += 1
    return matched == len(label)


@nb.njit(cache=True, nogil=True)
def _right(hidden: Any, output: Any, inner: int) -> Any:  # pragma: no cover - compiled
    """The probability of the right child of an inner node."""
    dot = np.float32(0)
    for d in range(len(hidden)):
        dot += output[inner, d] * hidden[d]
    return np.float32(1.0 / np.float64(np.float32(1) + np.exp(-dot)))


@nb.njit(cache=True, nogil=True)
def _of_leaf(hidden: Any, output: Any, path: Any) -> Any:  # pragma: no cover - compiled
    """The probability of the leaf at the end of a path: rows of inner node and side, those beyond the leaf -1."""
    score = np.float32(0)
    for k in range(len(path)):
        if path[k, 0] < 0:
            break
        right = _right(hidden, output, path[k, 0])
        share = np.float64(right) if path[k, 1] else np.float64(np.float32(1.0 - np.float64(right)))
        score = np.float32(score + np.float32(np.log(share + 1e-5)))
    return np.exp(score)


@nb.njit(cache=True, nogil=True)
def _best(hidden: Any, output: Any, children: Any) -> Any:  # pragma: no cover - compiled
    """The most probable leaf and the logarithm of its probability, by a depth-first search that leaves out what cannot
    be better; fastText adds 1e-5 to each probability, so that the sum may exceed 1."""
    labels = len(children) + 1
    nodes, scores = np.zeros(labels + 1, np.int64), np.zeros(labels + 1, np.float32)
    top, best, best_score = 1, -1, np.float32(-np.inf)
    nodes[0] = 2 * labels - 2
    while top:
        top -= 1
        node, score = nodes[top], scores[top]
        if score < best_score or score < np.float32(np.log(1e-5)):
            continue
        if node < labels:
            best, best_score = node, score
            continue
        right = _right(hidden, output, node - labels)
        left_score = np.float32(score + np.float32(np.log(np.float64(np.float32(1.0 - np.float64(right))) + 1e-5)))
        right_score = np.float32(score + np.float32(np.log(np.float64(right) + 1e-5)))
        first = 0 if left_score > right_score else 1  # the likelier child is looked at first, so it goes on top
        nodes[top], scores[top] = children[node - labels, 1 - first], right_score if first == 0 else left_score
        nodes[top + 1], scores[top + 1] = children[node - labels, first], left_score if first == 0 else right_score
        top += 2
    return best, best_score


@nb.njit(cache=True, nogil=True)
def _predict(
    data: Any, offsets: Any, lower: Any, rows: Any, words: Any, word_bytes: Any, word_offsets: Any, buckets: Any,
    occupied: Any, ngrams: Any, end_row: int, output: Any, children: Any, label: Any, paths: Any,
) -> Any:  # pragma: no cover - compiled  # fmt: skip
    """Label number and probability of each row, and the probabilities of the leaves at the end of `paths`; label -1
    where lower-casing needs Python."""
    answers, scores = np.full(len(offsets) - 1, -1, np.int64), np.zeros(len(offsets) - 1, np.float32)
    asked = np.zeros((len(offsets) - 1, len(paths)), np.float32)
    text, token = np.empty(1024, np.uint8), np.empty(1024, np.uint8)
    hidden = np.zeros(rows.shape[1], dtype=np.float32)
    for row in range(len(answers)):
        room = 2 * (offsets[row + 1] - offsets[row]) + 8
        if len(text) < room:
            text, token = np.empty(2 * room, np.uint8), np.empty(2 * room, np.uint8)
        size = _lowered(data, offsets[row], offsets[row + 1], lower, text)
        if size < 0:
            continue
        hidden[:] = 0
        added, i, ended = 0, 0, False
        while i < size and not ended:
            if _is_space(text[i]):
                i += 1
                continue
            token[0], length = 60, 1
            while i < size and not _is_space(text[i]):
                token[length] = text[i]
                length, i = length + 1, i + 1
            token[length] = 62
            if _is_label(token, 1, length, label):
                continue
            number = _find_word(token, 1, length, words, word_bytes, word_offsets)
            if number >= 0:
                _add(hidden, rows, number)
                added += 1
            ended = number == end_row
            if not ended:
                added += _add_ngrams(token, 0, length + 1, ngrams, buckets, occupied, rows, hidden)
        if not ended:
            _add(hidden, rows, end_row)
            added += 1
        scale = np.float32(1.0 / added)
        for d in range(len(hidden)):
            hidden[d] *= scale
        answers[row], score = _best(hidden, output, children)
        scores[row] = np.exp(np.float32(score))
        for k in range(len(paths)):
            asked[row, k] = _of_leaf(hidden, output, paths[k])
    return answers, scores, asked


def predict(model: Classifier, data: Any, offsets: Any) -> tuple[npt.NDArray[np.int64], Floats]:
    """The number of the best label and its probability for each text, lower-cased and on one line.

    `data` and `offsets` are a string column's bytes and row offsets.
    """
    answers, scores, _ = predict_labels(model, data, offsets, ())
    return answers, scores


def predict_labels(
    model: Classifier, data: Any, offsets: Any, labels: tuple[str, ...]
) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    """The same, and the probabilities of `labels`, a column each."""
    paths = _paths(model, labels)
    answers, scores, asked = _run(model, data, offsets, _one_line(), paths)
    for row in np.flatnonzero(answers < 0):  # lower case depends on the context, such as a final sigma
        text = bytes(data[offsets[row] : offsets[row + 1]]).decode().lower().replace("\n", " ")
        lowered = np.frombuffer(text.encode(), dtype=np.uint8)
        ends = np.array([0, len(lowered)])
        (answers[row],), (scores[row],), (asked[row],) = _run(model, lowered, ends, _identity(), paths)
    return answers, scores, asked


def _paths(model: Classifier, labels: tuple[str, ...]) -> npt.NDArray[np.int64]:
    """The way from the root to each label's leaf: inner node and side, shape (labels, depth, 2), -1 beyond the leaf."""
    leaves = len(model.children) + 1
    parent = {int(child): (inner, side) for inner, pair in enumerate(model.children) for side, child in enumerate(pair)}
    paths: npt.NDArray[np.int64] = np.full((len(labels), leaves, 2), -1, dtype=np.int64)
    for number, label in enumerate(labels):
        node, way = model.labels.index(label), []
        while node in parent:
            inner, side = parent[node]
            way.append((inner, side))
            node = inner + leaves
        paths[number, : len(way)] = way[::-1]
    return paths


@cache
def _identity() -> Ints:
    return np.arange(sys.maxunicode + 1, dtype=np.int32)


def _run(
    model: Classifier, data: Any, offsets: Any, lower: Ints, paths: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], Floats, Floats]:
    answers, scores, asked = _predict(
        data,
        offsets,
        lower,
        model.rows,
        model.words,
        model.word_bytes,
        model.word_offsets,
        model.buckets,
        model.occupied,
        model.ngrams,
        model.end,
        model.output,
        model.children,
        np.frombuffer(LABEL, dtype=np.uint8),
        paths,
    )
    return answers, scores, asked
