"""Analyze, against pandas over data-juicer's own statistics, which is what its analyzer prints."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.reports.clean import NumberStatistic, StringStatistic
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Workspace
from pipelines.clean import statistics
from pipelines.clean.analyze import filters_of
from pipelines.clean.statistics import ERROR, describe_numbers, sketch, sketched_quantile
from pipelines.clean.thresholds import what_if
from pipelines.errors import InputError
from pipelines.recipe.clean import Clean
from pipelines.recipe.schema import Recipe
from rayjobs import pipeline
from rayjobs.cluster import Cluster

FILTERS: list[Any] = [
    {"text_length_filter": {"min_len": 100, "max_len": 2000}},
    {"language_id_score_filter": {"lang": "zh", "min_score": 0.9}},
    {"alphanumeric_filter": {"tokenization": False, "min_ratio": 0.72}},
    {"special_characters_filter": {"max_ratio": 0.2}},
]


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> pd.DataFrame:
    """The rows whose every statistic data-juicer computed on the text as it came."""
    rows = pq.read_table(shared_data / "goldens" / "zhihu_real_m1.parquet").to_pandas()
    return rows[rows.special_char_ratio.notna() & (rows.clean_same == True)]  # noqa: E712 - null is not same


@pytest.fixture(scope="module")
def done(
    shared_data: Path, golden: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory, ray_cluster: None
) -> dict[str, Output[Any]]:
    folder = tmp_path_factory.mktemp("analyze")
    corpus = pq.read_table(shared_data / "corpora" / "zhihu_real.parquet")
    wanted = set(golden.id)
    table = corpus.filter(pa.array([key in wanted for key in corpus["id"].to_pylist()]))
    pq.write_table(table, folder / "rows.parquet", row_group_size=500)
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "ingest": {"source": str(folder / "rows.parquet"), "shard_bytes": 100_000},
            "analyze": {},
            "clean": {"process": ["clean_html_mapper", *FILTERS], "dialect": "data_juicer"},
        }
    )
    return pipeline.run(recipe, Workspace(str(folder / "run")), Cluster())


def described(output: Output[Any]) -> dict[str, Any]:
    return {entry.name: entry for entry in output.report.statistics}


def test_the_table_is_the_one_that_data_juicers_analyzer_prints(
    done: dict[str, Output[Any]], golden: pd.DataFrame
) -> None:
    found = described(done["analyze"])
    assert list(found) == ["text_len", "lang", "lang_score", "alnum_ratio", "special_char_ratio"]
    assert len(golden) > 1000
    for name in ("text_len", "lang_score", "alnum_ratio", "special_char_ratio"):
        expected = golden[name].describe(percentiles=[0.25, 0.5, 0.75])
        entry = found[name]
        assert isinstance(entry, NumberStatistic)
        values = entry.model_dump()
        for key, value in expected.items():
            assert values[key] == pytest.approx(value, rel=1e-6, abs=1e-9), (name, key)
    expected = golden["lang"].describe()
    assert isinstance(found["lang"], StringStatistic)
    assert found["lang"].model_dump(include={"count", "unique", "top", "freq"}) == expected.to_dict()


def test_it_says_where_thresholds_cut_and_what_three_sigma_is(
    done: dict[str, Output[Any]], golden: pd.DataFrame
) -> None:
    cuts = {entry.operator: entry.cuts for entry in done["analyze"].report.filters}
    assert cuts["special_characters_filter"] == int((golden.special_char_ratio > 0.2).sum()) > 0
    assert cuts["text_length_filter"] == 0
    values, sigma = golden.alnum_ratio, described(done["analyze"])["alnum_ratio"].sigma
    assert sigma.low == pytest.approx(values.mean() - 3 * values.std(), abs=1e-9)
    assert sigma.beyond == int((abs(values - values.mean()) > 3 * values.std()).sum())
    histogram = described(done["analyze"])["alnum_ratio"].histogram
    assert sum(histogram.counts) == len(golden)


def test_after_clean_the_same_is_told_of_what_is_left(done: dict[str, Output[Any]], golden: pd.DataFrame) -> None:
    before, after = described(done["analyze"]), described(done["analyze_clean"])
    left = golden[golden.special_char_ratio <= 0.2]
    assert after["special_char_ratio"].count == len(left) == done["clean"].report.rows
    assert after["special_char_ratio"].max == pytest.approx(left.special_char_ratio.max(), abs=1e-9)
    assert after["text_len"].histogram.edges == before["text_len"].histogram.edges


def test_the_report_shows_both(done: dict[str, Output[Any]], golden: pd.DataFrame) -> None:
    page = Path(done["clean"].folder.workspace.path("report.html")).read_text(encoding="utf-8")
    assert "<h2>Analysis</h2>" in page
    for name in ("text_len", "lang_score", "alnum_ratio", "special_char_ratio"):
        assert f"<title>{name}" in page
    cut = f"{(golden.special_char_ratio > 0.2).sum():,} of {len(golden):,} rows before cleaning"
    assert f"special_characters_filter (min_ratio 0, max_ratio 0.2) alone would drop {cut}" in page


def test_rows_near_a_limit_are_shown_and_counted_by_sigma(done: dict[str, Output[Any]], golden: pd.DataFrame) -> None:
    (limit,) = [entry for entry in done["analyze"].report.thresholds if entry.statistic == "special_char_ratio"]
    values = golden.special_char_ratio.sort_values()
    assert (limit.operator, limit.bound, limit.value) == ("special_characters_filter", "max_ratio", 0.2)
    assert [row.value for row in limit.kept] == pytest.approx(values[values <= 0.2][::-1][:10].tolist(), abs=1e-9)
    assert [row.value for row in limit.dropped] == pytest.approx(values[values > 0.2][:10].tolist(), abs=1e-9)
    std = values.std()
    for move in limit.moves:
        low, high = sorted((0.2, 0.2 + move.sigmas * std))
        assert move.rows == int(((values > low) & (values <= high)).sum()), move
    assert [move.sigmas for move in limit.moves] == [-3, -2, -1, 1, 2, 3]
    page = Path(done["clean"].folder.workspace.path("report.html")).read_text(encoding="utf-8")
    assert "special_characters_filter: max_ratio 0.2</h3>" in page


def test_what_if_answers_from_what_was_kept(done: dict[str, Output[Any]], golden: pd.DataFrame) -> None:
    steps = filters_of(Clean(process=["clean_html_mapper", *FILTERS], dialect="data_juicer"))
    told = what_if(
        done["analyze"], steps, ["special_characters_filter.max_ratio=0.15", "text_length_filter.min_len=2e2"]
    )
    rows, special, length = len(golden), golden.special_char_ratio, golden.text_len
    assert told == [
        f"special_characters_filter with max_ratio 0.15, not 0.2: alone it drops {(special > 0.15).sum():,} of "
        f"{rows:,} rows, not {(special > 0.2).sum():,}",
        f"text_length_filter with min_len 200, not 100: alone it drops {(length < 200).sum():,} of {rows:,} "
        "rows, not 0",
        f"all filters together leave {((special <= 0.15) & (length >= 200)).sum():,} of {rows:,} rows, "
        f"not {(special <= 0.2).sum():,}",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text_lenght_filter.min_len=5", "did you mean 'text_length_filter'"),
        ("text_length_filter.min_length=5", "did you mean 'min_len'"),
        ("text_length_filter.min_len=many", "many is no number"),
        ("text_length_filter.min_len=[", r"\[ is no number"),
        ("text_length_filter", "is not like"),
    ],
)
def test_what_if_names_what_it_does_not_know(done: dict[str, Output[Any]], change: str, message: str) -> None:
    steps = filters_of(Clean(process=FILTERS, dialect="data_juicer"))
    with pytest.raises(InputError, match=message):
        what_if(done["analyze"], steps, [change])


def values_of(kind: str) -> np.ndarray:
    random = np.random.default_rng(7)
    skewed = random.lognormal(5, 2, 100_000)
    return {"skewed": skewed, "signed": random.normal(0, 1, 100_000), "many zeros": np.floor(skewed / 300)}[kind]


@pytest.mark.parametrize("kind", ["skewed", "signed", "many zeros"])
def test_a_sketch_keeps_to_its_error_however_the_values_are_cut(kind: str) -> None:
    values = values_of(kind)
    whole = sketch(values)
    merged: Counter[int] = Counter()
    for part in reversed(np.array_split(values, 7)):
        merged.update(sketch(part))
    assert merged == whole
    ordered = np.sort(values)
    for share in (0, 0.01, 0.25, 0.5, 0.75, 0.99, 1):
        expected = ordered[int(share * (len(values) - 1))]
        assert sketched_quantile(whole, share) == pytest.approx(expected, rel=ERROR * (1 + 1e-9), abs=1e-12)


def test_above_the_limit_quantiles_come_from_the_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    values = values_of("skewed")
    exact = describe_numbers(lambda: iter(np.array_split(values, 3)), len(values))
    monkeypatch.setattr(statistics, "EXACT", 1000)
    large = describe_numbers(lambda: iter(np.array_split(values, 3)), len(values))
    assert exact and large
    assert (exact.exact, large.exact) == (True, False)
    for key in ("count", "mean", "std", "min", "max"):
        assert getattr(large, key) == pytest.approx(getattr(exact, key), rel=1e-12)
    for key in ("p1", "p25", "p50", "p75", "p99"):
        assert getattr(large, key) == pytest.approx(getattr(exact, key), rel=2 * ERROR)


def test_a_statistic_that_no_row_has() -> None:
    assert describe_numbers(lambda: iter([np.array([np.nan])]), 1) is None
