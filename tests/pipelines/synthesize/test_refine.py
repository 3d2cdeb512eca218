"""The stage refine: on the real wishes through ingest, and its parts."""

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.errors import DataError
from pipelines.ingest.stage import ingest
from pipelines.recipe import Recipe
from pipelines.synthesize.refine import cell_of, judge_text, refine
from pipelines.synthesize.rules import RULES, Asked
from pipelines.synthesize.section import Style
from pipelines.synthesize.similar import near_duplicates, pairs_of
from pipelines.workspace import Place, Workspace
from tests.pipelines.synthesize import wishes


def recipe(source: Path, **section: Any) -> Recipe:
    styles = {
        name: style.model_dump(include={"min_length", "max_length", "emoji"}) for name, style in wishes.STYLES.items()
    }
    refining = {"dimensions": wishes.DIMENSIONS, "styles": styles, "aliases": wishes.ALIASES, **section}
    return Recipe.model_validate(
        {"name": "t", "ingest": {"source": str(source), "shard_bytes": 300_000}, "refine": refining}
    )


def rows(place: Place, kind: str) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = pa.concat_tables([pq.read_table(path) for path in place.outputs(kind)]).to_pylist()
    return made


@pytest.mark.usefixtures("ray_cluster")
def test_the_real_wishes(tmp_path: Path, shared_data: Path) -> None:
    what = recipe(shared_data / "tianji-wishes-chinese-v0.1.json", fix=["quotes"])
    workspace = Workspace(str(tmp_path))
    source = Place(workspace, "ingest", "i")
    source.finish({"report": ingest(what, source)})
    place = Place(workspace, "refine", "r", {"ingest": source})
    report = refine(what, place)
    place.finish({"report": report})
    kept, dropped = rows(place, "rows"), rows(place, "dropped")
    assert len(kept) + len(dropped) == 2976
    assert len(kept) == report["rows"] > 2600
    reasons = {
        operator: [r for r in dropped if r["operator"] == operator] for operator in {r["operator"] for r in dropped}
    }
    assert len(reasons["particle"]) == 33
    assert len(reasons["opening"]) == 20
    assert "尊敬的医生先生/女士：" in [row["text"] for row in reasons["non_answer"]]
    assert {"mended": sum(o["changed"] for o in report["operators"] if o["operator"] == "quotes")} == {"mended": 59}
    original = {row["row_id"]: row["response"] for row in rows(source, "rows")}
    changed = [row for row in kept if row["response"] != original[row["row_id"]].strip()]
    assert all(original[row["row_id"]].strip()[1:-1] == row["response"] for row in changed)
    assert 50 <= len(changed) <= 59
    assert {example["after"] for example in report["examples"]["particle"]} == {None}
    repeats = reasons["near_duplicate"]
    by_id = {row["row_id"]: row["response"] for row in kept}
    for row in repeats:
        one, other = pairs_of(row["text"]), pairs_of(by_id[row["reason"].removeprefix("repeats ")])
        assert len(one & other) / len(one | other) >= 0.8
    numbers = [row["pos"] for row in kept]
    assert numbers == sorted(numbers)
    operators = {operator["operator"]: operator["rows_in"] - operator["rows_out"] for operator in report["operators"]}
    assert operators == {name: len(reasons.get(name, [])) for name in operators}


def test_near_duplicates_are_those_that_exact_comparison_finds(shared_data: Path) -> None:
    texts = [row["output"] for row in wishes.real(shared_data)[:600]]
    draw = random.Random(1)
    planted = [text[:-2] + "哦！" for text in draw.sample(texts, 60) if len(text) > 30] + texts[:10]
    texts += planted
    found = near_duplicates(texts, 0.7)
    pairs = [pairs_of(text) for text in texts]
    kept: list[int] = []
    expected = {}
    for number, one in enumerate(pairs):
        repeated = next((k for k in kept if len(one & pairs[k]) / len(one | pairs[k]) >= 0.7), None)
        if repeated is None:
            kept.append(number)
        else:
            expected[number] = repeated
    assert len(expected) > 50
    assert found == expected


def test_mending_comes_before_measuring() -> None:
    asked = Asked({}, Style(template="", max_length=4), {})
    assert judge_text(" “生日快乐” ", asked, ["quotes", "length"], ["quotes"]) == ("生日快乐", None, ["quotes"])
    assert judge_text("“生日快乐”", asked, ["quotes", "length"], []) == ("“生日快乐”", "quotes", [])
    assert judge_text("生日快乐！", asked, list(RULES), []) == ("生日快乐！", "length", [])


def test_the_cell_of_a_row_from_elsewhere() -> None:
    found = cell_of({"row_id": "1", "query": "祝邻居赵大妈新婚快乐,小红书风格"}, wishes.DIMENSIONS, wishes.STYLES)
    assert found == {"style": "小红书", "name": "邻居赵大妈", "scene": "新婚快乐"}
    assert cell_of({"row_id": "1", "query": "祝姐姐生日"}, wishes.DIMENSIONS, wishes.STYLES)["style"] == "正常"
    with pytest.raises(DataError, match=r"row 7: no value of refine.dimensions.scene is in its query '祝姐姐好'"):
        cell_of({"row_id": "7", "query": "祝姐姐好"}, wishes.DIMENSIONS, wishes.STYLES)
