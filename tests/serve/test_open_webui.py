"""Open WebUI before the gateway, in an environment of its own; left out where none can be made."""

import hashlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import requests

from tests.own_environment import programs
from tests.serve.fake_engine import Running, Start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]  # its packages are some 3 GB

OPEN_WEBUI = "open-webui==0.12.4"
INSTALL_SECONDS, START_SECONDS = 1800, 300


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Open WebUI with the CPU's torch: another would bring gigabytes of CUDA."""
    version = metadata.version("torch").partition("+")[0]
    folder = tmp_path_factory.mktemp("webui")
    return programs(folder, f"torch=={version}+cpu", OPEN_WEBUI, seconds=INSTALL_SECONDS) / "open-webui"


class WebUI:
    """Open WebUI's own HTTP interface, for its one user."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._session = requests.Session()
        self._session.trust_env = False  # no proxy

    def is_up(self) -> bool:
        try:
            return self._session.get(f"{self.url}/health", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def sign_in(self) -> None:
        """With WEBUI_AUTH=False anyone is its administrator."""
        user = self._session.post(f"{self.url}/api/v1/auths/signin", json={"email": "", "password": ""}, timeout=60)
        self._session.headers["authorization"] = f"Bearer {user.json()['token']}"

    def models(self) -> list[str]:
        listed = self._session.get(f"{self.url}/api/models", timeout=60)
        return [model["id"] for model in listed.json()["data"]]

    def chat(self, content: str, **more: Any) -> requests.Response:
        body = {"model": "wishes", "messages": [{"role": "user", "content": content}], **more}
        return self._session.post(f"{self.url}/api/chat/completions", json=body, timeout=60)


@pytest.fixture(scope="module")
def running(start: Start) -> Running:
    return start(keys=(hashlib.sha256(b"a key").digest(),), max_tokens=1000)


@pytest.fixture(scope="module")
def webui(running: Running, program: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebUI]:
    folder = tmp_path_factory.mktemp("data")
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    settings = {
        "OPENAI_API_BASE_URL": f"{running.url}/v1",
        "OPENAI_API_KEY": "a key",
        "ENABLE_OLLAMA_API": "False",
        "WEBUI_AUTH": "False",
        "WEBUI_SECRET_KEY": "secret",
        "DATA_DIR": str(folder),
        "HOME": str(folder),
        "OFFLINE_MODE": "True",
        "HF_HUB_OFFLINE": "1",
        "RAG_EMBEDDING_MODEL": "",  # else it is looked for at the start
        "DO_NOT_TRACK": "true",
        "SCARF_NO_ANALYTICS": "true",
        "ANONYMIZED_TELEMETRY": "false",
        "no_proxy": "127.0.0.1",
    }
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | settings
    command = [program, "serve", "--host", "127.0.0.1", "--port", str(port)]
    log, found = folder / "log", WebUI(f"http://127.0.0.1:{port}")
    with log.open("wb") as output:
        server = subprocess.Popen(command, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        until = time.monotonic() + START_SECONDS
        while not found.is_up():
            assert time.monotonic() < until and server.poll() is None, log.read_text()[-3000:]
            time.sleep(0.5)
        found.sign_in()
        yield found
    finally:
        server.terminate()
        server.wait(60)


def test_it_lists_the_models(webui: WebUI) -> None:
    assert webui.models() == ["base", "wishes"]


def test_it_chats(webui: WebUI, running: Running) -> None:
    answer = webui.chat("hi", stream=True)
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert events[-1] == "[DONE]"
    chunks = [json.loads(event) for event in events[:-1]]
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "ok"
    assert running.engine.bodies[-1]["model"] == "wishes"
    assert running.engine.bodies[-1]["messages"] == [{"role": "user", "content": "hi"}]
    whole = webui.chat("hi").json()
    assert (whole["choices"][0]["message"]["content"], whole["usage"]["total_tokens"]) == ("ok", 5)


def test_it_shows_what_the_gateway_refuses(webui: WebUI) -> None:
    refused = webui.chat("hi", max_tokens=1001)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "max_tokens_too_large")
    broken = webui.chat("die", stream=True).text
    assert "engine_unavailable" in broken and "[DONE]" not in broken
