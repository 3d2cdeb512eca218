"""Waits for an engine's process have an end, and say what they waited for."""

import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pipelines.errors import StageError
from serve.asgi import send_json
from serve.engine.replica import max_model_len, wait_until_healthy
from tests.serve.fake_engine import Serving


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that lives."""
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as started:
        yield started
        started.kill()


def test_an_engine_that_never_answers_is_given_up(process: subprocess.Popen[bytes]) -> None:
    began = time.monotonic()
    with pytest.raises(StageError, match=r"did not answer at http://127\.0\.0\.1:9/health within 0\.3 s"):
        wait_until_healthy(process, "http://127.0.0.1:9", timeout=0.3)
    assert time.monotonic() - began < 10
    assert process.wait(10) != 0  # and it goes


def test_an_engine_that_is_ill_is_not_called_healthy(process: subprocess.Popen[bytes], serving: Serving) -> None:
    async def ill(scope: object, receive: object, send: object) -> None:
        await send_json(send, 503, {})  # type: ignore[arg-type]

    with serving(ill) as url, pytest.raises(StageError, match="503"):
        wait_until_healthy(process, url, timeout=0.3)


def test_a_dead_proxy_is_not_asked_for_an_engine(
    process: subprocess.Popen[bytes], serving: Serving, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def well(scope: object, receive: object, send: object) -> None:
        await send_json(send, 200, {"data": [{"id": "base", "max_model_len": 2048}]})  # type: ignore[arg-type]

    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with serving(well) as url:
        wait_until_healthy(process, url, timeout=20)
        assert max_model_len(url, "k") == 2048
    assert max_model_len("http://127.0.0.1:9", "k") is None
