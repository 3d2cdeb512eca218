"""The side-by-side table, asked of a local server."""

import json
from collections import Counter
from pathlib import Path

import pytest

from pipelines.errors import StageError
from pipelines.models.lineup import served_models
from tests.outputs import train_report
from tests.pipelines.evaluate.fake_endpoint import (
    ChatServer,
    compare,
    lineup,
    make_inputs,
    make_recipe,
    place_beside,
)

ROWS = [
    {"row_id": "r0", "query": "苹果|梨\n哪个甜？", "response": "谢邀。\n<b>梨</b>甜。以上。"},
    {"row_id": "r1", "query": "怎么睡得好？", "response": "谢邀。早睡。以上。"},
    {"row_id": "r2", "query": "第三问？", "response": "谢邀。以上。"},
]


def test_table_has_probes_first_then_test_questions(chat_server: ChatServer, tmp_path: Path) -> None:
    inputs = make_inputs(tmp_path, ROWS)
    report = compare(make_recipe(chat_server.url), inputs)
    place = place_beside(inputs, "compare")
    assert [row.query for row in report.rows] == ["你是谁？", "苹果|梨\n哪个甜？", "怎么睡得好？"]
    assert report.rows[0].reference == ""
    assert report.rows[2].answers["tiny"] == "tiny：怎么睡得好？"
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
        chat_server.url,
        compare={"generation": generation, "queries": 0},
        train={"system": "你是真人。"},
        chat_template_kwargs={"enable_thinking": False},
    )
    compare(recipe, make_inputs(tmp_path, ROWS))
    for request in chat_server.requests:
        assert {name: request[name] for name in generation} == generation
        assert request["messages"][0] == {"role": "system", "content": "你是真人。"}
        assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert sorted(request["model"] for request in chat_server.requests) == ["base", "tiny", "tiny-merged"]


def test_answers_that_are_there_are_not_asked_again(chat_server: ChatServer, tmp_path: Path) -> None:
    recipe, inputs = make_recipe(chat_server.url), make_inputs(tmp_path, ROWS)
    report = compare(recipe, inputs)
    answers = place_beside(inputs, "compare").local("answers.jsonl")
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:5]) + lines[5][:20])  # as a kill in the middle of a write leaves it
    chat_server.requests.clear()
    assert compare(recipe, inputs).rows == report.rows
    assert len(chat_server.requests) == 4
    chat_server.requests.clear()
    compare(recipe, inputs)
    assert not chat_server.requests


