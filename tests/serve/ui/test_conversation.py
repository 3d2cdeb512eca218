"""What the chat page asks: histories, personas, lists of prompts, and answers that can be stopped."""

import asyncio
import csv
import io
import json
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx2 as httpx
import openai
import pytest

from pipelines.errors import DataError
from serve.asgi import send_json
from serve.ui import conversation
from serve.ui.chat_words import words
from serve.ui.conversation import (
    BackgroundTask,
    ChatReply,
    ChatTurn,
    Persona,
    SamplingSettings,
    TableRow,
    Utterance,
    answer_table,
    answer_turn,
    as_csv,
    as_jsonl,
    background_loop,
    discuss,
    explanation,
    fitted,
    history,
    persona_history,
    prompts_in,
    table_of,
    told_apart,
    without_reasoning,
)
from tests.serve.fake_engine import Serving, begin_stream, body_of, end_stream, send_piece, send_usage


class Engine:
    """Answers with the last message's content in pieces of one letter; `slow` waits between them, `no` is
    refused, and so is the model `refusing`."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.cut = 0
        self.most = self.now = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        request = json.loads(await body_of(receive))
        self.bodies.append(request)
        said = request["messages"][-1]["content"]
        if said == "no" or request["model"] == "refusing":
            error = {"error": {"message": "too long", "type": "invalid_request_error", "param": None, "code": 400}}
            await send_json(send, 400, error)
            return
        self.now += 1
        self.most = max(self.most, self.now)
        gone = asyncio.ensure_future(receive())
        await begin_stream(send)
        for letter in said:
            await asyncio.wait([gone], timeout=0.2 if said.startswith("slow") else 0.01)
            if gone.done():
                self.cut += 1
                break
            await send_piece(send, "m", letter)
        else:
            await send_usage(send, "m", 7, len(said))
            await end_stream(send)
        gone.cancel()
        self.now -= 1


@pytest.fixture
def engine() -> Engine:
    return Engine()


@pytest.fixture
def client(serving: Serving, engine: Engine) -> Iterator[openai.AsyncOpenAI]:
    with serving(engine) as url:
        yield openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


LOOP = background_loop()
ENGLISH = words("en")


def finish(job: BackgroundTask) -> None:
    until = time.monotonic() + 20
    while job.running():
        assert time.monotonic() < until
        time.sleep(0.01)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_each_column_sees_its_own_answers_and_no_refused_turns() -> None:
    turns = [
        ChatTurn("a", [ChatReply("x", "ax"), ChatReply("y", "ay")]),
        ChatTurn("b", [ChatReply("x", "", error="too long"), ChatReply("y", "by")]),
        ChatTurn("c", [ChatReply("x", "cx")]),  # asked while there was one column
        ChatTurn("d", []),
    ]
    assert history(turns, 0, " ") == [user("a"), assistant("ax"), user("c"), assistant("cx"), user("d")]
    second = [user("a"), assistant("ay"), user("b"), assistant("by"), user("c"), assistant("cx"), user("d")]
    assert history(turns, 1, "s") == [{"role": "system", "content": "s"}, *second]


@pytest.mark.parametrize(
    ("pieces", "thought", "said"),
    [
        (["<think>", "a", "</think>", "b"], "a", "b"),
        (["<think>a</think>b</think>c"], "a", "b</think>c"),
        (["<think>", "</think>", "\n", "\n b"], "", "b"),
        (["<think>a < b </th", "ough> c"], "a < b </though> c", ""),
        (["<think>a</thin"], "a</thin", ""),
        (["<thi"], "", "<thi"),
        (["<thing>a"], "", "<thing>a"),
        (["b <think>a</think>"], "", "b <think>a</think>"),
        ([" ", "\n", "b"], "", " \nb"),
        ([], "", ""),
    ],
)
def test_thoughts_between_tags_are_told_from_the_answer_piece_by_piece(
    pieces: list[str], thought: str, said: str
) -> None:
    for deltas in (pieces, list("".join(pieces))):
        found = list(told_apart(SimpleNamespace(content=piece) for piece in deltas))
        assert "".join(piece for is_thought, piece in found if is_thought) == thought
        assert "".join(piece for is_thought, piece in found if not is_thought) == said


def test_a_persona_hears_the_others_by_name_and_itself_as_the_assistant() -> None:
    lines = [
        Utterance("You", ChatReply("", "topic")),
        Utterance("A", ChatReply("m", "a1")),
        Utterance("B", ChatReply("m", "b1")),
        Utterance("C", ChatReply("m", "")),
        Utterance("A", ChatReply("m", "a2")),
    ]
    assert persona_history(Persona("A", "m", "be A"), lines[:4]) == [
        {"role": "system", "content": "be A"},
        user("You: topic"),
        assistant("a1"),
        user("B: b1"),
    ]
    assert persona_history(Persona("C", "m"), lines[:3]) == [user("You: topic\nA: a1\nB: b1")]


def test_two_models_answer_the_same_turn_with_counts_and_times(client: openai.AsyncOpenAI, engine: Engine) -> None:
    turns = [ChatTurn("old", [ChatReply("x", "ox"), ChatReply("y", "oy")]), ChatTurn("你好吗", [])]
    turns[1].answers = [ChatReply("x"), ChatReply("y")]
    sampling = SamplingSettings(max_tokens=9, temperature=0.2, top_p=0.5, repetition_penalty=1.3)
    finish(BackgroundTask(LOOP, answer_turn(client, turns, turns[1].answers, "s", sampling, ENGLISH)))
    for answer in turns[1].answers:
        assert (answer.text, answer.prompt_tokens, answer.completion_tokens) == ("你好吗", 7, 3)
        assert 0 < answer.to_first < answer.seconds
    by_model = {body["model"]: body for body in engine.bodies}
    assert by_model["y"]["messages"][2] == assistant("oy")
    wanted = {"max_tokens": 9, "temperature": 0.2, "top_p": 0.5, "repetition_penalty": 1.3}
    assert {key: by_model["x"][key] for key in wanted} == wanted


def test_a_refusal_is_shown_in_the_endpoint_s_words(client: openai.AsyncOpenAI) -> None:
    turn = ChatTurn("no", [ChatReply("x")])
    finish(BackgroundTask(LOOP, answer_turn(client, [turn], turn.answers, "", SamplingSettings(), ENGLISH)))
    assert (turn.answers[0].error, turn.answers[0].text, turn.answers[0].ended) == ("too long", "", True)


def test_stopping_keeps_what_has_arrived_and_ends_the_request(client: openai.AsyncOpenAI, engine: Engine) -> None:
    turn = ChatTurn("slow" * 10, [ChatReply("x")])
    job = BackgroundTask(LOOP, answer_turn(client, [turn], turn.answers, "", SamplingSettings(), ENGLISH))
    while not turn.answers[0].text:
        time.sleep(0.01)
    job.stop()
    until = time.monotonic() + 60
    while engine.cut == 0:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert turn.answers[0].text == "slow"[: len(turn.answers[0].text)]
    assert not job.running()


def test_work_that_nobody_looks_at_ends(
    client: openai.AsyncOpenAI, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversation, "UNWATCHED_SECONDS", 0.5)
    turn = ChatTurn("slow" * 20, [ChatReply("x")])
    _job = BackgroundTask(LOOP, answer_turn(client, [turn], turn.answers, "", SamplingSettings(), ENGLISH))
    until = time.monotonic() + 60
    while engine.cut == 0:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_bug_in_the_work_is_not_swallowed() -> None:
    async def broken() -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        finish(BackgroundTask(LOOP, broken()))


def test_a_table_is_filled_a_few_prompts_at_a_time(client: openai.AsyncOpenAI, engine: Engine) -> None:
    rows = [TableRow(f"prompt {n}", [ChatReply("x"), ChatReply("y")]) for n in range(12)]
    finish(BackgroundTask(LOOP, answer_table(client, rows, "", SamplingSettings(), ENGLISH)))
    assert [[a.text for a in row.answers] for row in rows] == [[f"prompt {n}"] * 2 for n in range(12)]
    assert 1 < engine.most <= conversation.AT_ONCE


def test_downloads_hold_the_table() -> None:
    rows = [
        TableRow("=1+1", [ChatReply("x", "你好,\n世界", completion_tokens=4, seconds=1.234)]),
        TableRow("b", [ChatReply("x")]),
    ]
    rows[1].answers[0].error = "refused"
    table = table_of(rows)
    assert table[0] == {"prompt": "=1+1", "x": "你好,\n世界", "x tokens": 4, "x s": 1.23}
    assert table[1]["x"] == "refused"
    content = as_csv(table)
    assert content.startswith(b"\xef\xbb\xbf")
    read = list(csv.reader(io.StringIO(content.decode("utf-8-sig"))))
    assert read[:2] == [["prompt", "x", "x tokens", "x s"], ["'=1+1", "你好,\n世界", "4", "1.23"]]
    assert [json.loads(line) for line in as_jsonl(table).splitlines()] == table


def test_personas_answer_in_turn_and_hear_each_other(client: openai.AsyncOpenAI, engine: Engine) -> None:
    lines = [Utterance("You", ChatReply("", "hi"))]
    finish(
        BackgroundTask(
            LOOP, discuss(client, [Persona("A", "x", "be A"), Persona("B", "y")], 2, lines, SamplingSettings(), ENGLISH)
        )
    )
    assert [line.speaker for line in lines] == ["You", "A", "B", "A", "B"]
    assert lines[1].answer.text == "You: hi"
    assert lines[2].answer.text == "You: hi\nA: You: hi"  # the engine repeats what was heard last
    assert [body["model"] for body in engine.bodies] == ["x", "y", "x", "y"]


def test_an_error_ends_a_discussion(client: openai.AsyncOpenAI) -> None:
    lines = [Utterance("You", ChatReply("", "hi"))]
    personas = [Persona("A", "x"), Persona("B", "refusing"), Persona("C", "x")]
    finish(BackgroundTask(LOOP, discuss(client, personas, 2, lines, SamplingSettings(), ENGLISH)))
    assert [(line.speaker, line.answer.error) for line in lines] == [("You", ""), ("A", ""), ("B", "too long")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030"])
@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.jsonl"])
def test_files_of_chinese_spreadsheets_are_read(name: str, encoding: str) -> None:
    content = {
        "a.txt": "你好吗\n再见",
        "a.csv": "prompt\n你好吗\n再见",
        "a.jsonl": '{"prompt": "你好吗"}\n{"prompt": "再见"}',
    }
    assert prompts_in(name, content[name].encode(encoding)) == ["你好吗", "再见"]


def test_a_line_is_ended_by_a_line_break_alone() -> None:
    assert prompts_in("", "a\u2028b\u0085c\r\nd".encode()) == ["a\u2028b\u0085c", "d"]
    assert prompts_in("a.jsonl", '{"prompt": "a\u2028b"}\r\n'.encode()) == ["a\u2028b"]


REFUSED = (
    "This model's maximum context length is 100 tokens. However, you requested 512 output tokens and your prompt "
    "contains {} input tokens, for a total of 600 tokens."
)


def test_an_answer_is_made_shorter_before_what_was_said_is_left_out() -> None:
    system: list[Any] = [{"role": "system", "content": "s"}]
    said = [user("a"), assistant("b"), user("c"), assistant("d"), user("e")]
    assert fitted(REFUSED.format("20"), [*system, *said], 512) == ([*system, *said], 80)
    assert fitted(REFUSED.format("at least 90"), [*system, *said], 512) == ([*system, *said[2:]], 512)
    assert fitted(REFUSED.format("90"), said, 9) == (said[2:], 9)
    assert fitted(REFUSED.format("200"), said[2:], None) == (said[4:], None)
    assert fitted("Error code: 400 - {'code': 'context_length_exceeded'}", said, None) == (said[2:], None)
    assert fitted(REFUSED.format("200"), [*system, user("e")], 512) is None
    assert fitted("temperature must be non-negative", said, 512) is None


@pytest.mark.parametrize(
    ("text", "thought", "said"),
    [
        ("<think>\nhm\n</think>\n\nyes", "hm", "yes"),
        ("hm</think>yes", "hm", "yes"),
        ("<think>not yet", "not yet", ""),
        ("yes", "", "yes"),
        ("a <think> b", "", "a <think> b"),
    ],
)
def test_reasoning_is_told_from_what_is_said(text: str, thought: str, said: str) -> None:
    assert without_reasoning(text) == (thought, said)
    asked = history([ChatTurn("q", [ChatReply("x", text)]), ChatTurn("r", [])], 0, "")
    assert asked == [user("q"), assistant(said), user("r")]


@pytest.mark.parametrize(
    ("kind", "status", "english", "chinese"),
    [
        (openai.AuthenticationError, 401, "The key is wrong", "密钥不对"),
        (openai.PermissionDeniedError, 403, "does not allow", "拒绝"),
        (openai.NotFoundError, 404, "no such model", "没有这个模型"),
        (openai.RateLimitError, 429, "Too many requests", "请求太多"),
        (openai.InternalServerError, 503, "cannot answer at the moment", "暂时不可用"),
        (openai.BadRequestError, 400, "said", "said"),
    ],
)
def test_an_error_names_its_cause_in_the_person_s_language(
    kind: type[openai.APIStatusError], status: int, english: str, chinese: str
) -> None:
    response = httpx.Response(status, request=httpx.Request("POST", "http://x"))
    error = kind("wrapped", response=response, body={"message": "said"})
    for language, words_of in ((english, ENGLISH), (chinese, words("zh"))):
        assert language in explanation(error, words_of)
        assert "said" in explanation(error, words_of)


@pytest.mark.parametrize(
    ("name", "content", "prompts"),
    [
        ("", "一\n\n 二 \n", ["一", "二"]),
        ("a.txt", "﻿x\ny", ["x", "y"]),
        ("a.csv", "id,Query\n1,甲\n2,\n3,乙\n", ["甲", "乙"]),
        ("a.CSV", "甲,1\n乙,2\n", ["甲", "乙"]),
        ("a.csv", "", []),
        ("a.jsonl", '{"query": "q"}\n\n{"prompt": "p", "n": 1}\n', ["q", "p"]),
    ],
)
def test_prompts_come_from_lines_csv_and_jsonl(name: str, content: str, prompts: list[str]) -> None:
    assert prompts_in(name, content.encode()) == prompts


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xff", "a.txt: neither UTF-8 nor GBK"),
        ("a.jsonl", b'{"query": "q"}\n{', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"text": "q"}', "a.jsonl, line 1: none of prompt, query"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_line(name: str, content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        prompts_in(name, content)
