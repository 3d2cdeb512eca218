import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.sources.adapters import ADAPTERS, parse_votes, recognise


@pytest.mark.parametrize(
    ("text", "votes"),
    [
        ("赞同", 0),
        ("赞同 15", 15),
        ("赞同 1.2 万", 12000),
        ("赞同 1,234", 1234),
        ("赞同15", 15),
        ("赞同 0.8 亿", 80_000_000),
    ],
)
def test_votes(text: str, votes: int) -> None:
    assert parse_votes(text) == votes


@pytest.mark.parametrize("text", ["", "15", "赞同 many", "反对 3", "赞同 1.2.3 万"])
def test_votes_are_not_guessed(text: str) -> None:
    with pytest.raises(ValueError, match="upvotes"):
        parse_votes(text)


def test_real_votes_agree_with_the_count_they_were_made_from(shared_data: Path) -> None:
    rows = pq.read_table(shared_data / "zhihu_kol_sample.parquet").to_pylist()
    counts = pq.read_table(shared_data / "zhihu_answers_html.parquet").to_pylist()
    for row, count in zip(rows, counts, strict=True):
        votes = ADAPTERS["zhihu_kol"].read(row, Counter())["upvotes"]
        exact = count["voteup_count"]
        assert votes == exact if exact < 10_000 else abs(votes - exact) <= 500


@pytest.mark.parametrize("votes", [None, "", float("nan")])
def test_rows_without_votes_count_as_none(votes: Any) -> None:
    row = {"INSTRUCTION": "问", "RESPONSE": "答", "METADATA": json.dumps({"upvotes": votes})}
    assert ADAPTERS["zhihu_kol"].read(row, Counter())["upvotes"] == 0


def test_what_else_metadata_say_is_counted() -> None:
    row = {"INSTRUCTION": "问", "RESPONSE": "答", "METADATA": json.dumps({"upvotes": "赞同", "url": "x", "id": 3})}
    counts = Counter[str]()
    for _ in range(2):
        ADAPTERS["zhihu_kol"].read(row, counts)
    assert counts == {f"rows with {key} in METADATA, which is not read": 2 for key in ("url", "id")}


CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("query_response", {"query": "问", "response": "答"}, {"query": "问", "response": "答", "system": None}),
    ("alpaca", {"instruction": "译", "input": "猫", "output": "cat"}, {"query": "译\n猫", "response": "cat"}),
    ("alpaca", {"instruction": "译", "input": "", "output": "cat"}, {"query": "译", "response": "cat"}),
    ("advertisegen", {"content": "类型#裙", "summary": "好看"}, {"query": "类型#裙", "response": "好看"}),
    ("counseling", {"Context": "sad", "Response": "talk"}, {"query": "sad", "response": "talk"}),
    (
        "conversation",
        {"conversation": [{"system": "大师", "input": "祝", "output": "好"}]},
        {"system": "大师", "query": "祝", "response": "好"},
    ),
    (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "S"},
                {"from": "human", "value": "问"},
                {"from": "gpt", "value": "答"},
            ]
        },
        {"system": "S", "query": "问", "response": "答"},
    ),
    (
        "messages",
        {"messages": [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "甲乙丙丁", strict=True)]},
        {
            "query": "丙",
            "response": "丁",
            "messages": [{"role": r, "content": c} for r, c in zip(["user", "assistant"] * 2, "甲乙丙丁", strict=True)],
        },
    ),
]


@pytest.mark.parametrize(("name", "row", "expected"), CASES)
def test_adapter(name: str, row: dict[str, Any], expected: dict[str, Any]) -> None:
    canonical = ADAPTERS[name].read(row, Counter())
    assert {key: canonical.get(key) for key in expected} == expected
    assert recognise(row) == name


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("query_response", {"query": "问"}, "column response is missing"),
        ("query_response", {"query": 3, "response": "答"}, "holds int"),
        ("conversation", {"conversation": []}, "not a list of turns"),
        ("messages", {"messages": [{"role": "user", "content": "a"}]}, "alternate"),
        ("messages", {"messages": [{"role": "narrator", "content": "a"}]}, "unknown role"),
        ("sharegpt", {"conversations": [{"from": "human"}, {"from": "gpt", "value": "x"}]}, "no text"),
        ("zhihu_kol", {"INSTRUCTION": "a", "RESPONSE": "b", "METADATA": "{"}, "not JSON"),
        ("zhihu_kol", {"INSTRUCTION": "a", "RESPONSE": "b", "METADATA": "{}"}, "no upvotes"),
    ],
)
def test_unreadable_row_says_why(name: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ADAPTERS[name].read(row, Counter())


def test_real_files_are_recognised(shared_data: Path) -> None:
    wishes = json.loads((shared_data / "tianji-wishes-chinese-v0.1.json").read_text(encoding="utf-8"))
    assert recognise(wishes[0]) == "conversation"
    for name, adapter in (
        ("advertisegen_dev.json", "advertisegen"),
        ("counseling_combined_dataset.json", "counseling"),
    ):
        first = json.loads((shared_data / name).read_text(encoding="utf-8").splitlines()[0])
        assert recognise(first) == adapter
