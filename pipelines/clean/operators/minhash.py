"""Near-duplicates by MinHash and locality-sensitive hashing, with datasketch's hashes and data-juicer's bands."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import regex

from pipelines.clean.column import Column, Indices, utf8
from pipelines.clean.operators.html import text_of_known_tags
from pipelines.clean.operators.registry import OPERATORS, Dialect, Parameters, PositiveCount, Ratio, Regex, operator
from pipelines.clean.operators.words import pieces, runs
from pipelines.similarity.hamming import Finder
from pipelines.similarity.minhash import band_hashes, optimal_bands
from pipelines.similarity.simhash import without_characters
from pipelines.similarity.sketch import (
    first_of_similar,
    ignored_characters,
    overlap,
    sketch_of_other,
    sketches,
    sketches_with_questions,
)
from pipelines.similarity.union_find import first_of_equal

_PUNCTUATION = regex.compile(r"\p{P}")


def _shingles(text: str, tokenization: str, window: int) -> set[str]:
    """The distinct runs of `window` tokens."""
    if tokenization == "character":
        return {text[i : i + window] for i in range(len(text) - window + 1)}
    tokens = _PUNCTUATION.split(text) if tokenization == "punctuation" else [t for t in text.split(" ") if t]
    return set(runs(tokens, window, " "))


FEWEST_PERMUTATIONS = 32
"""Sketches of fewer bytes tell nothing of how like two texts are."""


def _check(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    sketched = dialect == "zh" and parameters["tokenization"] == "character"
    if parameters["tokenization"] == "sentencepiece" and not parameters["tokenizer_model"]:
        yield "tokenizer_model", "tokenization: sentencepiece needs the path of its model"
    bands, rows = parameters["num_bands"], parameters["num_rows_per_band"]
    if bool(bands) != bool(rows):
        yield "num_bands" if bands else "num_rows_per_band", "give num_bands and num_rows_per_band together, or neither"
    if bands and rows and bands * rows > parameters["num_permutations"]:
        yield (
            "num_bands",
            f"{bands} bands of {rows} rows need more than num_permutations {parameters['num_permutations']}",
        )
    if parameters["question_key"] == "":
        yield "question_key", "names no column; null: answers are compared alone"
    elif parameters["question_key"] and not sketched:
        yield "question_key", "only dialect: zh with tokenization: character compares answers with their questions"
    if sketched:
        yield from _unused(parameters)


def _unused(parameters: Parameters) -> Iterator[tuple[str, str]]:
    """Parameters without a meaning where sketches are compared."""
    if parameters["num_bands"]:
        yield "num_bands", "tokenization: character compares by the overlap itself in dialect: zh; remove the bands"
    if not parameters["lowercase"]:
        yield "lowercase", "tokenization: character tells no case apart in dialect: zh"
    if parameters["num_permutations"] < FEWEST_PERMUTATIONS:
        yield "num_permutations", f"{parameters['num_permutations']} are too few; {FEWEST_PERMUTATIONS} at least"


def _by_row(keys: pa.Array) -> Any:
    return keys.flatten().to_numpy(zero_copy_only=False).reshape(-1, keys.type.list_size)


def _cluster(keys: pa.Array, parameters: Parameters, find: Finder) -> Indices:
    """For each row the first row of its cluster.

    Of sketches, a row goes for an earlier one that stays and is alike; of bands, rows that agree in one are joined, and
    so on.
    """
    if pa.types.is_uint8(keys.type.value_type):
        return first_of_similar(_by_row(keys), parameters["num_permutations"], parameters["jaccard_threshold"])
    return first_of_equal(_by_row(keys))


def _overlap(keys: pa.Array, parameters: Parameters, one: Indices, other: Indices) -> npt.NDArray[np.float64] | None:
    """The Jaccard similarity of rows, where their keys tell it."""
    if not pa.types.is_uint8(keys.type.value_type):
        return None
    rows = _by_row(keys)
    return overlap(rows[one], rows[other], parameters["num_permutations"])


def _sketched(column: Column, window: int, permutations: int, ignore_pattern: str | None) -> pa.Array:
    """Sketches of the texts' letters and digits, of short answers with their questions."""
    answers, texts = _letters(column, ignore_pattern), column.array
    if column.questions is None:
        found = sketches(*utf8(answers), window, permutations)
    else:
        empty = pa.scalar("", pa.large_string())
        questions = _letters(Column(column.questions), ignore_pattern)
        asked = pc.binary_join_element_wise(questions, answers, empty)
        found = sketches_with_questions(asked, answers, window, permutations)
        texts = pc.binary_join_element_wise(column.questions, texts, empty)
    for row in np.flatnonzero(np.diff(utf8(answers)[1]) == 0).tolist():
        found[row] = sketch_of_other(texts[row].as_py(), found.shape[1])
    return pa.FixedSizeListArray.from_arrays(pa.array(found.ravel()), found.shape[1])


