import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from pipelines.artifacts.reports.rows import RowsReport, SplitReport
from pipelines.artifacts.rows import MESSAGES, RowDigest
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import DataError
from pipelines.evaluate.questions import held_out_questions
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.split import Split
from pipelines.sources.read import read_source
from pipelines.split import SplitInputs, SplitStage, held_out
from tests.outputs import finished, finished_rows


def cleaned(tmp_path: Path, table: pa.Table, files: int) -> Output[RowsReport]:
    """A finished clean stage that holds `table` in a number of files."""
    place = Place(Workspace(str(tmp_path / f"w{files}")), "clean", "f")
    step = -(-table.num_rows // files)
    names = []
    for number in range(files):
        path = Path(place.path(f"{number}.parquet"))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table.slice(number * step, step), path)
        names.append(path.name)
    return finished_rows(place, table.num_rows, names)


def rows(count: int, groups: int) -> pa.Table:
    return pa.table(
        {
            "row_id": [f"r{i}" for i in range(count)],
            "pos": np.arange(count) * 3,
            "query": [f"q{i % groups}" for i in range(count)],
            "response": [f"a{i}" for i in range(count)],
        }
    )


def run(
    source: Output[RowsReport], seed: int = 1, text_key: str = "response", **section: Any
) -> tuple[SplitReport, dict[str, pa.Table]]:
    stage = SplitStage(Split(**section), Ingest(source="x"), text_key, seed)
    place = Place(source.folder.workspace, "split", "f")
    place.clear()
    report = stage.run(place, SplitInputs(source))
    return report, sides_of(place, report)


def sides_of(place: Place, report: SplitReport) -> dict[str, pa.Table]:
    files = {"train": report.outputs.train, "test": report.outputs.test}
    return {side: pa.concat_tables([pq.read_table(place.path(name)) for name in files[side]]) for side in files}


@pytest.mark.usefixtures("ray_cluster")
def test_groups_stay_together_whatever_the_files(tmp_path: Path) -> None:
    table = rows(3000, groups=200)
    reports = {}
    for files in (1, 5):
        report, sides = run(cleaned(tmp_path, table, files), test_ratio=0.2, group="query")
        train, test = (set(sides[side]["query"].to_pylist()) for side in ("train", "test"))
        assert not train & test
        assert len(train | test) == 200
        assert 0.12 < sides["test"].num_rows / 3000 < 0.28
        assert sorted(sides["train"]["pos"].to_pylist() + sides["test"]["pos"].to_pylist()) == table["pos"].to_pylist()
        for side in sides.values():
            assert side["pos"].to_pylist() == sorted(side["pos"].to_pylist())
        reports[files] = report
    assert reports[1].digest == reports[5].digest
    digests = [RowDigest(), RowDigest()]
    for digest, side in zip(digests, ("train", "test"), strict=True):
        digest.update(sides[side])
    assert reports[1].digest == "-".join(digest.hexdigest() for digest in digests)


@pytest.mark.usefixtures("ray_cluster")
def test_first_rows_and_errors(tmp_path: Path) -> None:
    source = cleaned(tmp_path, rows(100, groups=10), files=4)
    report, sides = run(source, first=30)
    assert report.rows.model_dump() == {"train": 70, "test": 30}
    assert sides["test"]["row_id"].to_pylist() == [f"r{i}" for i in range(30)]
    with pytest.raises(DataError, match="there are only 100 rows"):
        run(source, first=101)
    with pytest.raises(DataError, match="no row on the train side"):
        run(source, first=100)
    told = r"no row on the test side \(of 100\); change split \(raise test_ratio\), .* clean: .+"
    with pytest.raises(DataError, match=told):
        run(source, test_ratio=1e-9)
    with pytest.raises(DataError, match="did you mean 'query'"):
        run(source, test_ratio=0.1, group="qeury")


def test_a_row_keeps_its_side_when_others_come_and_go() -> None:
    groups = pa.array([f"问题{i}" for i in range(500)] + [None])
    mask = held_out(groups, seed=7, test_ratio=0.1)
    assert (held_out(groups[100:], seed=7, test_ratio=0.1) == mask[100:]).all()
    assert (held_out(groups, seed=8, test_ratio=0.1) != mask).any()
    wider = held_out(groups, seed=7, test_ratio=0.3)
    assert wider[mask].all()  # a larger test set contains the smaller one


