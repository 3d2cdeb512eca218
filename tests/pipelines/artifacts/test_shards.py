"""Shards come in the order of their numbers, however many there are and however their files are called."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.artifacts import shards as module
from pipelines.artifacts.shards import Attempt, Shard, run_shards
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.clean.stage import CleanInputs, CleanStage
from pipelines.errors import StageError
from pipelines.recipe.clean import Clean
from pipelines.recipe.ingest import Ingest
from pipelines.sources.read import read_source
from tests.outputs import finished
from tests.pipelines.sources.samples import write_lines

pytestmark = pytest.mark.usefixtures("ray_cluster")


def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
    with attempt.writer("rows", pa.schema([pa.field("n", pa.int64())])) as writer:
        writer.write_table(pa.table({"n": [shard["index"]]}))
    return {"n": shard["index"]}


def test_commits_are_in_the_order_of_their_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INDEX_DIGITS", 1)
    place = Place(Workspace(str(tmp_path)), "clean", "f")

    def run() -> list[int]:
        commits = run_shards(
            place, "p", lambda: [{"index": index} for index in range(12)], work, concurrency=None, title="t"
        )
        tables = [pq.read_table(commit["files"]["rows"]) for commit in commits]
        assert [table["n"].to_pylist() for table in tables] == [[commit["index"]] for commit in commits]
        return [commit["result"]["n"] for commit in commits]

    assert run() == list(range(12))
    names = {path.stem for path in place.local("p", "commits").iterdir()}
    assert names == {str(index) for index in range(12)}
    place.local("p", "commits", "2.json").unlink()
    assert run() == list(range(12))
    assert len(list(place.local("p", "data").iterdir())) == 12


def test_rows_of_many_shards_stay_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "INDEX_DIGITS", 1)
    texts = [f"第{i}个回答，说的是第{i}件事情，与别的都不相同。" for i in range(130)]
    texts[100], texts[20], texts[125] = texts[3], "短", texts[90]
    source = write_lines(tmp_path / "a.jsonl", [{"query": f"问{i}", "response": text} for i, text in enumerate(texts)])
    workspace = Workspace(str(tmp_path / "w"))
    place = Place(workspace, "ingest", "f")
    read = finished(place, read_source(Ingest(source=str(source), shard_bytes=700), place))
    assert len(read.report.outputs.rows) > 12
    assert table_of(read.paths(read.report.outputs.rows))["pos"].to_pylist() == list(range(130))
    process = ["document_deduplicator", {"text_length_filter": {"min_len": 2}}, "document_deduplicator"]
    place = Place(workspace, "clean", "f")
    report = CleanStage(Clean(process=process)).run(place, CleanInputs(read))
    table = table_of([place.path(name) for name in report.outputs.rows])
    kept = [i for i in range(130) if i not in (20, 100, 125)]
    assert table["pos"].to_pylist() == kept
    assert table["response"].to_pylist() == [texts[i] for i in kept]
    gone = table_of([place.path(name) for name in report.outputs.dropped])
    assert sorted(zip(gone["pos"].to_pylist(), gone["operator"].to_pylist(), strict=True)) == [
        (20, "text_length_filter"),
        (100, "document_deduplicator"),
        (125, "document_deduplicator"),
    ]


def table_of(paths: list[str]) -> pa.Table:
    return pa.concat_tables([pq.read_table(path) for path in paths])


def work_whose_commit_fails(shard: Shard, attempt: Attempt) -> dict[str, Any]:
    Path(attempt.folder).with_name("commits").symlink_to("/dev/full")  # so that the commit cannot be written
    return work(shard, attempt)


def test_a_commit_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    place = Place(Workspace(str(tmp_path)), "clean", "f")
    with pytest.raises(StageError, match=r"^.*/p/commits/00000\.json: cannot be written .*run again$") as caught:
        run_shards(place, "p", lambda: [{"index": 0}], work_whose_commit_fails, concurrency=None, title="t")
    assert type(caught.value) is StageError  # as it was, without Ray's account of where it was raised
