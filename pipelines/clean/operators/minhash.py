"""Near-duplicates by MinHash and locality-sensitive hashing, with datasketch's hashes and data-juicer's bands."""

from collections.abc import Iterator
from typing import Literal

import pyarrow as pa
import regex

from pipelines.clean.column import Column, Indices
from pipelines.clean.operators.registry import Dialect, Parameters, PositiveCount, Ratio, Regex, operator
from pipelines.clean.operators.words import pieces, runs
from pipelines.similarity.hamming import Finder
from pipelines.similarity.minhash import band_hashes, optimal_bands
from pipelines.similarity.union_find import first_of_equal

_PUNCTUATION = regex.compile(r"\p{P}")


def _shingles(text: str, tokenization: str, window: int) -> set[str]:
    """The distinct runs of `window` tokens."""
    if tokenization == "character":
        return {text[i : i + window] for i in range(len(text) - window + 1)}
    tokens = _PUNCTUATION.split(text) if tokenization == "punctuation" else [t for t in text.split(" ") if t]
    return set(runs(tokens, window, " "))


def _check(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    if parameters["tokenization"] == "sentencepiece" and not parameters["tokenizer_model"]:
        yield "tokenizer_model", "tokenization: sentencepiece needs the path of its model"
    bands, rows = parameters["num_bands"], parameters["num_rows_per_band"]
    if bands and rows and bands * rows > parameters["num_permutations"]:
        yield (
            "num_bands",
            f"{bands} bands of {rows} rows need more than num_permutations {parameters['num_permutations']}",
        )


def _cluster(keys: pa.Array, parameters: Parameters, find: Finder) -> Indices:
    """For each row the first row of its cluster: rows that agree in a whole band are joined, and so on."""
    bands = keys.type.list_size
    return first_of_equal(keys.flatten().to_numpy(zero_copy_only=False).reshape(-1, bands))


@operator("deduplicator", check=_check, cluster=_cluster)
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
    dialect: Dialect = "zh",
) -> pa.Array:
    """One number per band of a text's MinHash, a fixed-size list of uint64.

    Texts without a shingle are all duplicates of each other in data-juicer's dialect; in `zh` only equal ones are.
    """
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
