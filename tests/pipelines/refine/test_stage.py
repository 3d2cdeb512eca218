"""The stage refine: on the real wishes through ingest, and its parts."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import regex

from benchmarks.answering_server import Behaviour
from pipelines.artifacts.reports.rows import IngestReport
from pipelines.artifacts.reports.synthesize import RefineReport
from pipelines.artifacts.stage import Inputs, Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import DataError, Problem, StageError
from pipelines.ingest.stage import IngestStage
from pipelines.recipe.refine import Refine
from pipelines.recipe.schema import Recipe
from pipelines.recipe.synthesize import Style
from pipelines.refine.rules import RULES, Expected
from pipelines.refine.stage import Demands, RefineInputs, RefineStage, apply_rules, cell_of, check_refine, demands_of
from pipelines.similarity import on_ray
from pipelines.similarity.minhash import first_alike, pair_hashes
from tests.outputs import finished, rows_of
from tests.pipelines.synthesize import wishes
from tests.pipelines.synthesize.serving import in_thread


def recipe(source: Path, **section: Any) -> Recipe:
    styles = {
        name: style.model_dump(include={"min_length", "max_length", "emoji"}) for name, style in wishes.STYLES.items()
    }
    refining = {"dimensions": wishes.DIMENSIONS, "styles": styles, "aliases": wishes.ALIASES, **section}
    return Recipe.model_validate(
        {"name": "t", "ingest": {"source": str(source), "shard_bytes": 300_000}, "refine": refining}
    )


def stage(what: Recipe) -> RefineStage:
    assert what.refine
    return RefineStage(what.refine, demands_of(what.refine, what.synthesize))


def ingested(what: Recipe, workspace: Workspace) -> Output[IngestReport]:
    """The rows of the recipe's source."""
    assert what.ingest
    place = Place(workspace, "ingest", "i")
    return finished(place, IngestStage(what.ingest).run(place, Inputs()))


def refined(what: Recipe, source: Output[IngestReport], name: str = "r") -> Output[RefineReport]:
    """Run the stage on these rows, and mark it complete."""
    place = Place(source.folder.workspace, "refine", name)
    return finished(place, stage(what).run(place, RefineInputs(source)))


def kept_of(output: Output[RefineReport]) -> list[dict[str, Any]]:
    return rows_of(output, output.report.outputs.rows)


def dropped_of(output: Output[RefineReport]) -> list[dict[str, Any]]:
    return rows_of(output, output.report.outputs.dropped)


@pytest.mark.usefixtures("ray_cluster")
def test_the_real_wishes(tmp_path: Path, shared_data: Path) -> None:
    what = recipe(shared_data / "tianji-wishes-chinese-v0.1.json", fix=["quotes"])
    source = ingested(what, Workspace(str(tmp_path)))
    output = refined(what, source)
    report, kept, dropped = output.report, kept_of(output), dropped_of(output)
    assert len(kept) + len(dropped) == 2976
    assert len(kept) == report.rows > 2600
    reasons = {
        operator: [r for r in dropped if r["operator"] == operator] for operator in {r["operator"] for r in dropped}
    }
    assert len(reasons["particle"]) == 33
    assert len(reasons["opening"]) == 20
    assert "尊敬的医生先生/女士：" in [row["text"] for row in reasons["non_answer"]]
    assert sum(operator.changed for operator in report.operators if operator.operator == "quotes") == 59
    original = {row["row_id"]: row["response"] for row in rows_of(source, source.report.outputs.rows)}
    changed = [row for row in kept if row["response"] != original[row["row_id"]].strip()]
    assert all(original[row["row_id"]].strip()[1:-1] == row["response"] for row in changed)
    assert 50 <= len(changed) <= 59
    assert {example.after for example in report.examples["particle"]} == {None}
    repeats = reasons["near_duplicate"]
    by_id = {row["row_id"]: row["response"] for row in kept}
    for row in repeats:
        one, other = pairs_of(row["text"]), pairs_of(by_id[row["reason"].removeprefix("repeats ")])
        assert len(one & other) / len(one | other) >= 0.8
    numbers = [row["pos"] for row in kept]
    assert numbers == sorted(numbers)
    operators = {operator.operator: operator.rows_in - operator.rows_out for operator in report.operators}
    assert operators == {name: len(reasons.get(name, [])) for name in operators}

    coverage = report.coverage
    assert coverage and coverage.dimensions == ["name", "scene"]
    assert sum(map(sum, coverage.came)) == 2976
    assert sum(map(sum, coverage.kept)) == len(kept)
    reasons_of_cells = [reason for line in coverage.dropped for cell in line for reason in cell.items()]
    for operator, gone in reasons.items():
        assert sum(count for name, count in reasons_of_cells if name == operator) == len(gone)