@pytest.fixture
def answers(shared_data: Path) -> tuple[pa.Table, list[tuple[int, int]]]:
    """Real answers, 60 of which are followed by copies of an earlier one, with the places of both."""
    texts = pq.read_table(shared_data / "zhihu_kol_sample.parquet", columns=["RESPONSE"])["RESPONSE"].to_pylist()
    texts = list(dict.fromkeys(text for text in texts if 200 < len(text) < 2000))[:600]
    copies = [(number, len(texts) + number) for number in range(60)]
    texts += [f"【转】{text[:-1]}，" for text in texts[:60]]  # another head, another end
    count = len(texts)
    columns = {
        "row_id": [f"r{i}" for i in range(count)],
        "pos": np.arange(count),
        "query": [f"q{i}" for i in range(count)],
    }
    return pa.table({**columns, "response": texts}), copies


@pytest.mark.usefixtures("ray_cluster")
def test_copies_of_an_answer_stay_together(tmp_path: Path, answers: tuple[pa.Table, list[tuple[int, int]]]) -> None:
    table, copies = answers
    digests = set()
    for files in (1, 4):
        report, sides = run(cleaned(tmp_path, table, files), test_ratio=0.3, group="near_duplicates")
        held = set(sides["test"]["pos"].to_pylist())
        assert sorted([*held, *sides["train"]["pos"].to_pylist()]) == list(range(660))
        assert [pair for pair in copies if (pair[0] in held) != (pair[1] in held)] == []
        assert 0.2 < len(held) / 660 < 0.4
        assert sides["test"].schema.names == table.schema.names
        digests.add(report.digest)
    assert len(digests) == 1
    _, sides = run(cleaned(tmp_path, table, 2), test_ratio=0.3)
    held = set(sides["test"]["pos"].to_pylist())
    assert len([pair for pair in copies if (pair[0] in held) != (pair[1] in held)]) > 10


@pytest.mark.usefixtures("ray_cluster")
def test_the_first_rows_take_their_groups_along(
    tmp_path: Path, answers: tuple[pa.Table, list[tuple[int, int]]]
) -> None:
    questions = [None, "甲", "乙", "甲", "丙", None, "乙", "丁"]
    table = rows(8, groups=8).set_column(2, "query", pa.array(questions))
    for files in (1, 3):
        _, sides = run(cleaned(tmp_path, table, files), first=3, group="query")
        assert sides["test"]["row_id"].to_pylist() == ["r0", "r1", "r2", "r3", "r6"]
        assert sides["train"]["row_id"].to_pylist() == ["r4", "r5", "r7"]
    with pytest.raises(DataError, match=r"no row on the train side .*change split"):
        run(cleaned(tmp_path, table.slice(0, 4), files=1), first=3, group="query")
    with pytest.raises(DataError, match=r"split.group messages: holds lists; name a column of texts or numbers"):
        lists = pa.array([["a"]] * 8)
        run(cleaned(tmp_path, table.append_column("messages", lists), files=4), first=3, group="messages")
    table, copies = answers
    _, sides = run(cleaned(tmp_path, table, files=5), first=100, group="near_duplicates")
    held = set(sides["test"]["pos"].to_pylist())
    assert held >= set(range(100)) and len(held) > 100
    assert [pair for pair in copies if (pair[0] in held) != (pair[1] in held)] == []


@pytest.mark.usefixtures("ray_cluster")
def test_near_duplicates_are_those_of_the_text_that_is_cleaned(tmp_path: Path) -> None:
    texts = ["同一个回答，抄来抄去也还是同一个回答。"] * 40
    table = rows(80, groups=80).append_column("text", pa.array([*texts, *(f"第{i}句" * 9 for i in range(40))]))
    source = cleaned(tmp_path, table, files=3)
    counts = []
    for text_key in ("response", "text"):
        _, sides = run(source, seed=42, text_key=text_key, test_ratio=0.5, group="near_duplicates")
        counts.append(sum(text == texts[0] for text in sides["test"]["text"].to_pylist()))
    assert 0 < counts[0] < 40 and counts[1] in (0, 40)
    by_response, by_text = (
        SplitStage(Split(test_ratio=0.5, group="near_duplicates"), None, text_key, 42).fingerprint_inputs()
        for text_key in ("response", "text")
    )
    assert by_response != by_text
    with pytest.raises(DataError, match=r"split.group response: the rows have no such column"):
        run(cleaned(tmp_path, table.drop_columns("response"), files=2), test_ratio=0.1, group="near_duplicates")


