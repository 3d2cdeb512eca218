"""Our own servers are asked past every proxy."""

import os
import subprocess
import sys
from typing import Any

import pytest

from pipelines.direct_http import fetch, is_loopback, without_proxy
from tests.local_server import Handler, listening

PROXIES = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")


class Answering(Handler):
    """Answers with the Authorization header; 503 at /ill."""

    def do_GET(self) -> None:
        """Answer."""
        self.send(503 if self.path == "/ill" else 200, (self.headers["Authorization"] or "none").encode())


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment whose every proxy is dead."""
    for name in PROXIES:
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


def test_an_answer_comes_past_a_dead_proxy(proxied: None) -> None:
    with listening(Answering) as url:
        assert fetch(f"{url}/", timeout=5) == b"none"
        assert fetch(f"{url}/", timeout=5, headers={"Authorization": "Bearer k"}) == b"Bearer k"
        with pytest.raises(OSError, match="503"):
            fetch(f"{url}/ill", timeout=5)


@pytest.mark.parametrize("client", ["urllib.request", "requests", "httpx2"])
def test_a_child_asks_this_machine_past_a_dead_proxy(proxied: None, client: str) -> None:
    asked = {
        "urllib.request": "urllib.request.urlopen(url).read()",
        "requests": "requests.get(url).content",
        "httpx2": "httpx2.get(url).content",
    }
    with listening(Answering) as url:
        command = [sys.executable, "-c", f"import sys, {client}\nurl = sys.argv[1]\nprint({asked[client]})", url]

        def run(environment: Any) -> subprocess.CompletedProcess[str]:
            return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)

        assert run(dict(os.environ)).returncode != 0
        assert run(without_proxy(os.environ)).stdout == "b'none'\n"


def test_what_was_asked_past_the_proxy_before_still_is() -> None:
    assert without_proxy({"no_proxy": "corp.example.org", "x": "y"}) == {
        "x": "y",
        "no_proxy": "corp.example.org,127.0.0.1,localhost,::1",
        "NO_PROXY": "corp.example.org,127.0.0.1,localhost,::1",
    }
    assert without_proxy({"NO_PROXY": "a", "no_proxy": ""})["no_proxy"] == "a,127.0.0.1,localhost,::1"


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://127.0.0.1:8000/v1", True),
        ("http://127.9.9.9/v1", True),
        ("http://localhost:8000/v1", True),
        ("http://LOCALHOST/v1", True),
        ("http://me.localhost/v1", True),
        ("http://[::1]:8000/v1", True),
        ("http://0.0.0.0:8000/v1", True),
        ("http://10.0.0.7/v1", False),
        ("https://api.example.org/v1", False),
        ("https://localhost.example.org/v1", False),
        ("https://127.0.0.1.example.org/v1", False),
        ("nonsense", False),
    ],
)
def test_addresses_of_this_machine(url: str, expected: bool) -> None:
    assert is_loopback(url) is expected
