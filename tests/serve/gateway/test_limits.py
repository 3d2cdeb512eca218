"""What the gateway refuses: keys, sizes, rates and a full queue."""

import hashlib
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from serve.gateway.limits import TokenBucket
from serve.gateway.metrics import Timing
from tests.serve.fake_engine import Start, error_of


def test_a_body_over_the_limit_is_413(start: Start) -> None:
    running = start(max_body_bytes=1000)
    assert error_of(running.complete("x" * 1000))["code"] == "body_too_large"
    parts = (b"x" * 400 for _ in range(10))  # a generator is sent in chunks, without a declared length
    assert requests.post(f"{running.url}/v1/completions", data=parts, timeout=20).status_code == 413
    assert running.complete("x" * 500).status_code == 200


def test_without_a_valid_key_nothing_but_health_is_answered(start: Start) -> None:
    running = start(keys=(hashlib.sha256(b"k1").digest(), hashlib.sha256(b"k2").digest()))
    for headers in ({}, {"authorization": "Bearer no"}, {"authorization": "Basic k1"}, {"authorization": "k1"}):
        answer = running.complete(headers=headers)
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
        assert answer.headers["www-authenticate"] == "Bearer"
    assert running.get("/v1/models").status_code == 401
    assert running.complete(headers={"authorization": "Bearer k2"}).status_code == 200
    assert running.get("/v1/models/base").status_code == 401
    assert running.get("/health").status_code == 200
    assert running.get("/metrics").status_code == 401
    running.wait_for_count('danlu_requests_total{model="",status="401"} 4.0', authorization="Bearer k1")


def test_metrics_are_open_where_the_recipe_says_so(start: Start) -> None:
    running = start(keys=(hashlib.sha256(b"k1").digest(),), open_metrics=True)
    assert running.get("/metrics").status_code == 200
    assert running.get("/v1/models").status_code == 401


def test_a_full_queue_is_429_and_those_before_it_are_answered(start: Start) -> None:
    running = start(max_in_flight=1, max_queued=1)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(running.complete, "wait 1.0") for _ in range(2)]
        time.sleep(0.5)
        refused = running.complete()
        assert (refused.status_code, error_of(refused)["code"]) == (429, "queue_full")
        assert int(refused.headers["retry-after"]) >= 1
        counted = running.get("/metrics").text.splitlines()
        assert {'danlu_requests_in_flight{model="base"} 1.0', 'danlu_requests_queued{model="base"} 1.0'} <= set(counted)
        assert [future.result().status_code for future in waiting] == [200, 200]
    assert running.complete().status_code == 200


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"prompt": "x" * 11}, "prompt_too_long"),
        ({"prompt": ["x" * 6, "y" * 6]}, "prompt_too_long"),
        ({"prompt": [1] * 11}, "prompt_too_long"),
        ({"messages": [{"content": [{"text": "x" * 11}]}]}, "prompt_too_long"),
        ({"tools": [{"function": {"description": "x" * 9}}]}, "prompt_too_long"),
        ({"tools": [{"x" * 9: None}]}, "prompt_too_long"),
        ({"documents": [{"text": "x" * 9}]}, "prompt_too_long"),
        ({"chat_template_kwargs": {"x": "x" * 8}}, "prompt_too_long"),
        ({"max_tokens": 101}, "max_tokens_too_large"),
        ({"max_completion_tokens": 101, "max_tokens": 1}, "max_tokens_too_large"),
        ({"max_tokens": "101"}, "max_tokens_too_large"),  # the engine would read it as a number
        ({"max_tokens": 101.0}, "max_tokens_too_large"),
        ({"max_tokens": True}, "max_tokens_too_large"),
        ({"max_tokens": 51, "n": 2}, "max_tokens_too_large"),
        ({"max_tokens": 51, "prompt": ["a", "b"]}, "max_tokens_too_large"),
        ({"max_tokens": 26, "n": 2, "prompt": [[1], [2]]}, "max_tokens_too_large"),
        ({"n": 101}, "invalid_n"),
        ({"n": "4"}, "invalid_n"),
        ({"n": 0}, "invalid_n"),
        ({"n": 50, "prompt": ["a", "b", "c"]}, "too_many_prompts"),
    ],
)
def test_prompts_and_answers_over_the_limits_are_400(start: Start, body: dict[str, Any], code: str) -> None:
    running = start(max_prompt_characters=10, max_tokens=100)
    answer = running.complete(**{"prompt": "hi", **body})
    assert (answer.status_code, error_of(answer)["code"]) == (400, code)
    assert error_of(answer)["param"] in body
    assert running.engine.bodies == []


