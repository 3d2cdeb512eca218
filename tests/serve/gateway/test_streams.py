"""Streams as they were asked for, read by OpenAI's own client and by ones that parse events themselves."""

import json
from typing import Any

import openai
import pytest
import requests

from serve.gateway.stream import EventFilter
from tests.serve.fake_engine import USAGE, Start, frame

MESSAGES: list[Any] = [{"role": "user", "content": "hi"}]


def client_of(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0)


@pytest.mark.parametrize("options", [openai.omit, {"include_usage": False}, {"continuous_usage_stats": True}, None])
@pytest.mark.parametrize("content", ["hi", "split"])
def test_openais_own_loop_reads_every_stream(start: Start, options: Any, content: str) -> None:
    running = start()
    messages: list[Any] = [{"role": "user", "content": content}]
    stream = client_of(running.url).chat.completions.create(
        model="base", messages=messages, stream=True, stream_options=options
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ok"
    assert [chunk.usage for chunk in chunks] == [None, None]
    running.wait_for_count('danlu_tokens_total{kind="completion",model="base"} 2.0')


def test_completions_too(start: Start) -> None:
    stream = client_of(start().url).completions.create(model="base", prompt="hi", stream=True)
    assert [chunk.choices[0].text for chunk in stream] == ["o", "k"]


def test_who_asks_for_usage_gets_it_once_and_last(start: Start) -> None:
    stream = client_of(start().url).chat.completions.create(
        model="base", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert [bool(chunk.choices) for chunk in chunks] == [True, True, False]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == USAGE["completion_tokens"]


def test_a_program_that_parses_lines_itself_meets_no_empty_choices(start: Start) -> None:
    body = {"model": "base", "messages": MESSAGES, "stream": True}
    with requests.post(f"{start().url}/v1/chat/completions", json=body, stream=True, timeout=20) as answer:
        lines = [line for line in answer.iter_lines() if line]
    assert lines.pop() == b"data: [DONE]"
    assert [json.loads(line[6:])["choices"][0]["delta"]["content"] for line in lines] == ["o", "k"]


def test_an_event_that_its_engine_did_not_finish_does_not_spoil_the_error(start: Start) -> None:
    texts = []
    with pytest.raises(openai.APIError, match="No engine serves 'base' at the moment"):
        for part in client_of(start().url).completions.create(model="base", prompt="tear", stream=True):
            texts.append(part.choices[0].text)
    assert texts == ["o"]


def test_what_only_looks_like_usage_passes() -> None:
    events = [
        frame({"choices": [{"delta": {"content": '"choices": []'}}]}),
        frame({"choices": [], "prompt_filter_results": []}),  # no usage: not ours
        frame({"error": {"message": "x"}}),
        b'event: response.completed\ndata: {"response": {"choices": [], "usage": {}}}\n\n',
        b": ping\n\n",
        b"data: [DONE]\n\n",
    ]
    whole = EventFilter(drop_usage=True)
    assert whole.feed(b"".join(events)) == b"".join(events)
    assert whole.feed(frame({"choices": [], "usage": USAGE})) == b""
    torn = EventFilter(drop_usage=True)
    sent = b"".join(torn.feed(bytes([byte])) for byte in b"".join(events) + frame({"choices": [], "usage": USAGE}))
    assert sent == b"".join(events)
    assert (torn.feed(b"data: x"), torn.rest()) == (b"", b"data: x")
