"""The client against a real server that misbehaves in every way we know a name for."""

import asyncio
import json
import time
from collections.abc import Callable
from email.utils import formatdate
from typing import Any

import pytest
import uvloop
from pydantic import SecretStr, ValidationError

from benchmarks.answering_server import Behaviour, answer_to, listen
from pipelines.llm.client import Client
from pipelines.llm.replies import parse_retry_after
from pipelines.llm.requests import Outcome, OutcomeKind
from pipelines.recipe.llm import Endpoint, ModelRequests, Sampling
from tests.pipelines.synthesize.serving import in_thread

PROMPT = [{"role": "user", "content": "祝姐姐生日"}]


def client_of(url: str, timeout: float, key: SecretStr | None = None, **more: Any) -> Client:
    endpoint = Endpoint(base_url=url)
    return Client(endpoint, ModelRequests(model="m", endpoints=[endpoint], timeout=timeout, **more), key)


def send(behaviour: Behaviour, key: str | None = None, timeout: float = 5.0, path: str = "/v1") -> Outcome:
    async def run() -> Outcome:
        server = await listen(behaviour)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}{path}"
        sampling = Sampling(temperature=1.0, top_k=20)
        client = client_of(url, timeout, SecretStr(key) if key else None, generation=sampling)
        try:
            return await client.send(PROMPT)
        finally:
            await client.close()
            server.close()

    return asyncio.run(run())


def test_an_answer_with_its_tokens() -> None:
    outcome = send(Behaviour(delay=0))
    assert outcome == Outcome(OutcomeKind.ANSWERED, "", answer_to(PROMPT), 5, len(answer_to(PROMPT)))


@pytest.mark.parametrize(
    ("behaviour", "kind", "reason", "said"),
    [
        ({"finish_reason": "length"}, OutcomeKind.FAILED, "truncated", "愿你"),
        ({"finish_reason": "content_filter"}, OutcomeKind.FAILED, "filtered", "愿你"),
        ({"faults": {"429": 1.0}, "retry_after": 7}, OutcomeKind.RATE_LIMITED, "rate_limit", "slow down"),
        ({"faults": {"500": 1.0}}, OutcomeKind.RETRY, "status_500", "injected"),
        ({"faults": {"drop": 1.0}}, OutcomeKind.RETRY, "connection", ""),
        ({"faults": {"hang": 1.0}}, OutcomeKind.RETRY, "timeout", ""),
        ({"body": b"<!doctype html><p>login"}, OutcomeKind.RETRY, "html", "login"),
        ({"body": b"hello", "content_type": b"text/html"}, OutcomeKind.RETRY, "html", "hello"),
        ({"body": b"{broken"}, OutcomeKind.RETRY, "not_json", "{broken"),
        ({"body": b'{"ok":true}'}, OutcomeKind.RETRY, "not_a_completion", "ok"),
        ({"body": b"[]"}, OutcomeKind.RETRY, "not_a_completion", "[]"),
        ({"body": b'{"choices":[{"message":{"content":"\xff\xfe"}}]}'}, OutcomeKind.FAILED, "invalid_utf8", "byte 35"),
        ({"body": b'{"choices":[{"message":{"content":" "}}]}'}, OutcomeKind.FAILED, "empty", ""),
        ({"body": b'{"choices":[{"message":{"refusal":"no"}}]}'}, OutcomeKind.FAILED, "refused", "no"),
        ({"body": b"x" * (10 << 20)}, OutcomeKind.FAILED, "too_large", "4 MiB"),
        (
            {"status": 400, "body": b'{"error":{"code":"data_inspection_failed"}}'},
            OutcomeKind.FAILED,
            "filtered",
            "data",
        ),
        ({"status": 400, "body": b'{"error":{"message":"too long"}}'}, OutcomeKind.FAILED, "rejected", "too long"),
        ({"status": 402, "body": b"{}"}, OutcomeKind.FATAL, "quota", "402"),
        ({"status": 404, "body": b'{"error":"no model"}'}, OutcomeKind.FATAL, "not_found", "no model"),
        (
            {"status": 429, "body": b'{"error":{"code":"insufficient_quota"}}'},
            OutcomeKind.FATAL,
            "quota",
            "insufficient",
        ),
        ({"status": 408, "body": b"{}"}, OutcomeKind.RETRY, "status_408", "408"),
        ({"status": 502, "body": b"<html>Bad gateway"}, OutcomeKind.RETRY, "status_502", "Bad gateway"),
        ({"status": 503, "body": b"\xff\xfe"}, OutcomeKind.RETRY, "status_503", "503"),
    ],
)
def test_every_failure_has_its_class(behaviour: dict[str, Any], kind: OutcomeKind, reason: str, said: str) -> None:
    began = time.monotonic()
    outcome = send(Behaviour(**{"delay": 0.0, **behaviour}), timeout=1.0)
    assert (outcome.kind, outcome.reason) == (kind, reason)
    assert said in outcome.text
    assert outcome.retry_after == (7 if reason == "rate_limit" else 0)
    assert time.monotonic() - began < 5