@pytest.mark.usefixtures("ray_cluster")
def test_a_source_of_its_own_is_held_out(tmp_path: Path, shared_data: Path) -> None:
    wishes = tmp_path / "wishes.json"
    shutil.copy(shared_data / "tianji-wishes-chinese-v0.1.json", wishes)
    ingest = Ingest(source=str(shared_data / "zhihu_kol_sample.parquet"), limit=300, system="你是一个人。")
    workspace = Workspace(str(tmp_path / "w"))
    place = Place(workspace, "ingest", "f")
    source = finished(place, read_source(ingest, place))
    stage = SplitStage(Split(test_source=str(wishes)), ingest, "response", 42)
    place = Place(workspace, "split", "f")
    report = stage.run(place, SplitInputs(source))
    given = json.loads(wishes.read_text(encoding="utf-8"))
    assert report.rows.model_dump() == {"train": 300, "test": len(given)}
    train, test = sides_of(place, report).values()
    assert train.equals(pa.concat_tables([pq.read_table(path) for path in source.paths(source.report.outputs.rows)]))
    turns = [item["conversation"][-1] for item in given]
    assert test["query"].to_pylist() == [turn["input"] for turn in turns]
    assert test["response"].to_pylist() == [turn["output"] for turn in turns]
    asked = held_out_questions(finished(place, report), None, 3)
    assert [question.query for question in asked] == [turn["input"] for turn in turns[:3]]
    assert "upvotes" in train.column_names and "upvotes" not in test.column_names
    before = stage.fingerprint_inputs()
    given[0]["conversation"][-1]["output"] += "！"
    wishes.write_text(json.dumps(given, ensure_ascii=False), encoding="utf-8")
    assert stage.fingerprint_inputs() != before
    assert stage.preflight() == []
    wishes.unlink()
    (problem,) = stage.preflight()
    assert re.match(r"split.test_source: .*wishes.json: no such file", problem.message)


@pytest.mark.usefixtures("ray_cluster")
def test_near_duplicates_of_several_turns_are_those_of_all_answers(tmp_path: Path) -> None:
    last = "这是所有对话共同的最后一个回答，一字不差。"
    first = [f"第{i // 2}个话题的头一个回答，{'甲乙丙丁戊己庚辛'[i // 2] * 30}。" for i in range(16)]
    talks = [
        [
            {"role": "user", "content": f"问{i}"},
            {"role": "assistant", "content": text},
            {"role": "user", "content": "还有呢？"},
            {"role": "assistant", "content": last},
        ]
        for i, text in enumerate(first)
    ]
    messages = pa.array([*talks, *[None] * 16], MESSAGES)
    responses = pa.array([last] * 16 + [f"{text}\n{last}" for text in first])
    table = rows(32, groups=32).set_column(3, "response", responses).append_column("messages", messages)
    held = []
    for files in (1, 3):
        _, sides = run(cleaned(tmp_path, table, files), test_ratio=0.5, group="near_duplicates")
        held.append({pos // 3 for pos in sides["test"]["pos"].to_pylist()})
    assert held[0] == held[1] and 0 < len(held[0]) < 32
    for number in range(16):  # its pair, and the same text as one answer
        assert (number in held[0]) == (number ^ 1 in held[0]) == (number + 16 in held[0])


@pytest.mark.usefixtures("ray_cluster")
def test_a_row_without_a_text_has_no_group(tmp_path: Path) -> None:
    table = rows(6, groups=6).set_column(3, "response", pa.array(["一", "二", "三", None, "五", "六"]))
    with pytest.raises(DataError, match=r"split.group near_duplicates: row r3 \(pos 9\) has no response; drop such"):
        run(cleaned(tmp_path, table, files=2), test_ratio=0.5, group="near_duplicates")


@pytest.mark.parametrize(
    "section",
    [{}, {"first": 3, "test_ratio": 0.1}, {"first": 3, "test_source": "a"}, {"test_ratio": 0.1, "test_source": "a"}],
)
def test_one_rule_says_what_is_held_out(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="give one of test_ratio, first and test_source"):
        Split.model_validate(section)


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    "nothing",
    [
        pa.array([None] * 300, pa.string()),
        pa.array([""] * 300),
        pa.array([None] * 300, pa.int64()),
        [float("nan")] * 300,
    ],
    ids=["null", "empty", "no number", "NaN"],
)
@pytest.mark.parametrize("rule", [{"test_ratio": 0.3}, {"first": 60}])
def test_rows_without_a_group_are_groups_of_their_own(tmp_path: Path, nothing: Any, rule: dict[str, Any]) -> None:
    report, sides = run(cleaned(tmp_path, rows(300, groups=300).append_column("g", [nothing]), 2), group="g", **rule)
    assert sides["train"].num_rows + sides["test"].num_rows == 300 and report.rows.test == sides["test"].num_rows
    assert 60 <= sides["test"].num_rows <= 120


def test_a_source_of_its_own_has_no_groups() -> None:
    with pytest.raises(ValidationError, match="test_source says which rows are held out; remove group"):
        Split.model_validate({"test_source": "a", "group": "query"})
