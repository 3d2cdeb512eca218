"""The judge's opinions, from a local server that has them by design."""

from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.reports.evaluate import ComparedRow
from pipelines.artifacts.workspace import Workspace
from pipelines.errors import RecipeError, StageError
from pipelines.evaluate.pairwise_judge import judge_answers, winning_letter
from pipelines.recipe.evaluate import PairwiseJudge
from pipelines.recipe.load import load_recipe
from tests.pipelines.evaluate.fake_endpoint import ChatServer, compare_stage, make_recipe

ROWS = [
    ComparedRow(row_id=f"r{i}", query=f"问{i}？", reference="", answers={"base": f"坏{i}", "tiny": f"好{i}"})
    for i in range(4)
]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A 更切题。\nB", "B"),
        ("理由。\n\n**A**", "A"),
        ("理由。\n答案：C", "C"),
        ("理由。\nb。", "B"),
        ("A 和 B 都不好。", None),
        ("", None),
    ],
)
def test_the_last_letter_that_stands_alone_counts(text: str, expected: str | None) -> None:
    assert winning_letter(text) == expected


def judge(url: str, **endpoint: Any) -> PairwiseJudge:
    return PairwiseJudge.model_validate({"model": "judge", "endpoints": [{"base_url": url, **endpoint}]})


@pytest.mark.usefixtures("ray_cluster")
def test_places_are_swapped_and_failures_counted(chat_server: ChatServer, tmp_path: Path) -> None:
    def opinion(model: str, prompt: str) -> str:
        good_is_first = prompt.index("好") < prompt.index("坏")
        if "问0" in prompt:
            return "好的那个更好。\n" + ("A" if good_is_first else "B")  # sure of the tuned model
        if "问1" in prompt:
            return "第一个更好。\nA"  # always the first: a tie
        if "问2" in prompt:
            return "坏的那个更好。\n" + ("B" if good_is_first else "A")  # sure of the base
        return "不好说。"  # names nobody

    rows = [row.model_copy(update={"answers": {"base": "坏", "tiny": "妙"}}) for row in ROWS]
    chat_server.answer = lambda model, prompt: opinion(model, prompt.split("问题：")[1].replace("妙", "好"))
    workspace, section = Workspace(str(tmp_path)), judge(chat_server.url)
    result = judge_answers(workspace, section, rows, "base", "tiny", seed=1)
    assert result.outcomes == {"r0": 1.0, "r1": 0.5, "r2": 0.0, "r3": None}
    assert (result.wins, result.ties, result.losses, result.failed) == (1, 1, 1, 1)
    assert result.win_rate
    assert result.win_rate.value == 0.5
    assert result.win_rate.low <= 0.5 <= result.win_rate.high
    assert len(chat_server.requests) == 8
    more = [*rows, rows[0].model_copy(update={"row_id": "r4"})]
    assert judge_answers(workspace, section, more, "base", "tiny", seed=1).wins == 2
    assert len(chat_server.requests) == 10  # the ledger knows the others


@pytest.mark.usefixtures("ray_cluster")
def test_a_judge_that_refuses_stops_with_its_words(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.status, chat_server.error = 403, "no such account"
    with pytest.raises(StageError, match=r"compare\.judge: .*no such account.*run again to go on"):
        judge_answers(Workspace(str(tmp_path)), judge(chat_server.url), ROWS, "base", "tiny", seed=1)


@pytest.mark.usefixtures("ray_cluster")
def test_the_judge_has_a_key_of_its_own(
    chat_server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = {"model": "judge", "endpoints": [{"base_url": chat_server.url, "api_key_env": "JUDGE_KEY"}]}
    recipe = make_recipe(chat_server.url, compare={"judge": section})
    (problem,) = compare_stage(recipe).preflight()
    assert problem.key == "compare.judge.endpoints[0].api_key_env"
    assert "JUDGE_KEY is not set" in problem.message
    monkeypatch.setenv("OPENAI_API_KEY", "models")
    monkeypatch.setenv("JUDGE_KEY", "judge")
    assert compare_stage(recipe).preflight() == []
    assert recipe.compare and recipe.compare.judge
    chat_server.answer = lambda model, prompt: "C"
    judge_answers(Workspace(str(tmp_path)), recipe.compare.judge, ROWS[:1], "base", "tiny", seed=1)
    assert chat_server.keys == {"Bearer judge"}


def test_where_the_judge_answers_does_not_decide_what_it_says() -> None:
    one = {
        "model": "judge",
        "endpoints": [{"base_url": "http://one/v1"}],
        "budget": 1,
        "price": {"input": 1, "output": 2},
    }
    other = {**one, "endpoints": [{"base_url": "http://other/v1"}]}
    first, second, third = (
        compare_stage(make_recipe("http://models/v1", compare={"judge": section})).fingerprint_inputs()
        for section in (one, other, {**one, "model": "another"})
    )
    assert first == second != third


def test_what_a_judge_was_configured_with_before_is_named(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "name: mine\ningest: {source: rows.jsonl}\nsplit: {first: 2}\ntrain: {model: base}\n"
        "compare: {judge: {model: m, endpoint: http://judge/v1}}\n"
    )
    with pytest.raises(RecipeError) as caught:
        load_recipe(str(path))
    assert {problem.key: problem.message for problem in caught.value.problems} == {
        "compare.judge.endpoint": "unknown key; did you mean 'endpoints'?",
        "compare.judge.endpoints": "missing; it must be given",
    }
