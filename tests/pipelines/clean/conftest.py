"""Model files, data-juicer's own answers, and the recipe they were made with."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ASSETS = ("lid.176.ftz", "zh.sp.model", "zh.arpa.bin", "flagged_words.json")

SIMHASH = {
    "tokenization": "character",
    "window_size": 5,
    "lowercase": False,
    "ignore_pattern": r"\p{P}",
    "num_blocks": 10,
    "hamming_distance": 6,
}


Process = Callable[..., list[Any]]


@pytest.fixture(scope="session")
def simhash() -> dict[str, Any]:
    """The deduplicator's parameters that the goldens were made with."""
    return SIMHASH


@pytest.fixture(scope="session")
def zhihu_process() -> Process:
    """The published recipe, with which the goldens were made."""
    return _zhihu_process


def _zhihu_process(votes: int, min_len: int, perplexity: bool = False) -> list[Any]:
    process: list[Any] = [
        {"specified_numeric_field_filter": {"field_key": "upvotes", "min_value": votes}},
        {"text_length_filter": {"min_len": min_len, "max_len": 2000}},
        "clean_email_mapper",
        "clean_html_mapper",
        "clean_ip_mapper",
        "clean_links_mapper",
        {"clean_copyright_mapper": None},
        {"language_id_score_filter": {"lang": "zh", "min_score": 0.9}},
        {"alphanumeric_filter": {"tokenization": False, "min_ratio": 0.72}},
        {"flagged_words_filter": {"lang": "zh", "tokenization": False, "max_ratio": 0.0005}},
        {"special_characters_filter": {"max_ratio": 0.4}},
        {"document_simhash_deduplicator": SIMHASH},
        {"topk_specified_field_selector": {"field_key": "upvotes", "topk": 50000}},
    ]
    if perplexity:
        process.insert(10, {"perplexity_filter": {"lang": "zh", "max_ppl": 1500}})
    return process


@pytest.fixture(scope="session")
def assets(shared_data: Path) -> dict[str, str]:
    """The model files that lie beside the real data, by name."""
    return {name: str(shared_data / "assets" / name) for name in ASSETS}


@pytest.fixture(scope="session")
def corpus(shared_data: Path) -> pa.Table:
    """Real Zhihu answers as canonical rows."""
    rows = pq.read_table(shared_data / "corpora" / "zhihu_real.parquet")
    return rows.append_column("row_id", rows["id"].cast(pa.string())).rename_columns({"id": "pos"})
