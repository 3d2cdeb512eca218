"""Terminal chat against a server that answers with what it was asked."""

import json
from typing import Any

import pytest

from pipelines.errors import InputError, StageError
from serve.ui.chat import chat, open_page, page_command
from tests.serve.fake_engine import Serving, begin_stream, body_of, end_stream, list_models, send_piece


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Two models; an answer repeats model, temperature and the contents of all messages, in two pieces."""
    if scope["path"] == "/v1/models":
        await list_models(send, "base", "wishes")
        return
    request = json.loads(await body_of(receive))
    contents = "|".join(f"{m['role'][0]}:{m['content']}" for m in request["messages"])
    await begin_stream(send)
    for piece in (f"{request['model']} {request.get('temperature')} ", f"[{contents}]"):
        await send_piece(send, request["model"], piece)
    await end_stream(send)


def typed(serving: Serving, *lines: str) -> list[str]:
    """What is shown after each line that a person types."""
    shown: list[str] = []
    rest = iter(lines)

    def read(prompt: str) -> str:
        line = next(rest, None)
        if line is None:
            raise EOFError
        if prompt == "> ":
            shown.append("")
        return line

    def write(text: str) -> None:
        if shown:
            shown[-1] += text

    with serving(echo) as url:
        chat(f"{url}/v1", read=read, write=write)
    return [text.strip() for text in shown]


def test_a_conversation_remembers_resets_and_leaves(serving: Serving) -> None:
    shown = typed(serving, "你好", "again", "RESET", "new", "EXIT", "never asked")
    assert shown == [
        "base None [u:你好]",
        "base None [u:你好|a:base None [u:你好]|u:again]",
        "(a new conversation)",
        "base None [u:new]",
        "",
    ]


def test_settings_change_what_is_asked(serving: Serving) -> None:
    shown = typed(serving, "/model wishes", "/system 你是诗人", "/temperature 0.5", "a\\", "b")
    assert shown[-1] == "wishes 0.5 [s:你是诗人|u:a\nb]"


def test_wrong_commands_are_explained_and_change_nothing(serving: Serving) -> None:
    shown = typed(serving, "/model wish", "/temperature hot", "/temperature 3", "/what", "/model", "x")
    assert shown[0] == "no model 'wish'; did you mean 'wishes'?"
    assert shown[1] == "a temperature is a number from 0 to 2, not 'hot'"
    assert shown[2] == "a temperature is a number from 0 to 2, not '3'"
    assert shown[3].startswith("no command /what")
    assert shown[4:] == ["* base\n  wishes", "base None [u:x]"]


def test_an_endpoint_that_is_not_there_is_a_plain_error() -> None:
    with pytest.raises(StageError, match="is the endpoint up"):
        chat("http://127.0.0.1:9/v1")


def test_without_streamlit_the_page_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'danlu\[ui\]'"):
        open_page("http://127.0.0.1:8000/v1", "127.0.0.1", 8501)


def test_the_page_listens_where_it_is_told_and_reports_nothing() -> None:
    command = page_command("http://127.0.0.1:8000/v1", "127.0.0.1", 8501)
    assert {"--server.address=127.0.0.1", "--server.port=8501", "--browser.gatherUsageStats=false"} <= set(command)
    assert command[-1] == "http://127.0.0.1:8000/v1"
