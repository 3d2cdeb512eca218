"""What became of rows: kept or dropped, with operator, reason and statistic, by id or by a part of their text."""

from typing import Any

import pytest

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import DataError
from pipelines.recipe.schema import Recipe
from pipelines.report import trace as trace_module
from pipelines.report.trace import rows_lines, trace
from rayjobs import pipeline
from rayjobs.cluster import Cluster
from tests.pipelines.sources.samples import write_lines

ROWS = [
    {"id": "good", "query": "天为什么蓝", "response": "因为散射使蓝光四散开来。", "编号": 4711, "作者": "李白"},
    {"id": "short", "query": "好吗", "response": "好", "编号": 47, "作者": "杜甫"},
    {"id": "images", "query": "看图", "response": "一只猫坐在窗台上。", "images": ["a.jpg"]},
    {
        "id": "talk",
        "messages": [
            *({"role": "user", "content": "先问一句春天"}, {"role": "assistant", "content": "先答一句：百花开放。"}),
            *({"role": "user", "content": "再问一句"}, {"role": "assistant", "content": "再答一句，蓝光也开放。"}),
        ],
    },
]
Finished = list[Any]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, ray_cluster: None) -> Finished:
    folder = tmp_path_factory.mktemp("trace")
    recipe = Recipe.model_validate(
        {
            "name": "t",
            "ingest": {"source": str(write_lines(folder / "a.jsonl", ROWS)), "max_broken": 1},
            "clean": {"process": [{"text_length_filter": {"min_len": 5}}]},
        }
    )
    return [*pipeline.run(recipe, Workspace(str(folder / "w")), Cluster()).values()]


def lines_of(finished: Finished, **asked: object) -> list[str]:
    given = {"dropped": False, "operator": None, "grep": None, "limit": 100}
    return [*rows_lines(finished, **{**given, **asked})]  # type: ignore[arg-type]


def test_kept_rows_are_those_of_the_last_stage(finished: Finished) -> None:
    assert lines_of(finished) == [
        "good: clean: kept (rows), position 0: 因为散射使蓝光四散开来。",
        "talk: clean: kept (rows), position 3: 再答一句，蓝光也开放。",
    ]
    good = "good: clean: kept (rows), position 0: 因为散射使蓝光四散开来。"
    assert lines_of(finished, limit=1) == [good, "… and more; --limit says how many are shown"]
    assert [line.split(":")[0] for line in lines_of(finished, grep="百花")] == ["talk"]
    assert lines_of(finished, grep="没有的字") == []


def test_dropped_rows_have_stage_operator_reason_and_statistic(finished: Finished) -> None:
    images, short = lines_of(finished, dropped=True)
    assert images.startswith("a.jsonl:3: ingest: dropped by auto: column images: only text is trained")
    assert short.startswith("short: clean: dropped by text_length_filter: ") and "text_len 1" in short
    assert lines_of(finished, operator="text_length_filter") == [short]
    assert lines_of(finished, operator="text_length_filter", grep="猫") == []
    assert lines_of(finished, dropped=True, grep="a.jpg") == [images]


def test_one_row_is_followed_through_the_stages(finished: Finished) -> None:
    assert [*trace(finished, "short")] == [
        "ingest: kept (rows), position 1: 好",
        lines_of(finished, operator="text_length_filter")[0].removeprefix("short: "),
    ]
    assert [*trace(finished, "a.jsonl:3")] == [lines_of(finished, operator="auto")[0].removeprefix("a.jsonl:3: ")]


def test_a_part_of_a_text_names_its_row_or_the_rows(finished: Finished) -> None:
    assert [*trace(finished, "使蓝光")] == ["row good", *trace(finished, "good")]
    assert [*trace(finished, "百花")] == ["row talk", *trace(finished, "talk")]
    assert [*trace(finished, "蓝光")] == ["2 rows have this text; name one of them:", "good", "talk"]
    assert [*trace(finished, "4711")] == [*trace(finished, "李白")] == ["row good", *trace(finished, "good")]
    assert [*trace(finished, "47")] == ["row short", *trace(finished, "short")]
    unknown = "row 没有的: no finished stage has a row of this id, or with this text; an id is such as good$"
    with pytest.raises(DataError, match=unknown):
        [*trace(finished, "没有的")]


def test_of_many_rows_with_a_text_the_first_are_named(finished: Finished, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_module, "NAMED", 1)
    assert [*trace(finished, "蓝光")] == ["2 rows have this text; name one of them:", "good", "… and 1 more"]


def test_nothing_has_been_read_yet() -> None:
    with pytest.raises(DataError, match="no stage has left rows yet"):
        lines_of([])
