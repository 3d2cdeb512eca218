"""The client against a real server that misbehaves in every way we know a name for."""

import asyncio
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest
import uvloop
from pydantic import SecretStr

from benchmarks.answering_server import Behaviour, answer_to, listen
from pipelines.llm.client import Client, parse_retry_after
from pipelines.llm.requests import Outcome, Verdict
from pipelines.recipe.llm import Asking, Endpoint, Sampling
from tests.pipelines.synthesize.serving import in_thread

PROMPT = [{"role": "user", "content": "祝姐姐生日"}]


def client_of(url: str, timeout: float, key: SecretStr | None = None, **more: Any) -> Client:
    endpoint = Endpoint(base_url=url)
    return Client(endpoint, Asking(model="m", endpoints=[endpoint], timeout=timeout, **more), key)


def ask(behaviour: Behaviour, key: str | None = None, timeout: float = 5.0, path: str = "/v1") -> Outcome:
    async def run() -> Outcome:
        server = await listen(behaviour)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{path}"
        sampling = Sampling(temperature=1.0, top_k=20)
        client = client_of(url, timeout, SecretStr(key) if key else None, generation=sampling)
        try:
            return await client.ask(PROMPT)
        finally:
            await client.close()
            server.close()

    return asyncio.run(run())


def test_an_answer_with_its_tokens() -> None:
    outcome = ask(Behaviour(delay=0))
    assert outcome == Outcome(Verdict.ANSWER, "", answer_to(PROMPT), 5, len(answer_to(PROMPT)))


@pytest.mark.parametrize(
    ("behaviour", "verdict", "reason", "said"),
    [
        ({"finish_reason": "length"}, Verdict.FAILURE, "truncated", "愿你"),
        ({"finish_reason": "content_filter"}, Verdict.FAILURE, "filtered", "愿你"),
        ({"faults": {"429": 1.0}, "retry_after": 7}, Verdict.REFUSED, "rate_limit", "slow down"),
        ({"faults": {"500": 1.0}}, Verdict.AGAIN, "status_500", "injected"),
        ({"faults": {"drop": 1.0}}, Verdict.AGAIN, "connection", ""),
        ({"faults": {"hang": 1.0}}, Verdict.AGAIN, "timeout", ""),
        ({"body": b"<!doctype html><p>login"}, Verdict.AGAIN, "html", "login"),
        ({"body": b"hello", "content_type": b"text/html"}, Verdict.AGAIN, "html", "hello"),
        ({"body": b"{broken"}, Verdict.AGAIN, "not_json", "{broken"),
        ({"body": b'{"ok":true}'}, Verdict.AGAIN, "not_a_completion", "ok"),
        ({"body": b"[]"}, Verdict.AGAIN, "not_a_completion", "[]"),
        ({"body": b'{"choices":[{"message":{"content":"\xff\xfe"}}]}'}, Verdict.FAILURE, "invalid_utf8", "byte 35"),
        ({"body": b'{"choices":[{"message":{"content":" "}}]}'}, Verdict.FAILURE, "empty", ""),
        ({"body": b'{"choices":[{"message":{"refusal":"no"}}]}'}, Verdict.FAILURE, "refused", "no"),
        ({"body": b"x" * (10 << 20)}, Verdict.FAILURE, "too_large", "4 MiB"),
        ({"status": 400, "body": b'{"error":{"code":"data_inspection_failed"}}'}, Verdict.FAILURE, "filtered", "data"),
        ({"status": 400, "body": b'{"error":{"message":"too long"}}'}, Verdict.FAILURE, "rejected", "too long"),
        ({"status": 402, "body": b"{}"}, Verdict.FATAL, "quota", "402"),
        ({"status": 404, "body": b'{"error":"no model"}'}, Verdict.FATAL, "not_found", "no model"),
        ({"status": 429, "body": b'{"error":{"code":"insufficient_quota"}}'}, Verdict.FATAL, "quota", "insufficient"),
        ({"status": 408, "body": b"{}"}, Verdict.AGAIN, "status_408", "408"),
        ({"status": 502, "body": b"<html>Bad gateway"}, Verdict.AGAIN, "status_502", "Bad gateway"),
        ({"status": 503, "body": b"\xff\xfe"}, Verdict.AGAIN, "status_503", "503"),
    ],
)
def test_every_failure_has_its_class(behaviour: dict[str, Any], verdict: Verdict, reason: str, said: str) -> None:
    began = time.monotonic()
    outcome = ask(Behaviour(**{"delay": 0.0, **behaviour}), timeout=1.0)
    assert (outcome.verdict, outcome.reason) == (verdict, reason)
    assert said in outcome.text
    assert outcome.retry_after == (7 if reason == "rate_limit" else 0)
    assert time.monotonic() - began < 5


def test_a_key_that_the_endpoint_repeats_is_not_shown() -> None:
    key = "sk-1234567890"
    body = f'{{"error":{{"message":"wrong key {key}"}}}}'.encode()
    outcome = ask(Behaviour(delay=0, status=401, body=body), key=key)
    assert (outcome.verdict, outcome.reason) == (Verdict.FATAL, "key")
    assert outcome.text == '401: {"error":{"message":"wrong key ***"}}'
    assert ask(Behaviour(delay=0, key=key), key=key).verdict is Verdict.ANSWER
    assert ask(Behaviour(delay=0, key=key), key="sk-other").verdict is Verdict.FATAL


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_answer_that_came_while_the_process_stood_still_is_read(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def run(url: str) -> Outcome:
        client = client_of(url, timeout=2)
        asked = asyncio.create_task(client.ask(PROMPT))
        while not behaviour.log:
            await asyncio.sleep(0.01)
        time.sleep(2.5)
        try:
            return await asked
        finally:
            await client.close()

    behaviour = Behaviour(delay=0.3)
    with in_thread(behaviour) as url, asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(run(url)).verdict is Verdict.ANSWER


def test_nobody_listens() -> None:
    async def run() -> Outcome:
        client = client_of("http://127.0.0.1:9/v1", timeout=5)
        try:
            return await client.ask(PROMPT)
        finally:
            await client.close()

    outcome = asyncio.run(run())
    assert (outcome.verdict, outcome.reason) == (Verdict.AGAIN, "connection")
    assert "127.0.0.1" in outcome.text


def test_retry_after_in_all_its_forms() -> None:
    assert parse_retry_after({"retry-after": "3"}) == 3
    assert parse_retry_after({"retry-after": "0.5"}) == 0.5
    assert parse_retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert 8 <= parse_retry_after({"retry-after": formatdate(time.time() + 10, usegmt=True)}) <= 10
    assert parse_retry_after({"retry-after": "soon"}) == 0
    assert parse_retry_after({}) == 0
