"""The compatibility map: proposed by a model, taken back into the recipe, and drawn."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.answering_server import Behaviour
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import InputError
from pipelines.llm.requests import MalformedError
from pipelines.recipe.load import load_recipe
from pipelines.recipe.synthesize import Compatibility
from pipelines.report.charts import heat_map as drawn
from pipelines.synthesize.grid import Grid, compatibility_map
from pipelines.synthesize.suggest import misfits, requests_about, suggest_map, values_of
from pipelines.synthesize.suggest_values import read_values, suggest_values
from tests.pipelines.synthesize.serving import in_thread, recipe

AXES = {"name": ["爷爷", "奶奶", "同学"], "scene": ["生日", "新婚快乐", "重阳节"]}


def grid(url: str = "http://x/v1", **more: Any) -> Grid:
    what = recipe(url, dimensions=AXES, **more).synthesize
    assert what
    return Grid(what, 42)


def test_each_value_is_asked_about_against_the_dimensions_behind_it() -> None:
    values = values_of(grid())
    source = requests_about(grid(), values)
    requests = list(map(source.request, source.positions()))
    assert [values[request.pos].value for request in requests] == [*AXES["name"], *AXES["scene"]]
    first, last = requests[0].messages[0]["content"], requests[-1].messages[0]["content"]
    assert "“祝爷爷”" in first and "- scene：生日、新婚快乐、重阳节\n- style：正常、严肃" in first
    assert "取值“重阳节”" in last and "- style：正常、严肃" in last and "- scene" not in last
    assert len({request.key for request in requests}) == 6
    found = misfits(values[0], '```json\n{"scene": ["新婚快乐", "婚礼"], "style": []}\n```')
    assert found == {"scene": ("新婚快乐",), "style": ()}
    with pytest.raises(MalformedError):
        source.check_answer(requests[0], '{"scene": "新婚快乐"}')


@pytest.mark.usefixtures("ray_cluster")
def test_the_proposal_goes_into_the_recipe(tmp_path: Path) -> None:
    answer = {"choices": [{"message": {"content": '{"scene": ["新婚快乐"], "style": ["严肃"]}'}}]}
    workspace = Workspace(str(tmp_path))
    with in_thread(Behaviour(delay=0.01, body=json.dumps(answer).encode())) as url:
        text, unanswered = suggest_map(workspace, grid(url))
    assert unanswered == []
    assert text == (
        "compatibility:\n"
        "- where:\n"
        "    name: [爷爷, 奶奶, 同学]\n"
        "    scene: 新婚快乐\n"
        "- where:\n"
        "    name: [爷爷, 奶奶, 同学]\n"
        "    style: 严肃\n"
        "- where:\n"
        "    scene: [生日, 新婚快乐, 重阳节]\n"
        "    style: 严肃\n"
    )
    again, _ = suggest_map(workspace, grid("http://127.0.0.1:9/v1"))  # the answers are in the ledger
    assert again == text
    mapped = grid(**yaml.safe_load(text))
    assert {tuple(mapped.cell(pos).values()) for pos in mapped.positions()} == {
        (name, scene, "正常") for name in AXES["name"] for scene in ("生日", "重阳节")
    }


def test_the_map_counts_what_is_asked() -> None:
    rules = [{"where": {"name": "爷爷", "scene": "新婚*"}}, {"where": {"scene": "重阳节", "style": "严肃"}}]
    counted = compatibility_map(grid(compatibility=rules, samples_per_cell=3))
    assert counted
    assert counted.model_dump() == {
        "dimensions": ["name", "scene"],
        "rows": AXES["name"],
        "columns": AXES["scene"],
        "shares": [[1, 0, 0.5], [1, 1, 0.5], [1, 1, 0.5]],
    }
    chart = drawn("map", counted.rows, counted.columns, counted.shares)
    assert chart.count("<rect") == 8 and "爷爷, 新婚快乐: 0 %" in chart and "奶奶, 重阳节: 50 %" in chart


def test_the_shipped_grid_is_drawn_by_people_and_occasions() -> None:
    what = load_recipe("wishes").synthesize
    assert what
    counted = compatibility_map(Grid(what, 42))
    assert counted and counted.dimensions == ["name", "scene"]
    shares = dict(zip(counted.rows, counted.shares, strict=True))
    scenes = counted.columns
    assert shares["爷爷"][scenes.index("新婚快乐")] == 0
    assert shares["同事"][scenes.index("新婚快乐")] == 1
    assert shares["妹妹"][scenes.index("生日")] == pytest.approx(2 / 3)


@pytest.mark.usefixtures("ray_cluster")
def test_more_values_are_new_and_fit_the_map(tmp_path: Path) -> None:
    proposed = ["爷 爷！", "爺爺", "姑姑", "姑姑。", "顾客王五", " 舅舅 ", "长" * 61, "", "1. 房东", "同\x1b学甲", None]
    answer = {"choices": [{"message": {"content": json.dumps(proposed, ensure_ascii=False)}}]}
    workspace, rule = Workspace(str(tmp_path)), Compatibility(where={"name": "顾客*"})
    before = {request.key for request in map(grid().request, grid().positions())}
    with in_thread(Behaviour(delay=0.01, body=json.dumps(answer).encode())) as url:
        mapped = grid(url)
        section = mapped.section.model_copy(update={"compatibility": [rule]})
        text, found = suggest_values(workspace, Grid(section, 42), "name", 5)
    assert (found, yaml.safe_load(text)) == (3, {"dimensions": {"name": [*AXES["name"], "姑姑", "舅舅", "房东"]}})
    dimensions = {**grid().section.dimensions, **yaml.safe_load(text)["dimensions"]}
    grown = Grid(grid().section.model_copy(update={"dimensions": dimensions}), 42)
    assert before < {request.key for request in map(grown.request, grown.positions())}  # nothing is asked again


@pytest.mark.usefixtures("ray_cluster")
def test_more_phrasings_name_dimensions_only(tmp_path: Path) -> None:
    known = grid().section.queries
    proposed = ["想祝{name}{scene}", "祝{someone}", "祝{", "祝妈妈生日快乐", known[0]]
    answer = {"choices": [{"message": {"content": json.dumps(proposed, ensure_ascii=False)}}]}
    with in_thread(Behaviour(delay=0.01, body=json.dumps(answer).encode())) as url:
        text, found = suggest_values(Workspace(str(tmp_path)), grid(url), "queries", 5)
    assert (found, yaml.safe_load(text)) == (1, {"queries": [*known, "想祝{name}{scene}"]})


@pytest.mark.parametrize(
    "text",
    [
        '["姑姑", "舅舅"]',
        '```json\n{"name": ["姑姑", "舅舅"]}\n```',
        "好的，还有这些：\n1. 姑姑\n2、**舅舅**",
        "- “姑姑”\n- 舅舅\n\n希望有帮助。",
        '["1. 姑姑", "**舅舅**", null, {"x": 1}, true]',
    ],
)
def test_lists_are_read_however_models_write_them(text: str) -> None:
    assert read_values(text) == ["姑姑", "舅舅"]


def test_what_lists_nothing_is_malformed() -> None:
    assert read_values('["1.5米", 30]') == ["1.5米", "30"]
    for text in ("姑姑和舅舅", "[]", '[["姑姑"]]', '{"name": "姑姑"}'):
        with pytest.raises(MalformedError):
            read_values(text)


def test_phrasings_are_for_recipes_that_have_some(tmp_path: Path) -> None:
    pairs = {"answer": {"shape": "pairs"}, "queries": []}
    with pytest.raises(InputError, match="has no queries, its answers are pairs"):
        suggest_values(Workspace(str(tmp_path)), grid(**pairs), "queries", 5)


@pytest.mark.parametrize("name", ["nam", "style", "injections", "passage"])
def test_what_would_change_other_prompts_is_not_suggested(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=rf"--suggest-values: {name} is no dimension, nor queries"):
        suggest_values(Workspace(str(tmp_path)), grid(), name, 5)
