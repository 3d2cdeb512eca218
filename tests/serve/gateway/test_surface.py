"""What the gateway passes on beside chats: other paths, names of requests, lengths of contexts, and its access log."""

import json
from pathlib import Path
from typing import Any

import openai
import pytest
import requests

from serve.asgi import send_json
from serve.discovery import EngineRecord
from serve.gateway import access_log
from serve.gateway.access_log import AccessLog
from serve.gateway.metrics import TokenUsage, usage_in
from tests.serve.fake_engine import Serving, Start, error_of


def post(url: str, path: str, **body: Any) -> requests.Response:
    headers = body.pop("headers", {})
    return requests.post(f"{url}{path}", json={"model": "base", **body}, headers=headers, timeout=20)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "hi"}),
        ("/tokenize", {"prompt": "hi"}),
        ("/tokenize", {"messages": [{"role": "user", "content": "hi"}]}),
        ("/detokenize", {"tokens": [1, 2]}),
    ],
)
def test_what_else_vllm_answers_is_passed_on_as_it_is(start: Start, path: str, body: dict[str, Any]) -> None:
    running = start(max_tokens=100)
    assert post(running.url, path, **body).status_code == 200
    assert running.engine.paths == [path]
    more = {"max_output_tokens": 100} if path == "/v1/responses" else {}
    assert running.engine.bodies == [{"model": "base", **body, **more}]
    assert requests.get(f"{running.url}{path}", timeout=20).status_code == 405
    assert post(running.url, path, **{"model": "nope", **body}).status_code == 404


@pytest.mark.parametrize(
    ("path", "body", "code"),
    [
        ("/v1/responses", {"input": "x" * 11}, "prompt_too_long"),
        ("/v1/responses", {"input": "x", "instructions": "x" * 10}, "prompt_too_long"),
        ("/v1/responses", {"input": "x", "max_output_tokens": 101}, "max_tokens_too_large"),
        ("/tokenize", {"prompt": "x" * 11}, "prompt_too_long"),
        ("/detokenize", {"tokens": [1] * 11}, "prompt_too_long"),
    ],
)
def test_limits_hold_there_too(start: Start, path: str, body: dict[str, Any], code: str) -> None:
    running = start(max_prompt_characters=10, max_tokens=100)
    answer = post(running.url, path, **body)
    assert (answer.status_code, error_of(answer)["code"]) == (400, code)
    assert running.engine.bodies == []


def test_a_stream_of_responses_is_asked_for_no_more_than_it_was(start: Start) -> None:
    running = start()
    assert b"[DONE]" in post(running.url, "/v1/responses", input="hi", stream=True).content
    assert running.engine.bodies == [{"model": "base", "input": "hi", "stream": True}]


def test_tokens_of_responses_are_counted() -> None:
    details = '"input_tokens_details":{"cached_tokens":0},"output_tokens":7,"output_tokens_details":{"x":1}'
    body = f'{{"usage":{{"input_tokens":3,{details},"total_tokens":10}},"user":null}}'
    assert usage_in(body.encode()) == TokenUsage(3, 7)
    assert usage_in(b'{"usage":{"prompt_tokens":3,"total_tokens":5,"completion_tokens":2}}') == TokenUsage(3, 2)


def test_a_request_keeps_the_name_its_client_gave_it(start: Start) -> None:
    running = start()
    named = running.complete(headers={"x-request-id": "mine-1"})
    assert named.headers["x-request-id"] == "mine-1"
    assert running.engine.headers[-1][b"x-request-id"] == b"mine-1"
    for bad in ("a b", "x" * 200, "ä".encode().decode("latin-1")):
        given = running.complete(headers={"x-request-id": bad}).headers["x-request-id"]
        assert given != bad and len(given) == 24
    refused = running.complete(model="nope", headers={"x-request-id": "mine-2"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (404, "mine-2")


def test_openais_client_sees_the_name_of_a_request(start: Start) -> None:
    client = openai.OpenAI(base_url=f"{start().url}/v1", api_key="x", max_retries=0)
    answer = client.completions.create(model="base", prompt="hi", extra_headers={"X-Request-Id": "mine"})
    assert answer._request_id == "mine"
    with pytest.raises(openai.NotFoundError) as refused:
        client.completions.create(model="nope", prompt="hi")
    assert refused.value.request_id


def test_models_say_how_long_their_context_is(start: Start) -> None:
    running = start()
    assert running.get("/v1/models/wishes").json()["max_model_len"] is None
    lengths = (("r7", 4096), ("r8", 2048), ("r9", None))
    running.gateway.update([EngineRecord(name, "base", running.engine_url, 1, length) for name, length in lengths])
    assert [card["max_model_len"] for card in running.get("/v1/models").json()["data"]] == [2048, 2048]


def test_a_line_a_request_without_texts_and_keys(start: Start, serving: Serving, tmp_path: Path) -> None:
    running, file = start(), tmp_path / "logs" / "access.jsonl"
    with serving(AccessLog(running.gateway, file), running.session) as url:
        post(url, "/v1/completions", prompt="a secret text", stream=True, headers={"authorization": "Bearer k"})
        post(url, "/v1/completions", prompt="hi", headers={"x-request-id": "mine"})
        post(url, "/v1/completions", model="nope", prompt="hi")
        requests.get(f"{url}/health", timeout=20)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(line["path"], line["status"]) for line in lines] == [
        *[("/v1/completions", status) for status in (200, 200, 404)],
        ("/health", 200),
    ]
    assert (lines[0]["model"], lines[0]["prompt_tokens"], lines[0]["completion_tokens"]) == ("base", 3, 2)
    assert lines[1]["request_id"] == "mine"
    assert lines[0]["client"] == "127.0.0.1" and lines[0]["seconds"] >= 0
    assert "secret" not in file.read_text() and "Bearer" not in file.read_text()


def test_a_bugs_line_has_the_status_that_the_client_got(serving: Serving, tmp_path: Path) -> None:
    async def broken(scope: Any, receive: Any, send: Any) -> None:
        raise KeyError("a bug")

    with serving(AccessLog(broken, tmp_path / "access.jsonl")) as url:
        assert post(url, "/v1/completions", prompt="hi").status_code == 500
    (line,) = (tmp_path / "access.jsonl").read_text().splitlines()
    assert json.loads(line)["status"] == 500


async def well(scope: Any, receive: Any, send: Any) -> None:
    await send_json(send, 200, {})


def test_the_log_does_not_grow_for_ever(serving: Serving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(access_log, "FILE_BYTES", 1000)
    with serving(AccessLog(well, tmp_path / "access.jsonl")) as url:
        for number in range(100):
            requests.get(f"{url}/{number}", timeout=20)
    files = [tmp_path / "access.jsonl", *(tmp_path / f"access.jsonl.{n}" for n in range(1, access_log.FILES + 1))]
    assert sorted(tmp_path.iterdir()) == sorted(files) and all(file.stat().st_size <= 1000 for file in files)
    paths = [json.loads(line)["path"] for file in reversed(files) for line in file.read_text().splitlines()]
    assert paths == [f"/{number}" for number in range(100 - len(paths), 100)]


def test_a_log_that_cannot_be_written_breaks_no_answer(serving: Serving) -> None:
    with serving(AccessLog(well, Path("/dev/full"))) as url:
        assert [requests.get(url, timeout=20).status_code for _ in range(3)] == [200, 200, 200]
