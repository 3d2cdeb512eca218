"""Requests generated from the gateway's own OpenAPI description, whole and broken: no 500, no exception."""

import hashlib
import http.client
import json
import os
import subprocess
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, Phase, given, settings

from pipelines.models.served import ServedModel
from pipelines.recipe.serve import Limits
from serve.discovery import EngineRecord
from serve.gateway.app import Gateway
from serve.gateway.openapi import DESCRIPTION
from tests.own_environment import programs
from tests.serve.fake_engine import Serving, body_of, frame
from tests.serve.gateway.drawn_requests import ENGINES_CHECKS, SCHEMATHESIS, of_served_models, requests


async def engine(scope: Any, receive: Any, send: Any) -> None:
    """Answers anything, streamed where that is asked for."""
    streamed = json.loads(await body_of(receive)).get("stream") is True
    kind = b"text/event-stream" if streamed else b"application/json"
    answer = {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}}
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", kind)]})
    whole = frame(answer) + b"data: [DONE]\n\n" if streamed else json.dumps(answer).encode()
    await send({"type": "http.response.body", "body": whole})


class Fuzzed:
    """The gateway in front of an engine; exceptions that leave it are kept."""

    def __init__(self) -> None:
        limits = Limits(max_body_bytes=2000, max_prompt_characters=60, max_tokens=1000)
        models = [ServedModel("base", "/models/base", {"wishes": "/adapters/wishes"})]
        self.gateway = Gateway(models, "secret", (hashlib.sha256(b"k").digest(),), limits)
        self.raised: list[Exception] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self.gateway(scope, receive, send)
        except Exception as error:
            self.raised.append(error)
            raise

    @asynccontextmanager
    async def session(self) -> AsyncIterator[None]:
        async with aiohttp.ClientSession() as self.gateway.session:
            yield


@pytest.fixture(scope="module")
def fuzzed(serving: Serving) -> Iterator[tuple[Fuzzed, http.client.HTTPConnection]]:
    app = Fuzzed()
    with serving(engine) as engine_url, serving(app, app.session) as url:
        app.gateway.update([EngineRecord("r1", "base", engine_url, 1)])
        yield app, http.client.HTTPConnection(url.removeprefix("http://"), timeout=20)


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.slow)])
def test_no_request_is_an_error_of_ours(fuzzed: tuple[Fuzzed, http.client.HTTPConnection], count: int) -> None:
    app, connection = fuzzed
    seen: Counter[int] = Counter()

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(requests())
    def ask(request: tuple[str, str, bytes, dict[str, str]]) -> None:
        method, path, content, headers = request
        connection.request(method, path, content, headers)
        answer = connection.getresponse()
        body = answer.read()
        seen[answer.status] += 1
        assert answer.status in {200, 400, 401, 404, 405, 413}, body
        if answer.status != 200:
            assert set(json.loads(body)["error"]) == {"message", "type", "param", "code"}
        assert app.raised == []

    ask()
    assert sum(seen.values()) >= count
    assert {200, 400, 401, 404} <= set(seen)
    assert seen[200] > count / 10


@pytest.mark.slow
def test_schemathesis_finds_no_contradiction(fuzzed: tuple[Fuzzed, http.client.HTTPConnection], tmp_path: Path) -> None:
    app, connection = fuzzed
    program = programs(tmp_path, SCHEMATHESIS) / "st"
    (tmp_path / "openapi.json").write_text(json.dumps(of_served_models(DESCRIPTION)))
    url = f"http://{connection.host}:{connection.port}"
    command = [program, "run", "openapi.json", "--url", url, "--header", "Authorization: Bearer k"]
    bounds = ["--seed", "1", "--max-examples", "100", "--max-time", "60", "--continue-on-failure", "--no-color"]
    environment = {**os.environ, "no_proxy": "127.0.0.1", "DO_NOT_TRACK": "1"}
    environment.pop("PYTHONPATH", None)
    ended = subprocess.run(
        [*command, *bounds, "--checks", "all", "--exclude-checks", ENGINES_CHECKS],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stdout[-5000:] + ended.stderr[-2000:]
    assert "Tested: 11" in ended.stdout
    assert app.raised == []


def test_the_description_is_served(fuzzed: tuple[Fuzzed, http.client.HTTPConnection]) -> None:
    _, connection = fuzzed
    connection.close()  # it may have been idle for longer than the server keeps it
    connection.request("GET", "/openapi.json")
    assert json.loads(connection.getresponse().read()) == DESCRIPTION
