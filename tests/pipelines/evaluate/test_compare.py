"""The side-by-side table, asked of a local server."""

import json
from collections import Counter
from pathlib import Path

import pytest

from pipelines.errors import StageError
from pipelines.evaluate.compare import compare
from tests.pipelines.evaluate.fake_endpoint import ChatServer, make_place, make_recipe

ROWS = [
    {"row_id": "r0", "query": "苹果|梨\n哪个甜？", "response": "谢邀。\n<b>梨</b>甜。以上。"},
    {"row_id": "r1", "query": "怎么睡得好？", "response": "谢邀。早睡。以上。"},
    {"row_id": "r2", "query": "第三问？", "response": "谢邀。以上。"},
]


def test_table_has_probes_first_then_test_questions(chat_server: ChatServer, tmp_path: Path) -> None:
    place = make_place(tmp_path, "compare", ROWS)
    report = compare(make_recipe(chat_server.url), place)
    assert [row["query"] for row in report["rows"]] == ["你是谁？", "苹果|梨\n哪个甜？", "怎么睡得好？"]
    assert report["rows"][0]["reference"] == ""
    assert report["rows"][2]["answers"]["tiny"] == "tiny：怎么睡得好？"
    table = place.local("compare.md").read_text(encoding="utf-8").splitlines()
    assert table[:3] == [
        "| query | reference | base | tiny | tiny-merged |",
        "| --- | --- | --- | --- | --- |",
        "| 你是谁？ |  | base：你是谁？ | tiny：你是谁？ | tiny-merged：你是谁？ |",
    ]
    assert table[3].startswith(
        "| 苹果\\|梨<br>哪个甜？ | 谢邀。<br>&lt;b&gt;梨&lt;/b&gt;甜。以上。 | base：苹果\\|梨<br>哪个甜？ |"
    )
    assert len(table) == 5
    lines = [json.loads(line) for line in place.local("answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert Counter(line["model"] for line in lines) == {"base": 3, "tiny": 3, "tiny-merged": 3}


def test_every_model_is_asked_at_the_same_settings(chat_server: ChatServer, tmp_path: Path) -> None:
    generation = {"temperature": 0.7, "top_k": 20, "top_p": 0.9, "repetition_penalty": 1.1, "max_tokens": 8, "seed": 3}
    recipe = make_recipe(
        chat_server.url, compare={"generation": generation, "queries": 0}, train={"system": "你是真人。"}
    )
    compare(recipe, make_place(tmp_path, "compare", ROWS))
    for request in chat_server.requests:
        assert {name: request[name] for name in generation} == generation
        assert request["messages"][0] == {"role": "system", "content": "你是真人。"}
    assert sorted(request["model"] for request in chat_server.requests) == ["base", "tiny", "tiny-merged"]


def test_answers_that_are_there_are_not_asked_again(chat_server: ChatServer, tmp_path: Path) -> None:
    recipe, place = make_recipe(chat_server.url), make_place(tmp_path, "compare", ROWS)
    report = compare(recipe, place)
    answers = place.local("answers.jsonl")
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # as a kill in the middle of a write leaves it
    chat_server.requests.clear()
    assert compare(recipe, place)["rows"] == report["rows"]
    assert len(chat_server.requests) == 4
    chat_server.requests.clear()
    compare(recipe, place)
    assert not chat_server.requests


def test_empty_answers_are_counted(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.answer = lambda model, query: "" if model == "base" else "好。"
    report = compare(make_recipe(chat_server.url), make_place(tmp_path, "compare", ROWS))
    assert report["empty"] == {"base": 3, "tiny": 0, "tiny-merged": 0}
    assert "base gave 3 empty answers" in report["summary"]


def test_an_error_of_the_endpoint_stops_with_its_message(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.status, chat_server.error = 400, "no such adapter"
    with pytest.raises(StageError, match="no such adapter"):
        compare(make_recipe(chat_server.url), make_place(tmp_path, "compare", ROWS))


def test_a_slow_endpoint_is_an_error(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.delay = 1.0
    recipe = make_recipe(chat_server.url, compare={"timeout": 0.1, "queries": 0})
    with pytest.raises(StageError, match="timed out"):
        compare(recipe, make_place(tmp_path, "compare", ROWS))