def test_a_key_that_the_endpoint_repeats_is_not_shown() -> None:
    key = "sk-1234567890"
    body = f'{{"error":{{"message":"wrong key {key}"}}}}'.encode()
    outcome = send(Behaviour(delay=0, status=401, body=body), key=key)
    assert (outcome.kind, outcome.reason) == (OutcomeKind.FATAL, "key")
    assert outcome.text == '401: {"error":{"message":"wrong key ***"}}'
    long = f'{{"error":{{"message":"{"x" * 260}{key}"}}}}'.encode()
    assert "sk-" not in send(Behaviour(delay=0, status=401, body=long), key=key).text  # where the words are cut, too
    assert send(Behaviour(delay=0), key="e").text == answer_to(PROMPT)  # an answer stays as it is
    assert send(Behaviour(delay=0, key=key), key=key).kind is OutcomeKind.ANSWERED
    assert send(Behaviour(delay=0, key=key), key="sk-other").kind is OutcomeKind.FATAL


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_an_answer_that_came_while_the_process_stood_still_is_read(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    async def run(url: str) -> Outcome:
        client = client_of(url, timeout=2)
        sent = asyncio.create_task(client.send(PROMPT))
        while not behaviour.log:
            await asyncio.sleep(0.01)
        time.sleep(2.5)
        try:
            return await sent
        finally:
            await client.close()

    behaviour = Behaviour(delay=0.3)
    with in_thread(behaviour) as url, asyncio.Runner(loop_factory=new_loop) as runner:
        assert runner.run(run(url)).kind is OutcomeKind.ANSWERED


def test_a_proxy_does_not_stand_between_us_and_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    assert send(Behaviour(delay=0)).kind is OutcomeKind.ANSWERED


def test_nobody_listens() -> None:
    async def run() -> Outcome:
        client = client_of("http://127.0.0.1:9/v1", timeout=5)
        try:
            return await client.send(PROMPT)
        finally:
            await client.close()

    outcome = asyncio.run(run())
    assert (outcome.kind, outcome.reason) == (OutcomeKind.RETRY, "connection")
    assert "127.0.0.1" in outcome.text


def test_retry_after_in_all_its_forms() -> None:
    assert parse_retry_after({"retry-after": "3"}) == 3
    assert parse_retry_after({"retry-after": "0.5"}) == 0.5
    assert parse_retry_after({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5
    assert 8 <= parse_retry_after({"retry-after": formatdate(time.time() + 10, usegmt=True)}) <= 10
    assert parse_retry_after({"retry-after": "soon"}) == 0
    assert parse_retry_after({}) == 0


def test_the_knobs_of_an_endpoint_are_sent_and_ours_are_left_alone() -> None:
    seen: list[dict[str, Any]] = []

    async def run() -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(head.partition(b"content-length:")[2].split(b"\r\n")[0])
            seen.append(json.loads(await reader.readexactly(length)))
            writer.write(b"HTTP/1.1 500 X\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        knobs = {"chat_template_kwargs": {"enable_thinking": False}, "reasoning_effort": "low"}
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
        endpoint = Endpoint.model_validate({"base_url": url, "extra_body": {"enable_search": True}, **knobs})
        client = Client(endpoint, ModelRequests(model="m", endpoints=[endpoint]), None)
        await client.send(PROMPT)
        await client.close()
        server.close()

    asyncio.run(run())
    assert seen[0]["chat_template_kwargs"] == {"enable_thinking": False}
    assert (seen[0]["reasoning_effort"], seen[0]["enable_search"]) == ("low", True)
    for name in ("messages", "stream", "n", "tools", "max_tokens"):
        with pytest.raises(ValidationError, match=f"extra_body: {name} cannot stand here"):
            Endpoint.model_validate({"base_url": "http://x/v1", "extra_body": {name: 1}})
