"""The judge's opinions, from a local server that has them by design."""

from pathlib import Path

import pytest

from pipelines.evaluate.judge import judge_answers, verdict
from pipelines.evaluate.section import Judge
from tests.pipelines.evaluate.fake_endpoint import ChatServer

ROWS = [
    {"row_id": f"r{i}", "query": f"问{i}？", "reference": "", "answers": {"base": f"坏{i}", "tiny": f"好{i}"}}
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
    assert verdict(text) == expected


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

    rows = [{**row, "answers": {"base": "坏", "tiny": "妙"}} for row in ROWS]
    chat_server.answer = lambda model, prompt: opinion(model, prompt.split("问题：")[1].replace("妙", "好"))
    section = Judge(endpoint=chat_server.url, model="judge")
    result = judge_answers(section, rows, "base", "tiny", tmp_path / "judgements.jsonl", seed=1)
    assert result["outcomes"] == {"r0": 1.0, "r1": 0.5, "r2": 0.0, "r3": None}
    assert (result["wins"], result["ties"], result["losses"], result["failed"]) == (1, 1, 1, 1)
    assert result["win_rate"]["value"] == 0.5
    assert result["win_rate"]["low"] <= 0.5 <= result["win_rate"]["high"]
    assert len(chat_server.requests) == 8
    judge_answers(section, rows, "base", "tiny", tmp_path / "judgements.jsonl", seed=1)
    assert len(chat_server.requests) == 8


def test_a_judge_that_refuses_fails_every_judgement(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.status, chat_server.error = 403, "no"
    section = Judge(endpoint=chat_server.url, model="judge")
    result = judge_answers(section, ROWS, "base", "tiny", tmp_path / "judgements.jsonl", seed=1)
    assert result["failed"] == 4
    assert result["win_rate"] is None


def test_the_judge_has_a_key_of_its_own(
    chat_server: ChatServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "models")
    monkeypatch.setenv("JUDGE_API_KEY", "judge")
    chat_server.answer = lambda model, prompt: "C"
    judge_answers(Judge(endpoint=chat_server.url, model="j"), ROWS[:1], "base", "tiny", tmp_path / "j.jsonl", seed=1)
    assert chat_server.keys == {"Bearer judge"}