@pytest.mark.usefixtures("ray_cluster")
def test_dropping_all_rows_is_an_error(tmp_path: Path) -> None:
    what = small(tmp_path, rules=["emoji"], styles={"x": {"emoji": "needed"}, "y": {"emoji": "needed"}})
    with pytest.raises(StageError, match=r"all \d+ rows are dropped \(emoji \d+\); see refine.rules"):
        refined(what, ingested(what, Workspace(str(tmp_path / "w"))))


def small(tmp_path: Path, **section: Any) -> Recipe:
    """A recipe that only judges, or takes edits."""
    lines = [{"query": "祝姐姐生日", "response": text} for text in ("生日快乐！", "愿你笑口常开！", "祝福语。")]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    styles = {"正常": {}}
    refining = {"dimensions": {"name": ["姐姐"]}, "styles": styles, "rules": ["empty"], "near_duplicates": None}
    return Recipe.model_validate({"name": "t", "ingest": {"source": str(path)}, "refine": {**refining, **section}})


@pytest.mark.usefixtures("ray_cluster")
def test_a_judge_scores_every_answer(tmp_path: Path) -> None:
    said = {
        "low": '{"reason": "像套话", "score": 4}',
        "high": '```json\n{"reason": "亲切", "score": 6,}\n```',
        "none": "我觉得很好",
    }
    source = ingested(small(tmp_path), Workspace(str(tmp_path / "w")))
    for name, text in said.items():
        body = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        with in_thread(Behaviour(delay=0.01, body=body)) as url:
            judge = {"model": name, "endpoints": [{"base_url": url}], "rubric": "自然、切题", "min_score": 6}
            if name == "low":
                with pytest.raises(
                    StageError, match=r"all 3 rows are dropped \(judge 3\).*, score 4: 像套话: 生日快乐"
                ):
                    refined(small(tmp_path, judge=judge), source, name)
            else:
                report = refined(small(tmp_path, judge=judge), source, name).report
                dropped = {operator.operator: operator.rows_in - operator.rows_out for operator in report.operators}
                assert (report.rows, dropped["judge"]) == (3, 0)
                assert report.unjudged == ({} if name == "high" else {"malformed": 3})
                continue
        lower = small(tmp_path, judge={**judge, "min_score": 4})  # the ledger has its answers: nobody listens
        assert refined(lower, source, "lower").report.rows == 3


@pytest.mark.usefixtures("ray_cluster")
def test_what_a_person_changed_is_taken_back(tmp_path: Path) -> None:
    source = ingested(small(tmp_path), Workspace(str(tmp_path / "w")))
    first, second, _ = kept_of(refined(small(tmp_path), source, "whole"))
    path = tmp_path / "edited.jsonl"
    edits = [{**first, "response": "姐姐，生日快乐！"}, second]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in edits), encoding="utf-8")
    what = small(tmp_path, edited=str(path))
    output = refined(what, source, "edited")
    assert [row["response"] for row in kept_of(output)] == ["姐姐，生日快乐！", "愿你笑口常开！"]
    assert [(row["operator"], row["text"]) for row in dropped_of(output)] == [("by_hand", "祝福语。")]
    assert output.report.operators[-1].model_dump() == {
        "operator": "by_hand",
        "rows_in": 3,
        "rows_out": 2,
        "changed": 1,
    }
    before = stage(what).fingerprint_inputs()
    path.write_text(path.read_text(encoding="utf-8") + '{"row_id": "9"}\n', encoding="utf-8")
    assert stage(what).fingerprint_inputs() != before
    with pytest.raises(DataError, match=r"edited.jsonl: no row 9 is left"):
        refined(what, source, "another row")
    path.write_text(json.dumps({"row_id": "9", "kept": False}) + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"edited.jsonl: no row 9 is left"):
        refined(what, source, "another row that is deleted")
    path.write_text(json.dumps({"row_id": first["row_id"], "kept": False}) + "\n", encoding="utf-8")
    output = refined(what, source, "changes")
    assert [row["response"] for row in kept_of(output)] == ["愿你笑口常开！", "祝福语。"]  # a list of changes
    assert [row["reason"] for row in dropped_of(output)] == [f"kept is false in {path}"]