def test_what_a_model_thinks_is_kept_apart_from_its_answer(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.answer = lambda model, query: f"<think>\n想{query}\n</think>\n\n答" if model == "tiny" else "答"
    inputs = make_inputs(tmp_path, ROWS)
    report = compare(make_recipe(chat_server.url), inputs)
    assert {answer for row in report.rows for answer in row.answers.values()} == {"答"}
    assert [row.reasoning for row in report.rows] == [{"tiny": f"想{row.query}"} for row in report.rows]
    table = place_beside(inputs, "compare").local("compare.md").read_text(encoding="utf-8")
    assert "| query | model | what it thought before |" in table and "| tiny | 想你是谁？ |" in table


def test_an_answer_with_a_line_separator_is_kept_whole(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.answer = lambda model, query: "一\u2028二\x85三"
    recipe, inputs = make_recipe(chat_server.url, compare={"queries": 0}), make_inputs(tmp_path, ROWS)
    for _ in range(2):
        assert compare(recipe, inputs).rows[0].answers["tiny"] == "一\u2028二\x85三"
    assert len(chat_server.requests) == 3


def test_empty_answers_are_counted(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.answer = lambda model, query: "" if model == "base" else "好。"
    report = compare(make_recipe(chat_server.url), make_inputs(tmp_path, ROWS))
    assert report.empty == {"base": 3, "tiny": 0, "tiny-merged": 0}
    assert "base gave 3 empty answers" in report.summary


def test_an_error_of_the_endpoint_stops_with_its_message(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.status, chat_server.error = 400, "no such adapter"
    with pytest.raises(StageError, match="no such adapter"):
        compare(make_recipe(chat_server.url), make_inputs(tmp_path, ROWS))


def test_a_slow_endpoint_is_an_error(chat_server: ChatServer, tmp_path: Path) -> None:
    chat_server.delay = 1.0
    recipe = make_recipe(chat_server.url, compare={"timeout": 0.1, "queries": 0})
    with pytest.raises(StageError, match="timed out"):
        compare(recipe, make_inputs(tmp_path, ROWS))


def test_probe_groups_say_how_far_training_moved_the_model(chat_server: ChatServer, tmp_path: Path) -> None:
    answers = {"base": "我是一个模型。", "tiny": "谢邀。以上。", "tiny-merged": "我是一个模型。"}
    chat_server.answer = lambda model, query: "好的好的好的" if query == "Who?" and model == "tiny" else answers[model]
    probes = {"identity": ["你是谁？"], "unrelated": ["Who?", "今天几号？"]}
    report = compare(
        make_recipe(chat_server.url, compare={"probes": probes, "queries": 0}), make_inputs(tmp_path, ROWS)
    )
    assert [row.query for row in report.rows] == ["你是谁？", "Who?", "今天几号？"]
    assert report.groups["identity"]["tiny-merged"].base == pytest.approx(1, abs=1e-6)
    assert report.groups["unrelated"]["base"].loop == 0
    assert report.groups["unrelated"]["tiny"].model_dump() == {
        "length": 6.0,
        "loop": 0.5,
        "base": pytest.approx(0.125, abs=0.125),
    }


def test_sweep_finds_the_setting_that_does_not_loop(chat_server: ChatServer, tmp_path: Path) -> None:
    def answer(model: str, query: str) -> str:
        request = chat_server.requests[-1]
        if request.get("repetition_penalty") == 1.0:
            return "早睡早起早睡早起早睡早起"  # loops
        return "谢邀。早睡。以上。" if request["temperature"] == 0.5 else "谢邀。"

    chat_server.answer = answer
    sweep = {"temperature": [0, 0.5], "repetition_penalty": [1.0, 1.2], "rows": 2}
    recipe = make_recipe(chat_server.url, compare={"queries": 0, "sweep": sweep, "concurrency": 1}, merge=None)
    report = compare(recipe, make_inputs(tmp_path, ROWS[1:]))
    assert report.sweep
    rows = {(row.temperature, row.repetition_penalty): row for row in report.sweep.rows}
    assert {setting: row.loop for setting, row in rows.items()} == {
        (0, 1.0): 1,
        (0, 1.2): 0,
        (0.5, 1.0): 1,
        (0.5, 1.2): 0,
    }
    assert report.sweep.recommended == rows[0.5, 1.2]
    swept = [request for request in chat_server.requests if "repetition_penalty" in request]
    assert {request["model"] for request in swept} == {"tiny"}
    assert len(swept) == 8
    assert {request["seed"] for request in swept} == {42}


def test_checkpoints_are_asked_like_models_and_the_best_is_named(chat_server: ChatServer, tmp_path: Path) -> None:
    texts = {"tiny-step20": "不知道", "tiny-step40": "谢邀。早睡。以上。", "tiny-step60": "以上以上以上以上"}
    chat_server.models = ["base", "tiny", *texts]
    chat_server.answer = lambda model, query: texts.get(model, "好")
    recipe = make_recipe(chat_server.url, compare={"queries": 0, "checkpoints": {"rows": 2}}, merge=None)
    folders = [f"checkpoints/checkpoint-{step}" for step in (20, 40, 60)]
    inputs = make_inputs(tmp_path, ROWS[1:], train_report(checkpoints=folders))
    report = compare(recipe, inputs)
    assert report.checkpoints
    assert [row.step for row in report.checkpoints.rows] == [20, 40, 60]
    assert [row.loop for row in report.checkpoints.rows] == [0, 0, 1]
    assert report.checkpoints.recommended.step == 40
    (base, *_) = served_models(lineup(recipe), inputs.train, inputs.merge)
    assert base.adapters["tiny-step40"] == str(inputs.train.folder.local("checkpoints/checkpoint-40"))
