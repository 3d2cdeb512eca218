"""Manifests that were written when reports were plain dictionaries are read, and written as they were."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.reports.clean import (
    AnalyzeReport,
    CleanReport,
    EditCounts,
    EmptyStatistic,
    OperatorStats,
    StringStatistic,
)
from pipelines.artifacts.stage import Report, read_manifest
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.clean.stage import _drops_in_words

CLEAN: dict[str, Any] = {
    "summary": "1 of 2 rows stay; by hand: 1 dropped, 1 restored",
    "by_hand": {"dropped": 1, "restored": 1},
    "digest": "d",
    "rows": 1,
    "rows_in": 2,
    "dialect": "zh",
    "operators": [
        {
            "index": 0,
            "operator": "clean_email_mapper",
            "kind": "mapper",
            "rows_in": 2,
            "rows_out": 2,
            "changed": 1,
            "seconds": 0.25,
        }
    ],
    "samples": [{"index": 0, "operator": "clean_email_mapper", "row_id": "a", "before": "a@x.com", "after": ""}],
    "outputs": {"rows": ["edited/data/0.parquet"], "dropped": []},
    "statistics": ["rows-0/data/0.parquet"],
    "clusters": [],
}
NUMBER = {
    "name": "text_len",
    "operator": "text_length_filter",
    "bounds": {"min_len": 5, "max_len": 2000},
    "count": 2,
    "mean": 6.5,
    "std": 0.5,
    "min": 6.0,
    "1%": 6.01,
    "25%": 6.25,
    "50%": 6.5,
    "75%": 6.75,
    "99%": 6.99,
    "max": 7.0,
    "exact": True,
    "sigma": {"low": 5.0, "high": 8.0, "beyond": 0},
    "histogram": {"edges": [6.01, 6.5, 6.99], "counts": [1, 1]},
}
STRING = {
    "name": "lang",
    "operator": "language_id_score_filter",
    "bounds": {"min_score": 0.8},
    "count": 2,
    "unique": 1,
    "top": "zh",
    "freq": 2,
    "values": [["zh", 2]],
}
EMPTY = {"name": "votes", "operator": "specified_numeric_field_filter", "bounds": {}, "count": 0}
ANALYZE: dict[str, Any] = {
    "summary": "3 statistics of 2 rows",
    "digest": "d",
    "rows": 2,
    "statistics": [NUMBER, STRING, EMPTY],
    "filters": [{"operator": "text_length_filter", "bounds": {"min_len": 5, "max_len": 2000}, "cuts": 1}],
}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(Workspace(str(tmp_path)), "stage", "f")


def written_again(place: Place, report: dict[str, Any], kind: type[Report]) -> tuple[Any, dict[str, Any]]:
    """A manifest with that report as it is read, and its report as it is written then."""
    place.finish(json.dumps({"stage": "stage", "report": report}).encode())
    manifest = read_manifest(place, kind)
    assert manifest
    manifest.write(place)
    again: dict[str, Any] = place.workspace.read_json(place.path("manifest.json"))["report"]
    return manifest.report, again


def test_of_clean(place: Place) -> None:
    read, written = written_again(place, CLEAN, CleanReport)
    assert read.manual_edits == EditCounts(dropped=1, restored=1)
    assert written.pop("by_hand") == {"changed": 0, "dropped": 1, "restored": 1, "untouched": 0}
    since = {"evaluation_sets": [], "not_compared": []}  # keys that earlier versions did not write
    assert [operator.pop("missing") for operator in written["operators"]] == [0]  # nor this one
    assert written == {key: value for key, value in CLEAN.items() if key != "by_hand"} | since


def test_of_clean_where_nobody_edited(place: Place) -> None:
    assert written_again(place, CLEAN | {"by_hand": {}}, CleanReport)[0].manual_edits == EditCounts()


def test_of_analyze(place: Place) -> None:
    read, written = written_again(place, ANALYZE, AnalyzeReport)
    number, string, empty = read.statistics
    assert (number.p1, number.p50, number.p99) == (6.01, 6.5, 6.99)
    assert isinstance(string, StringStatistic) and isinstance(empty, EmptyStatistic)
    since = {"thresholds": [], "files": []}  # keys that earlier versions did not write
    filters = [{**entry, "names": []} for entry in ANALYZE["filters"]]
    assert written == ANALYZE | since | {"filters": filters}


def test_the_summary_names_the_operators_that_dropped_the_most_rows() -> None:
    counts = [("length", 60, 50), ("none", 50, 50), ("language", 50, 46), ("length", 46, 45), ("near", 45, 42)]
    counts.append(("a", 42, 41))
    stats = [
        OperatorStats(index=index, operator=name, kind="filter", rows_in=before, rows_out=after)
        for index, (name, before, after) in enumerate(counts)
    ]
    said = "; dropped: length 11, language 4, near 3, others 1 (danlu rows RECIPE --dropped)"
    assert _drops_in_words(stats) == said
    assert _drops_in_words(stats[1:2]) == ""