def _letters(column: Column, ignore_pattern: str | None) -> pa.Array:
    """The texts without tags, what the pattern matches, blanks, marks and laughter."""
    bare = Column(column.rewrite(column.contains("<"), text_of_known_tags))
    if ignore_pattern:
        ignored = regex.compile(ignore_pattern)
        bare = Column(pa.array([ignored.sub("", text) for text in bare.texts()], type=pa.large_string()))
    data, offsets = without_characters(*bare.utf8, ignored_characters())
    return pa.LargeStringArray.from_buffers(len(column), pa.py_buffer(offsets), pa.py_buffer(data))


@operator("deduplicator", version=4, check=_check, cluster=_cluster, overlap=_overlap)
def document_minhash_deduplicator(
    column: Column,
    *,
    tokenization: Literal["space", "punctuation", "character", "sentencepiece"] = "space",
    window_size: PositiveCount = 5,
    lowercase: bool = True,
    ignore_pattern: Regex | None = None,
    num_permutations: PositiveCount = 256,
    jaccard_threshold: Ratio = 0.7,
    num_bands: PositiveCount | None = None,
    num_rows_per_band: PositiveCount | None = None,
    tokenizer_model: str | None = None,
    question_key: str | None = None,
    dialect: Dialect = "zh",
) -> pa.Array:
    """What tells near-duplicates: one number per band of a text's MinHash, or in `zh`, for characters, a sketch.

    Texts without a shingle are all duplicates of each other in data-juicer's dialect; in `zh` only equal ones are. With
    `tokenization: character`, `zh` compares letters and digits alone (no marks, blanks, tags, 哈哈), a row goes only
    for one that stays and is `jaccard_threshold` like it, and the drop's reason tells their overlap. Texts of fewer
    than 30 letters must be nearly equal. With `question_key`, answers of fewer than 100 characters must be alike both
    together with their questions and alone.
    """
    if dialect == "zh" and tokenization == "character":
        return _sketched(column, window_size, num_permutations, ignore_pattern)
    texts = [text.lower() for text in column.texts()] if lowercase else column.texts()
    if ignore_pattern:
        ignored = regex.compile(ignore_pattern)
        texts = [ignored.sub("", text) for text in texts]
    if tokenization == "sentencepiece":
        shingles = [set(runs(row, window_size, "")) for row in pieces(texts, str(tokenizer_model))]
    else:
        shingles = [_shingles(text, tokenization, window_size) for text in texts]
    if dialect == "zh":
        whole = zip(shingles, texts, column.texts(), strict=True)
        shingles = [found or {f"\0{left or text}"} for found, left, text in whole]
    bands, rows = num_bands, num_rows_per_band
    if not (bands and rows):
        bands, rows = optimal_bands(jaccard_threshold, num_permutations)
    hashes = band_hashes(shingles, num_permutations, bands, rows)
    return pa.FixedSizeListArray.from_arrays(pa.array(hashes.ravel()), bands)


OPERATORS["ray_bts_minhash_deduplicator"] = replace(
    OPERATORS["document_minhash_deduplicator"], name="ray_bts_minhash_deduplicator"
)
