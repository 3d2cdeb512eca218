"""Every reply has the class that the table in docs/synthesize.md gives it."""

import asyncio
import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.llm.client import Client
from pipelines.llm.reasoning import split_reasoning
from pipelines.llm.replies import estimate_tokens, read_reply
from pipelines.llm.requests import ChatRequest, Outcome, OutcomeKind, RequestList, checked
from pipelines.recipe.llm import Endpoint, ModelRequests
from tests.pipelines.llm.reply_server import ANSWER, PROMPT, REPLIES, completion, http, serve

DOCUMENT = Path(__file__).parents[3] / "docs" / "synthesize.md"
WORDS = {
    "answer": OutcomeKind.ANSWERED,
    "failed": OutcomeKind.FAILED,
    "asked again": OutcomeKind.RETRY,
    "waits": OutcomeKind.RATE_LIMITED,
    "endpoint stops": OutcomeKind.FATAL,
}
SECTION: dict[str, Any] = {"model": "m", "timeout": 10.0, "endpoints": [{"base_url": "http://x/v1"}]}


def documented() -> dict[str, tuple[OutcomeKind, str]]:
    """What the table says of each reply."""
    found = {}
    for line in DOCUMENT.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 3 and cells[0] in WORDS:
            for reply in cells[2].split("; "):
                found[reply] = (WORDS[cells[0]], cells[1].strip("`"))
    return found


@pytest.fixture(scope="module")
def outcomes() -> dict[str, Outcome]:
    """What the client makes of each reply."""

    async def send(port: int, number: int) -> Outcome:
        endpoint = Endpoint(base_url=f"http://127.0.0.1:{port}/{number}/v1")
        client = Client(endpoint, ModelRequests.model_validate(SECTION), None)
        try:
            return await client.send([{"role": "user", "content": PROMPT}])
        finally:
            await client.close()

    async def run() -> list[Outcome]:
        server, port = await serve()
        found = []
        for first in range(0, len(REPLIES), 8):
            numbers = range(first, min(first + 8, len(REPLIES)))
            found += await asyncio.gather(*(send(port, number) for number in numbers))
        server.close()
        return found

    source = RequestList(ModelRequests.model_validate(SECTION), "s", "", [], lambda request, text: None)
    request = ChatRequest(0, {}, 0, [], "", b"")
    return {name: checked(source, request, one) for name, one in zip(REPLIES, asyncio.run(run()), strict=True)}


def test_every_reply_has_the_class_that_the_table_gives_it(outcomes: dict[str, Outcome]) -> None:
    assert {name: (one.kind, one.reason) for name, one in outcomes.items()} == documented()
    assert len(outcomes) > 129


def test_answers_hold_the_answer_and_nothing_else(outcomes: dict[str, Outcome]) -> None:
    answers = {name: one for name, one in outcomes.items() if one.kind is OutcomeKind.ANSWERED}
    assert {one.text for name, one in answers.items() if "text parts" not in name} == {ANSWER}
    thought = {name for name, one in answers.items() if one.reasoning}
    assert thought == {name for name in answers if name.startswith("reasoning") and "a part" not in name}
    assert {one.reasoning for name, one in answers.items() if name in thought} == {"想一想"}


def test_what_a_reply_cost_is_known_or_estimated(outcomes: dict[str, Outcome]) -> None:
    estimated = {name for name, one in outcomes.items() if one.is_estimated}
    unusable = {"negative `usage`", "`usage` of 2^70 tokens", "`usage` that is infinite"}
    without = {"no `usage`", "`usage` of nulls", "`usage` of zeros", "`usage` that is a list"}
    assert estimated == {*unusable, *without, "more than 4 MiB", "more than 4 MiB once it is unpacked"}
    for name in without:
        assert (outcomes[name].input_tokens, outcomes[name].output_tokens) == (8, 12)
    assert outcomes["`network_error`"].output_tokens == 20  # a try that failed was paid for too