@pytest.mark.usefixtures("ray_cluster")
def test_what_is_mended_in_a_conversation_is_mended_where_it_is_trained(tmp_path: Path) -> None:
    talk = [("user", "帮妈妈写"), ("assistant", "好的"), ("user", "生日祝福"), ("assistant", "“愿妈妈生日快乐！”")]
    lines = [{"id": "a", "messages": [{"role": role, "content": text} for role, text in talk]}]
    (tmp_path / "a.jsonl").write_text(json.dumps(lines[0], ensure_ascii=False), encoding="utf-8")
    source = str(tmp_path / "a.jsonl")
    styles: dict[str, Any] = {"s": {}}
    section = {"dimensions": {"who": ["生日"]}, "styles": styles, "rules": ["quotes"], "fix": ["quotes"]}
    (tmp_path / "edited.jsonl").write_text('{"row_id": "a", "query": "生日祝福，短些"}\n', encoding="utf-8")
    reports = []
    for edited in (None, str(tmp_path / "edited.jsonl")):
        given = {"name": "t", "ingest": {"source": source}, "refine": {**section, "edited": edited}}
        what = Recipe.model_validate(given)
        output = refined(what, ingested(what, Workspace(str(tmp_path / f"w{len(reports)}"))))
        reports.append(output.report)
        (row,) = kept_of(output)
        assert [turn["content"] for turn in row["messages"][-2:]] == [row["query"], row["response"]]
        assert row["response"] == "愿妈妈生日快乐！"
    assert row["query"] == "生日祝福，短些"
    assert "by_hand" not in reports[0].examples
    assert [operator.changed for operator in reports[1].operators] == [1, 0, 1]


def pairs_of(text: str) -> frozenset[str]:
    """The character pairs of a text without punctuation, spaces and emoji."""
    bare = regex.sub(r"[^\p{L}\p{N}]+", "", text)
    return frozenset(bare[at : at + 2] for at in range(max(1, len(bare) - 1)))


def near_duplicates(texts: list[str], threshold: float) -> dict[int, int]:
    first = first_alike(*pair_hashes(texts), threshold, on_ray.find_alike).tolist()
    return {number: earlier for number, earlier in enumerate(first) if earlier != number}


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


@pytest.mark.usefixtures("ray_cluster")
def test_tasks_find_the_near_duplicates_that_one_process_finds(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [row["output"] for row in wishes.real(shared_data)]
    alone = near_duplicates(texts, 0.6)
    monkeypatch.setattr(on_ray, "FEW_ANSWERS", 100)
    assert near_duplicates(texts, 0.6) == alone
    assert len(alone) > 20


def test_precision_and_recall_of_near_duplicates(shared_data: Path) -> None:
    rows = wishes.real(shared_data)
    sound = [rows[number]["output"] for number in wishes.SOUND]
    repeated = [_said_again(text, number) for number, text in enumerate(sound)]
    found = near_duplicates([*sound, *repeated], 0.8)
    right = [number for number in range(len(repeated)) if found.get(len(sound) + number) == number]
    assert len(repeated) >= 30
    assert len(right) / len(repeated) >= 0.95
    assert len(right) / len(found) >= 0.95


def _said_again(text: str, number: int) -> str:
    """The same wish, as a model says it a second time: other marks, an emoji, a particle, another word of address."""
    if number % 4 == 3:
        return text.replace("您", "你") if len(text) > 80 else text.rstrip("！。") + "哦！"
    return [text.rstrip("！。") + "～", text.replace("，", " "), text + "🎉"][number % 4]


def test_mending_comes_before_measuring() -> None:
    expected = Expected({}, Style(template="", max_length=4), {})
    assert apply_rules(" “生日快乐” ", expected, ["quotes", "length"], ["quotes"]) == ("生日快乐", None, ["quotes"])
    assert apply_rules("“生日快乐”", expected, ["quotes", "length"], []) == ("“生日快乐”", "quotes", [])
    assert apply_rules("生日快乐！", expected, list(RULES), []) == ("生日快乐！", "length", [])


def test_rules_that_do_not_exist_are_named() -> None:
    assert check_refine(Refine(rules=[*RULES])) == []
    problem = Problem("refine.rules", "no rule 'lenght'; did you mean 'length'?")
    assert check_refine(Refine(rules=["quotes", "lenght"])) == [problem]


def test_a_key_of_the_judge_that_is_not_set_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DANLU_TEST_KEY", raising=False)
    endpoint = {"base_url": "http://x/v1", "api_key_env": "DANLU_TEST_KEY"}
    judge = {"model": "m", "endpoints": [endpoint], "rubric": "自然"}
    key, said = "refine.judge.endpoints[0].api_key_env", "the environment variable DANLU_TEST_KEY is not set"
    assert stage(small(tmp_path, judge=judge)).preflight() == [Problem(key, said)]
    monkeypatch.setenv("DANLU_TEST_KEY", "sk-1")
    assert stage(small(tmp_path, judge=judge)).preflight() == []


def test_the_cell_of_a_row_from_elsewhere() -> None:
    demands = Demands(wishes.STYLES, wishes.DIMENSIONS)
    found = cell_of({"row_id": "1", "query": "祝邻居赵大妈新婚快乐,小红书风格"}, demands)
    assert found == {"style": "小红书", "name": "邻居赵大妈", "scene": "新婚快乐"}
    assert cell_of({"row_id": "1", "query": "祝姐姐生日"}, demands)["style"] == "正常"
    with pytest.raises(DataError, match=r"row 7: no value of refine.dimensions.scene is in its query '祝姐姐好'"):
        cell_of({"row_id": "7", "query": "祝姐姐好"}, demands)
