"""Exact duplicates."""

import hashlib
import string

import pyarrow as pa
import regex

from pipelines.clean.column import Column, Indices
from pipelines.clean.operators.registry import Parameters, operator
from pipelines.similarity.hamming import Finder
from pipelines.similarity.union_find import first_of_equal

_NOT_LETTERS = regex.compile(rf"\s+|\d+|[{regex.escape(string.punctuation)}]")


def _cluster(keys: pa.Array, parameters: Parameters, find: Finder) -> Indices:
    """For each row the first row with an equal key."""
    codes = keys.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    return first_of_equal(codes.reshape(-1, 1))


@operator("deduplicator", cluster=_cluster)
def document_deduplicator(column: Column, *, lowercase: bool = False, ignore_non_character: bool = False) -> pa.Array:
    """MD5 of each text without whitespace at its ends.

    With `ignore_non_character`, whitespace, digits and ASCII punctuation do not count.
    """
    texts = column.texts()
    if lowercase:
        texts = [text.lower() for text in texts]
    if ignore_non_character:
        texts = [_NOT_LETTERS.sub("", text) for text in texts]
    digests = [hashlib.md5(text.strip().encode(), usedforsecurity=False).digest() for text in texts]
    return pa.array(digests, type=pa.binary(16))
