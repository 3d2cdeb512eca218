"""The whole stage on real rows with real Ray: against data-juicer's result, on any number of shards, and resumed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.clean.stage import clean, determinants
from pipelines.errors import DataError
from pipelines.recipe.schema import Recipe

Stage = Callable[..., tuple[dict[str, Any], Place]]


def recipe(process: list[Any], dialect: str = "zh", assets: dict[str, str] | None = None) -> Recipe:
    section = {"process": process, "dialect": dialect, "assets": assets or {}}
    return Recipe.model_validate({"name": "r", "ingest": {"source": "none"}, "clean": section})


def ingested(workspace: Workspace, table: pa.Table, shards: int, name: str = "in") -> Place:
    """Rows as the stage before leaves them, in so many files."""
    place = Place(workspace, "ingest", f"{name}-{shards}")
    paths = []
    for index in range(shards):
        low, high = table.num_rows * index // shards, table.num_rows * (index + 1) // shards
        paths.append(place.path("rows", "data", f"{index:05d}.rows.parquet"))
        with workspace.parquet_writer(paths[-1], table.schema) as writer:
            writer.write_table(table.slice(low, high - low), row_group_size=1000)
    place.finish({"report": {"digest": "d", "outputs": {"rows": place.relative(paths)}}})
    return place


@pytest.fixture
def run(tmp_path: Path, ray_cluster: None) -> Stage:
    """Clean a table; returns the report and the finished place."""

    def go(made: Recipe, table: pa.Table, shards: int, name: str = "c") -> tuple[dict[str, Any], Place]:
        workspace = Workspace(str(tmp_path))
        place = Place(workspace, "clean", f"{name}-{shards}", {"ingest": ingested(workspace, table, shards, name)})
        report = clean(made, place)
        place.finish({"report": report})
        return report, place

    return go


def read(place: Place, kind: str) -> list[dict[str, Any]]:
    return [row for table in read_tables(place.workspace, place.outputs(kind)) for row in table.to_pylist()]


@pytest.fixture(scope="module")
def golden(shared_data: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(shared_data / "goldens" / "zhihu_real_m1.parquet").to_pylist()
    return rows


@pytest.mark.parametrize(("shards", "sorted_rows"), [(1, 1 << 16), (2, 0), (8, 1 << 16)])
def test_the_published_recipe_gives_data_juicers_rows_in_its_order(
    run: Stage,
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
    report, place = run(recipe(zhihu_process(1, 100), "data_juicer", assets), table, shards)
    ranked = sorted((row for row in golden if row["final_rank"] is not None), key=lambda row: row["final_rank"])
    kept = read(place, "rows")
    assert [int(row["row_id"]) for row in kept] == [row["id"] for row in ranked]
    assert [row["pos"] for row in kept] == list(range(len(ranked)))
    dropped = {int(row["row_id"]): row["operator"] for row in read(place, "dropped")}
    assert dropped == {
        row["id"]: row["dropped_by"] for row in golden if row["dropped_by"] and row["id"] not in perplexed
    }
    assert report["rows"] == len(ranked) and report["rows_in"] == table.num_rows


def test_perplexity_too(
    run: Stage, corpus: pa.Table, golden: list[dict[str, Any]], assets: dict[str, str], zhihu_process: Any
) -> None:
    pytest.importorskip("kenlm")
    _, place = run(recipe(zhihu_process(1, 100, perplexity=True), "data_juicer", assets), corpus, 2)
    ranked = sorted((row for row in golden if row["final_rank"] is not None), key=lambda row: row["final_rank"])
    assert [int(row["row_id"]) for row in read(place, "rows")] == [row["id"] for row in ranked]


def test_the_result_does_not_depend_on_shards_or_their_order(
    run: Stage, corpus: pa.Table, assets: dict[str, str], zhihu_process: Any
) -> None:
    made = recipe(zhihu_process(0, 20), "zh", assets)
    table = corpus.slice(0, 3000)
    reports = [run(made, table, shards)[0] for shards in (1, 5)]
    assert reports[0]["digest"] == reports[1]["digest"]
    counts = [[(o["operator"], o["rows_in"], o["rows_out"], o["changed"]) for o in r["operators"]] for r in reports]
    assert counts[0] == counts[1]
    assert counts[0][0][1] == 3000 and counts[0][-1][2] == reports[0]["rows"]
    assert reports[0]["samples"] == reports[1]["samples"]


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


def test_files_may_end_in_another_order_than_they_are_listed(run: Stage, corpus: pa.Table, tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(WAITING, encoding="utf-8")
    table = corpus.slice(0, 900)
    commits = tmp_path / "clean" / "late-3" / "rows-0" / "commits"
    waiting = {"waiting_mapper": {"commits": str(commits), "first": table["response"][0].as_py()}}
    rest = ["clean_links_mapper", {"text_length_filter": {"min_len": 40}}, {"document_deduplicator": {}}]
    late = recipe([waiting, *rest])
    assert late.clean
    late.clean.custom_operators.append(str(tmp_path / "own.py"))
    report, place = run(late, table, 3, "late")
    ended = sorted(commits.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert [path.name for path in ended][-1] == "00000.json" and len(ended) == 3
    expected, other = run(recipe(rest), table, 1, "prompt")
    assert report["digest"] == expected["digest"]
    assert read(place, "rows") == read(other, "rows")
    dropped = [{row["pos"]: row["operator"] for row in read(found, "dropped")} for found in (place, other)]
    assert dropped[0] == dropped[1] != {}


def simhash_of(simhash: dict[str, Any]) -> dict[str, Any]:
    return {"document_simhash_deduplicator": simhash}


def test_operators_after_whole_data_set_ones_see_only_what_is_left(run: Stage, simhash: dict[str, Any]) -> None:
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
    report, place = run(recipe(process), table, 3)
    assert [row["row_id"] for row in read(place, "rows")] == ["r0", "r2"]
    told = {row["row_id"]: (row["operator"], row["reason"]) for row in read(place, "dropped")}
    assert told == {
        "r1": ("document_simhash_deduplicator", "duplicate of row r0"),
        "r5": ("document_simhash_deduplicator", "duplicate of row r0"),
        "r4": ("text_length_filter", "text_len 3 is below min_len 5"),
        "r3": ("topk_specified_field_selector", "upvotes 3 is not among the 2 selected"),
    }
    clusters = pa.concat_tables(read_tables(place.workspace, [place.path(name) for name in report["clusters"]]))
    assert [(r["row_id"], r["cluster"]) for r in clusters.to_pylist()] == [("r0", 0), ("r1", 0), ("r5", 0)]
    assert [(o["rows_in"], o["rows_out"]) for o in report["operators"]] == [(6, 4), (4, 3), (3, 2), (2, 2)]


def test_data_juicers_order_holds_for_what_follows(run: Stage, simhash: dict[str, Any]) -> None:
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
    _, place = run(recipe([top, "clean_ip_mapper", simhash_of(simhash)], "data_juicer"), table, 2)
    kept = [(row["row_id"], row["pos"]) for row in read(place, "rows")]
    assert kept == [("r1", 0), ("r3", 1), ("r5", 2), ("r4", 3), ("r2", 4)]  # r0, a copy of r5, now comes after it


@pytest.mark.parametrize("dialect", ["zh", "data_juicer"])
def test_empty_shards_and_a_clean_that_drops_everything(run: Stage, simhash: dict[str, Any], dialect: str) -> None:
    table = pa.table({"row_id": ["a", "b"], "pos": [0, 1], "response": ["一二三四", "五六七八"], "upvotes": [1, 2]})
    top = {"topk_specified_field_selector": {"field_key": "upvotes", "topk": 1}}
    process = [{"text_length_filter": {"min_len": 99}}, simhash_of(simhash), top]
    report, place = run(recipe(process, dialect), table, 5)
    assert report["rows"] == 0 and not read(place, "rows") and len(read(place, "dropped")) == 2
    assert place.outputs("rows")


def test_a_crash_costs_only_the_shards_that_were_not_committed(
    tmp_path: Path, ray_cluster: None, corpus: pa.Table, simhash: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.clean import stage

    workspace = Workspace(str(tmp_path))
    source = ingested(workspace, corpus.slice(0, 400), 4)
    made = recipe([{"text_length_filter": {"min_len": 20}}, simhash_of(simhash)])
    whole = clean(made, Place(workspace, "clean", "whole", {"ingest": source}))

    def crash(*_: Any) -> None:
        raise KeyboardInterrupt

    place = Place(workspace, "clean", "crashed", {"ingest": source})
    with monkeypatch.context() as patch:
        patch.setattr(stage, "decide", crash)
        with pytest.raises(KeyboardInterrupt):
            clean(made, place)
    commits = workspace.list(place.path("rows-0", "commits"))
    workspace.remove(commits[2])  # as if the crash had come before this one
    before = {path: workspace.read(path) for path in commits if path != commits[2]}
    report = clean(made, place)
    assert report["digest"] == whole["digest"]
    assert {path: workspace.read(path) for path in before} == before


def test_a_row_that_cannot_be_cleaned_is_named(run: Stage) -> None:
    table = pa.table({"row_id": ["a", "b"], "pos": [0, 1], "response": ["一二三四", None]})
    with pytest.raises(DataError, match=r"row b \(pos 1\) has no response"):
        run(recipe(["text_length_filter"]), table, 1)


def test_the_fingerprint_follows_models_and_parameters_but_not_speed(assets: dict[str, str], tmp_path: Path) -> None:
    process = [{"language_id_score_filter": {"lang": "zh"}}]
    base = determinants(recipe(process, assets=assets))
    assert base == determinants(recipe(process))  # the wheel carries the same model file
    slower = recipe(process).model_copy(update={"clean": recipe(process).clean.model_copy(update={"concurrency": 1})})  # type: ignore[union-attr]
    assert determinants(slower) == base
    assert determinants(recipe([{"language_id_score_filter": {"lang": "en"}}])) != base
    other = tmp_path / "lid.176.ftz"
    other.write_bytes(Path(assets["lid.176.ftz"]).read_bytes() + b"x")
    assert determinants(recipe(process, assets={"lid.176.ftz": str(other)})) != base
