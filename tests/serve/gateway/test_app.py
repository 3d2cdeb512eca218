"""The gateway before a small engine that streams as vLLM's server does: paths, names, answers, counters."""

import json
from typing import Any

import jsonschema
import openai
import pytest
import requests

from serve.gateway.openapi import DESCRIPTION
from serve.gateway.origins import with_origins
from tests.serve.fake_engine import USAGE, Serving, Start, error_of


def test_an_answer_passes_unchanged_and_the_engine_sees_its_own_key(start: Start) -> None:
    running = start()
    answer = running.complete(model="wishes", unknown_field=[1])
    assert answer.json() == {"model": "wishes", "choices": [{"index": 0, "text": "ok"}], "usage": USAGE}
    assert running.engine.bodies == [{"model": "wishes", "prompt": "hi", "unknown_field": [1]}]
    assert running.engine.headers[0][b"authorization"] == b"Bearer engine-secret"


def test_a_stream_that_asks_for_usage_carries_it_in_its_last_frame_and_ends_with_done(start: Start) -> None:
    running = start()
    answer = running.complete(stream=True, stream_options={"include_usage": True})
    lines = [line for line in answer.content.split(b"\n\n") if line]
    assert lines[-1] == b"data: [DONE]"
    frames = [json.loads(line.removeprefix(b"data: ")) for line in lines[:-1]]
    assert [f["choices"][0]["text"] for f in frames[:-1]] == ["o", "k"]
    assert frames[-1]["usage"] == USAGE
    assert running.engine.bodies[0]["stream_options"] == {"include_usage": True}


def test_models_are_listed_with_their_parent(start: Start) -> None:
    client = openai.OpenAI(base_url=f"{start().url}/v1", api_key="x", max_retries=0)
    cards = [card.model_dump() for card in client.models.list()]
    assert [(card["id"], card["parent"]) for card in cards] == [("base", None), ("wishes", "base")]
    assert client.models.retrieve("wishes").model_dump() == cards[1]
    for unknown in ("nope", "a/b", "..%2fbase"):
        with pytest.raises(openai.NotFoundError, match="does not exist; GET /v1/models lists those that do"):
            client.models.retrieve(unknown)


@pytest.mark.parametrize("name", ["nope", "../base", "a/b", "", None, 7, ["base"]])
def test_an_unknown_model_is_404_and_never_reaches_an_engine(start: Start, name: Any) -> None:
    running = start()
    answer = running.complete(model=name)
    assert answer.status_code == 404
    assert error_of(answer) | {"message": ""} == {
        "message": "",
        "type": "not_found_error",
        "param": "model",
        "code": "model_not_found",
    }
    assert running.engine.bodies == []


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b'"base"', b"\xff\xfe", b"[" * 100_000])
def test_a_body_that_is_not_a_json_object_is_400(start: Start, body: bytes) -> None:
    answer = requests.post(f"{start().url}/v1/chat/completions", data=body, timeout=20)
    assert (answer.status_code, error_of(answer)["code"]) == (400, "invalid_json")


def test_wrong_paths_and_methods(start: Start) -> None:
    running = start()
    wrong = running.get("/v1/completions")
    assert (wrong.status_code, wrong.headers["allow"], error_of(wrong)["code"]) == (405, "POST", "method_not_allowed")
    assert running.get("/v1/load_lora_adapter").status_code == 404
    preflight = requests.options(f"{running.url}/v1/models", headers={"origin": "http://evil"}, timeout=20)
    assert preflight.status_code == 405
    assert "access-control-allow-origin" not in preflight.headers


@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/openapi.json", "/v1/models", "/v1/models/base"])
def test_what_is_read_is_answered_to_get_and_head_alone(start: Start, path: str) -> None:
    url = start().url + path
    head = requests.head(url, timeout=20)
    assert (head.status_code, head.content, int(head.headers["content-length"]) > 0) == (200, b"", True)
    for method in ("POST", "PUT", "DELETE", "TRACE"):
        refused = requests.request(method, url, timeout=20)
        assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")
        assert error_of(refused)["code"] == "method_not_allowed"


def test_the_description_says_what_is_answered(start: Start) -> None:
    running = start()

    def is_described(path: str, status: int, named: str = "") -> None:
        answer = running.get(named or path)
        described = DESCRIPTION["paths"][path]["get"]["responses"][str(answer.status_code)]["content"]
        assert answer.status_code == status
        jsonschema.validate(answer.json(), described[answer.headers["content-type"]]["schema"])

    for path in ("/health", "/ready", "/openapi.json", "/v1/models"):
        is_described(path, 200)
    is_described("/v1/models/{model}", 200, "/v1/models/wishes")
    is_described("/v1/models/{model}", 404, "/v1/models/nope")
    running.gateway.update([])
    is_described("/ready", 503)


def test_a_websocket_is_refused_without_an_error_of_ours(start: Start) -> None:
    headers = {"connection": "Upgrade", "upgrade": "websocket", "sec-websocket-version": "13"}
    url, key = start().url, {"sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ=="}
    assert requests.get(f"{url}/v1/completions", headers={**headers, **key}, timeout=20).status_code == 403


def test_pages_of_named_origins_alone_may_ask(start: Start, serving: Serving) -> None:
    gateway = start().gateway
    with serving(with_origins(gateway, ("https://chat.example.org",))) as url:
        ours, other = (
            requests.get(f"{url}/health", headers={"origin": origin}, timeout=20)
            for origin in ("https://chat.example.org", "https://evil.example.org")
        )
    assert ours.headers["access-control-allow-origin"] == "https://chat.example.org"
    assert "access-control-allow-origin" not in other.headers


def test_metrics_count_requests_and_tokens(start: Start) -> None:
    running = start()
    running.complete()
    running.complete(stream=True)
    running.complete(model="nope")
    text = running.get("/metrics").text
    for line in (
        'danlu_requests_total{model="base",status="200"} 2.0',
        'danlu_requests_total{model="",status="404"} 1.0',
        'danlu_tokens_total{kind="prompt",model="base"} 6.0',
        'danlu_tokens_total{kind="completion",model="base"} 4.0',
        'danlu_time_to_first_token_seconds_count{model="base"} 1.0',
        'danlu_time_per_output_token_seconds_count{model="base"} 1.0',
        'danlu_engines{model="base"} 1.0',
        'danlu_requests_in_flight{model="base"} 0.0',
        'danlu_requests_queued{model="base"} 0.0',
    ):
        assert line in text.splitlines()
