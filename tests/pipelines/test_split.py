from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import DataError
from pipelines.recipe import Recipe
from pipelines.records import RowDigest
from pipelines.split import held_out, split
from pipelines.workspace import Place, Workspace


def finished(tmp_path: Path, table: pa.Table, files: int) -> Place:
    """A finished clean stage that holds `table` in a number of files."""
    place = Place(Workspace(str(tmp_path / f"w{files}")), "clean", "f")
    step = -(-table.num_rows // files)
    names = []
    for number in range(files):
        path = Path(place.path(f"{number}.parquet"))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(number * step, step), path)
        names.append(path.name)
    place.finish({"report": {"digest": "x", "outputs": {"rows": names}}})
    return place


def rows(count: int, groups: int) -> pa.Table:
    return pa.table(
        {
            "row_id": [f"r{i}" for i in range(count)],
            "pos": np.arange(count) * 3,
            "query": [f"q{i % groups}" for i in range(count)],
            "response": [f"a{i}" for i in range(count)],
        }
    )


def run(source: Place, seed: int = 1, **section: Any) -> tuple[dict[str, Any], dict[str, pa.Table]]:
    recipe = Recipe.model_validate({"name": "t", "seed": seed, "ingest": {"source": "x"}, "split": section})
    place = Place(source.workspace, "split", "f", {"clean": source})
    place.clear()
    report = split(recipe, place)
    place.finish({"report": report})
    sides = ("train", "test")
    return report, {side: pa.concat_tables([pq.read_table(path) for path in place.outputs(side)]) for side in sides}


@pytest.mark.usefixtures("ray_cluster")
def test_groups_stay_together_whatever_the_files(tmp_path: Path) -> None:
    table = rows(3000, groups=200)
    reports = {}
    for files in (1, 5):
        report, sides = run(finished(tmp_path, table, files), test_ratio=0.2, group="query")
        train, test = (set(sides[side]["query"].to_pylist()) for side in ("train", "test"))
        assert not train & test
        assert len(train | test) == 200
        assert 0.12 < sides["test"].num_rows / 3000 < 0.28
        assert sorted(sides["train"]["pos"].to_pylist() + sides["test"]["pos"].to_pylist()) == table["pos"].to_pylist()
        for side in sides.values():
            assert side["pos"].to_pylist() == sorted(side["pos"].to_pylist())
        reports[files] = report
    assert reports[1]["digest"] == reports[5]["digest"]
    digests = [RowDigest(), RowDigest()]
    for digest, side in zip(digests, ("train", "test"), strict=True):
        digest.update(sides[side])
    assert reports[1]["digest"] == "-".join(digest.hexdigest() for digest in digests)


@pytest.mark.usefixtures("ray_cluster")
def test_first_rows_and_errors(tmp_path: Path) -> None:
    source = finished(tmp_path, rows(100, groups=10), files=4)
    report, sides = run(source, first=30)
    assert report["rows"] == {"train": 70, "test": 30}
    assert sides["test"]["row_id"].to_pylist() == [f"r{i}" for i in range(30)]
    with pytest.raises(DataError, match="there are only 100 rows"):
        run(source, first=101)
    with pytest.raises(DataError, match="no row on the train side"):
        run(source, first=100)
    with pytest.raises(DataError, match="did you mean 'query'"):
        run(source, test_ratio=0.1, group="qeury")


def test_a_row_keeps_its_side_when_others_come_and_go() -> None:
    groups = pa.array([f"问题{i}" for i in range(500)] + [None])
    mask = held_out(groups, seed=7, test_ratio=0.1)
    assert (held_out(groups[100:], seed=7, test_ratio=0.1) == mask[100:]).all()
    assert (held_out(groups, seed=8, test_ratio=0.1) != mask).any()
    wider = held_out(groups, seed=7, test_ratio=0.3)
    assert wider[mask].all()  # a larger test set contains the smaller one