def test_a_chat_that_names_no_length_gets_the_longest_allowed(start: Start) -> None:
    running = start(max_tokens=100)
    messages = [{"role": "user", "content": "hi"}]
    for path, body in (("chat/completions", {"messages": messages}), ("completions", {"prompt": "hi"})):
        requests.post(f"{running.url}/v1/{path}", json={"model": "base", **body}, timeout=20)
    running.complete(max_tokens=None)
    assert [body["max_tokens"] for body in running.engine.bodies] == [100, 16, 16]


def test_the_limit_of_tokens_is_shared_by_the_choices(start: Start) -> None:
    running = start(max_tokens=100)
    assert running.complete(n=2, max_tokens=50).status_code == 200
    assert running.complete([1, 2, 3], n=2, max_tokens=50).status_code == 200  # one prompt, in tokens
    running.complete(n=10)  # 16 tokens each is what the engine would give
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "n": 4}
    requests.post(f"{running.url}/v1/chat/completions", json=body, timeout=20)
    assert [body["max_tokens"] for body in running.engine.bodies] == [50, 50, 10, 25]


@pytest.mark.parametrize(
    ("field", "value"),
    [("stream", 1), ("stream", "true"), ("stream", 1.0), ("stream", "false"), ("stream_options", [])],
)
def test_what_only_the_engine_would_take_for_a_stream_is_400(start: Start, field: str, value: Any) -> None:
    running = start(tokens_per_minute=100)
    answer = running.complete(**{field: value})
    assert (answer.status_code, error_of(answer)["code"], error_of(answer)["param"]) == (400, "invalid_type", field)
    assert running.engine.bodies == []
    assert running.complete(stream=None, stream_options=None).status_code == 200


def test_where_tokens_are_counted_a_stream_has_a_frame_for_each(start: Start) -> None:
    for limits, interval in (({}, 64), ({"tokens_per_minute": 100}, None)):
        running = start(**limits)
        assert running.complete(stream=True, stream_interval=64).status_code == 200
        assert running.engine.bodies[0].get("stream_interval") == interval


def test_frames_that_come_together_count_each() -> None:
    timing = Timing()
    timing.see(b'data: {"choices":[]}\n\ndata: {"choices":[]}\n\n')
    timing.see(b'data: {"choices":[]}\n\n')
    assert timing.frames == 3


def test_rates_are_kept_for_each_key(start: Start) -> None:
    keys = (hashlib.sha256(b"a").digest(), hashlib.sha256(b"b").digest())
    running = start(keys=keys, requests_per_minute=2, tokens_per_minute=1000)
    statuses = [running.complete(headers={"authorization": "Bearer a"}).status_code for _ in range(3)]
    assert statuses == [200, 200, 429]
    assert running.complete(headers={"authorization": "Bearer b"}).status_code == 200


def test_tokens_of_an_answer_count_against_the_rate(start: Start) -> None:
    running = start(tokens_per_minute=5)
    assert running.complete(stream=True).status_code == 200
    refused = running.complete()
    assert (refused.status_code, error_of(refused)["code"]) == (429, "rate_limit_exceeded")


def test_an_allowance_refills_evenly_and_pays_debts_later() -> None:
    bucket = TokenBucket(per_minute=60)
    bucket.take(90)
    assert bucket.wait(1) == pytest.approx(31, abs=0.5)
    bucket.at -= 31
    assert bucket.wait(1) == 0