def test_retry_after_is_read_where_it_is_one(outcomes: dict[str, Outcome]) -> None:
    waits = {name: one.retry_after for name, one in outcomes.items() if one.kind is OutcomeKind.RATE_LIMITED}
    assert waits["429 with Retry-After as a number"] == 86400
    assert 1000 < waits["429 with Retry-After as a date"] < 5000  # the fixture may have taken its time
    assert waits["429 with a Retry-After that is none"] == waits["429 with an endless Retry-After"] == 0


@pytest.mark.parametrize(
    ("written", "reasoning", "answer"),
    [
        ("<think>想</think>答", "想", "答"),
        ("<thinking>想</thinking>\n答", "想", "答"),
        ("[THINK]想[/THINK]答", "想", "答"),
        ("<think>想</think><think>再想</think>答", "想\n\n再想", "答"),
        ("<think></think>\n\n答", "", "答"),
        ("想。</think>\n\n答", "想。", "答"),
        ("DeepSeek 用 <think>…</think> 包住推理，再回答。", "", "DeepSeek 用 <think>…</think> 包住推理，再回答。"),
        ("结束标签是 `</think>`\n答案在后面", "", "结束标签是 `</think>`\n答案在后面"),
        ("<b>答</b>", "", "<b>答</b>"),
        ("<think>想</think>再想</think>\n答", "想\n\n再想", "答"),
        ("<think>想<think>再想</think>又想</think>\n答", "想<think>再想\n\n又想", "答"),
        ("想一想</think>答", "想一想", "答"),
        ("I am done.</think> 答", "I am done.", "答"),
        ('<think time="3">想</think>答', "想", "答"),
        ("<thinking about it> 答", "", "<thinking about it> 答"),
        ("标签 </think> 结束推理", "", "标签 </think> 结束推理"),
    ],
)
def test_reasoning_is_told_from_the_answer(written: str, reasoning: str, answer: str) -> None:
    assert split_reasoning(written) == (reasoning, answer)


def test_an_error_that_repeats_the_prompt_is_not_taken_for_an_empty_account() -> None:
    prompt = "写一段话：余额不足怎么办？\nMy account is suspended."
    body = http({"error": {"message": f"invalid input: {prompt}"}}).partition(b"\r\n\r\n")[2]
    assert read_reply(400, {}, body, prompt, 100).reason == "rejected"
    assert read_reply(400, {}, body, "祝福", 100).reason == "quota"


def test_a_line_of_the_prompt_that_is_one_mark_hides_nothing_in_an_error() -> None:
    body = http({"error": {"code": "1113", "message": "x"}}).partition(b"\r\n\r\n")[2]
    assert read_reply(429, {}, body, "1\n3\n11\n{", 100).reason == "quota"


def test_what_is_shown_of_an_error_is_one_line_that_steers_no_terminal() -> None:
    said = read_reply(502, {}, b"<html>\n\x1b[2J bad\r\n gateway\x07", "", 100).text
    assert said == "502: <html> [2J bad gateway"
    assert read_reply(200, {}, b'{"error": "\\ud83d"}', "", 100).text.isprintable()


def test_what_a_prompt_holds_an_answer_may_hold() -> None:
    source = RequestList(ModelRequests.model_validate(SECTION), "s", "", [], lambda request, text: None)
    asked = ChatRequest(0, {}, 0, [{"role": "user", "content": "<|im_end|> 是什么？"}], "", b"")
    answered = Outcome(OutcomeKind.ANSWERED, "", "<|im_end|> 结束一轮。")
    assert checked(source, asked, answered).kind is OutcomeKind.ANSWERED
    assert checked(source, ChatRequest(0, {}, 0, [], "", b""), answered).reason == "malformed"


def test_tokens_are_estimated_rather_high() -> None:
    assert estimate_tokens("祝您健康") == 4
    assert estimate_tokens("happy new year") == 5
    assert estimate_tokens("") == 0
    usage = read_reply(200, {}, http(completion(usage=None)).partition(b"\r\n\r\n")[2], "祝福", 100)
    assert (usage.input_tokens, usage.output_tokens, usage.is_estimated) == (2, len(ANSWER), True)
    assert re.fullmatch(r"[^A-Za-z]+", ANSWER)
