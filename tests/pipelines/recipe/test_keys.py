"""Keys from the environment."""

import subprocess
import sys

import pytest

from pipelines.errors import RecipeError
from pipelines.recipe.keys import endpoint_key


@pytest.mark.parametrize("key", ["sk-1234\r", '"sk-1234"', "$MY_KEY", "${MY_KEY}", "sk-1234 ", "sk-１２３４"])
def test_an_endpoint_is_not_asked_with_what_cannot_be_a_key(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(RecipeError, match="OPENAI_API_KEY holds") as error:
        endpoint_key()
    assert "1234" not in str(error.value) and "MY_KEY" not in str(error.value)


@pytest.mark.parametrize(("key", "sent"), [("sk-1234", "sk-1234"), ("", "none"), (None, "none")])
def test_no_key_is_none(monkeypatch: pytest.MonkeyPatch, key: str | None, sent: str) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    assert endpoint_key() == sent


@pytest.mark.parametrize("command", ["chat", "ui"])
def test_commands_that_ask_say_it_at_once(monkeypatch: pytest.MonkeyPatch, command: str) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1234\r")
    run = [sys.executable, "-m", "rayjobs.cli", command, "http://127.0.0.1:9/v1"]
    ended = subprocess.run(run, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    assert "OPENAI_API_KEY holds a carriage return" in ended.stderr and "Traceback" not in ended.stderr
