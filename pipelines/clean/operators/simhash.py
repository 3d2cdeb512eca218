"""Near-duplicates by SimHash: signatures that differ in few bits."""

from collections.abc import Iterator

import pyarrow as pa

from pipelines.clean.column import Column, Indices
from pipelines.clean.operators.registry import Dialect, Parameters, PositiveCount, Regex, operator
from pipelines.similarity.hamming import Finder, Signatures, first_of_near
from pipelines.similarity.simhash import Tokenization, simhash


def _check(parameters: Parameters, dialect: Dialect) -> Iterator[tuple[str, str]]:
    blocks, distance = parameters["num_blocks"], parameters["hamming_distance"]
    if blocks > 64:
        yield "num_blocks", f"{blocks} blocks of a 64-bit signature; at most 64"
    if distance >= blocks:
        yield "hamming_distance", f"{distance} must be less than num_blocks ({blocks})"


def _cluster(keys: pa.Array, parameters: Parameters, find: Finder) -> Indices:
    """For each row the first row of its cluster; `num_blocks` changes nothing."""
    signatures: Signatures = keys.to_numpy(zero_copy_only=False)
    return first_of_near(signatures, parameters["hamming_distance"], find)


@operator("deduplicator", check=_check, cluster=_cluster)
def document_simhash_deduplicator(
    column: Column,
    *,
    tokenization: Tokenization = "space",
    window_size: PositiveCount = 6,
    lowercase: bool = True,
    ignore_pattern: Regex | None = None,
    num_blocks: PositiveCount = 6,
    hamming_distance: PositiveCount = 4,
    dialect: Dialect = "zh",
) -> pa.Array:
    """64-bit signatures: a bit is set if it is set in most shingles' MD5 (Charikar 2002, as in simhash-pybind).

    Rows with fewer tokens than `window_size` all get 0 in data-juicer's dialect; in `zh` they get the hash of what is
    left of their text, or of the text itself where nothing is left, so that only equal ones are duplicates.
    """
    signatures = simhash(
        column.array,
        tokenization=tokenization,
        window_size=window_size,
        lowercase=lowercase,
        ignore_pattern=ignore_pattern,
        short_texts="hash" if dialect == "zh" else "zero",
    )
    return pa.array(signatures)
