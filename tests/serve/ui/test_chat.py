"""Terminal chat against a server that answers with what it was asked."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import InputError, StageError
from serve.asgi import send_json
from serve.ui.chat import ChatStart, chat, open_page, page_command
from tests.serve.fake_engine import Serving, begin_stream, body_of, end_stream, list_models, send_delta, send_piece


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


def typed(serving: Serving, *lines: str, app: Any = echo, start: ChatStart | None = None) -> list[str]:
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

    with serving(app) as url:
        chat(f"{url}/v1", start, read=read, write=write)
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


@pytest.mark.parametrize("word", ["EXIT", "exit", "quit", "/exit", "/quit", "退出"])
def test_every_word_for_leaving_leaves(serving: Serving, word: str) -> None:
    assert typed(serving, "a", word, "never asked") == ["base None [u:a]", ""]


@pytest.mark.parametrize("word", ["RESET", "/reset"])
def test_every_word_for_beginning_anew(serving: Serving, word: str) -> None:
    assert typed(serving, "a", word, "b")[1:] == ["(a new conversation)", "base None [u:b]"]


def test_a_chat_begins_with_what_the_recipe_says(serving: Serving) -> None:
    start = ChatStart(("mine", "wishes", "base"), "be brief", {"temperature": 0.3, "max_tokens": 7})
    assert typed(serving, "a", "/temperature 1", "/reset", "b", start=start)[0::3] == [
        "wishes 0.3 [s:be brief|u:a]",
        "wishes 1.0 [s:be brief|u:b]",
    ]
    assert typed(serving, "a", start=ChatStart(("mine",))) == ["base None [u:a]"]


def test_a_conversation_is_saved_as_rows_that_a_recipe_reads(serving: Serving, tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    shown = typed(serving, f"/save {file}", "/system s", "你好", f"/save {file}", f"/save {tmp_path}/no/where.jsonl")
    assert shown[0] == "nothing was said yet"
    assert shown[3] == f"({file}: saved)"
    assert shown[4] == f"{tmp_path}/no/where.jsonl: No such file or directory"
    (row,) = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]
    assert row["messages"][1]["content"] == "你好"


THOUGHT_BESIDE: list[dict[str, str]] = [{"reasoning": "hm, "}, {"reasoning_content": "so"}, {"content": "gre"}]
THOUGHT_WITHIN: list[dict[str, str]] = [
    {"content": part} for part in (" <th", "ink>\nhm, ", "so\n</", "think>\n\n", "gre")
]


@pytest.mark.parametrize("deltas", [THOUGHT_BESIDE, THOUGHT_WITHIN])
def test_what_a_model_thinks_is_folded_and_is_no_part_of_what_is_asked_next(
    serving: Serving, deltas: list[dict[str, str]]
) -> None:
    asked: list[list[str]] = []

    async def thinking(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/models":
            await list_models(send, "base")
            return
        asked.append([message["content"] for message in json.loads(await body_of(receive))["messages"]])
        await begin_stream(send)
        for delta in [*deltas, {"content": "en"}]:
            await send_delta(send, "base", delta)
        await end_stream(send)

    shown = typed(serving, "/thought", "a", "/thought", "b", app=thinking)
    assert shown == [
        "it did not think before its last answer",
        "(thinking … 6 characters; /thought shows them)\ngreen",
        "hm, so",
        "(thinking … 6 characters; /thought shows them)\ngreen",
    ]
    assert asked == [["a"], ["a", "green", "b"]]


async def cramped(scope: Any, receive: Any, send: Any) -> None:
    """A model whose context holds ten characters of messages, and no answer longer than that leaves."""
    if scope["path"] == "/v1/models":
        await list_models(send, "base")
        return
    request = json.loads(await body_of(receive))
    prompt, most = sum(len(m["content"]) for m in request["messages"]), request.get("max_tokens") or 1
    if prompt + most > 100:
        message = (
            f"This model's maximum context length is 100 tokens. However, you requested {most} output tokens and your "
            f"prompt contains {prompt} input tokens, for a total of {prompt + most} tokens."
        )
        await send_json(send, 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}})
        return
    await begin_stream(send)
    await send_piece(send, "base", f"{len(request['messages'])} {most} " + "x" * 20)
    await end_stream(send)


def test_what_has_no_room_is_left_out_with_a_word(serving: Serving) -> None:
    shown = typed(serving, *["y" * 20] * 4, app=cramped, start=ChatStart((), "s" * 5, {"max_tokens": 40}))
    assert [text.split()[:2] for text in shown] == [["2", "40"]] * 2 + [["2", "40"]] * 2 or shown[0].startswith("2 40")
    assert "the oldest" in shown[-1]
    assert "the oldest" not in shown[0]


@pytest.mark.parametrize(
    ("status", "cause"), [(401, "The key is wrong"), (404, "There is no such model"), (503, "cannot answer")]
)
def test_errors_name_their_cause_and_leave_the_conversation(serving: Serving, status: int, cause: str) -> None:
    async def refusing(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/v1/models":
            await list_models(send, "base")
        else:
            await send_json(send, status, {"error": {"message": "said so", "type": "x", "code": "x"}})

    shown = typed(serving, "a", "/exit", app=refusing)
    assert cause in shown[0] and "said so" in shown[0]


def test_an_endpoint_with_another_key_is_not_called_down(serving: Serving) -> None:
    async def locked(scope: Any, receive: Any, send: Any) -> None:
        await send_json(send, 401, {"error": {"message": "no", "type": "x", "code": "invalid_api_key"}})

    with pytest.raises(StageError, match="The key is wrong: check OPENAI_API_KEY") as told:
        typed(serving, "a", app=locked)
    assert "danlu serve" not in str(told.value)


def test_a_proxy_is_not_asked_for_this_machine(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert typed(serving, "a") == ["base None [u:a]"]


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.7", "::"])
def test_a_page_that_others_reach_needs_a_password(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DANLU_UI_PASSWORD", raising=False)
    with pytest.raises(InputError, match=f"others reach {host}: set DANLU_UI_PASSWORD"):
        open_page("http://127.0.0.1:8000/v1", host, 8501)


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
    assert command[-2] == "http://127.0.0.1:8000/v1"
