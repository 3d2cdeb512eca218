"""Chat in the terminal with any OpenAI-compatible endpoint, or open the page that does so in a browser."""

import importlib.util
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import openai

from pipelines.direct_http import is_loopback
from pipelines.errors import InputError, StageError, nearest
from pipelines.kill_with_parent import child_environment
from serve.auth import LOCAL
from serve.ui.chat_words import words
from serve.ui.conversation import Messages, explanation, fitted, told_apart

PASSWORD = "DANLU_UI_PASSWORD"
"""Environment variable: what visitors of the page must type first."""

HELP = """\
/reset                 forget the conversation (also RESET)
/exit                  leave (also EXIT, exit, quit, 退出, Ctrl-D)
/model NAME            talk to another model; without a name, list them
/system TEXT           set the system prompt and begin anew; without a text, none
/temperature NUMBER    0 answers the same every time
/thought               what the model thought before its last answer
/save FILE             add the conversation to a JSONL file, which a recipe's ingest reads
\\ at a line's end      goes on in the next line
"""

LEAVE = ("EXIT", "/exit", "/quit", "exit", "quit", "退出")
RESET = ("RESET", "/reset")
ENGLISH = words("en")


@dataclass(frozen=True)
class ChatStart:
    """What a conversation begins with: the model, its system prompt, and sampling by OpenAI's and vLLM's names.

    `models`: the first of them that the endpoint lists; where it lists none of them, its own first.
    """

    models: tuple[str, ...] = ()
    system: str = ""
    sampling: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Conversation:
    """A model, its settings, and what was said; `left_out` turns did not fit the context when it was asked last."""

    client: openai.OpenAI
    model: str
    system: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    messages: Messages = field(default_factory=list)
    left_out: int = 0
    thought: str = ""
    """What the model thought before its last answer."""

    def answer(self, text: str) -> Iterator[str]:
        """Ask, and yield the answer piece by piece; history grows by both when the answer is complete.

        What the model thinks before is folded into a line, whether the endpoint tells it apart or it stands between
        tags, and is no part of the history: models are trained and asked without it. What was said is forgotten from
        its beginning where the model's context has no room for it.
        """
        asked: Messages = [*self.messages, {"role": "user", "content": text}]
        system: Messages = [{"role": "system", "content": self.system}] if self.system else []
        said, self.thought, self.left_out = "", "", 0
        stream, sent = self._stream(system + asked)
        is_thinking = False
        with stream:
            for is_thought, piece in told_apart(part.choices[0].delta for part in stream if part.choices):
                if is_thought and not is_thinking:
                    yield ENGLISH["thinking"]
                elif is_thinking and not is_thought:
                    yield ENGLISH["folded"].format(len(self.thought.strip()))
                is_thinking = is_thought
                if is_thought:
                    self.thought += piece
                else:
                    said += piece
                    yield piece
        if is_thinking:
            yield ENGLISH["folded"].format(len(self.thought.strip()))
        self.messages = [*sent[len(system) :], {"role": "assistant", "content": said}]

    def _stream(self, messages: Messages) -> tuple[Any, Messages]:
        """The stream of an answer, and the messages for which there was room."""
        sampling = dict(self.sampling)
        beyond_openai = {name: sampling.pop(name) for name in ("top_k", "repetition_penalty") if name in sampling}
        while True:
            try:
                stream = self.client.chat.completions.create(
                    model=self.model, messages=messages, extra_body=beyond_openai or None, stream=True, **sampling
                )
                return stream, messages
            except openai.BadRequestError as error:
                smaller = fitted(str(error), messages, sampling.get("max_tokens"))
                if smaller is None:
                    raise
                self.left_out += smaller[0] is not messages
                messages, room = smaller
                if room is not None:
                    sampling["max_tokens"] = room


def chat(
    base_url: str,
    start: ChatStart | None = None,
    api_key: str = "none",
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> None:
    """Talk to a model until /exit.

    `read` takes a prompt and returns a line, raising EOFError at the end; Ctrl-C stops an answer, not the chat.
    Raises StageError when the endpoint cannot be reached.
    """
    with suppress(ImportError):  # some Pythons are built without it
        import readline  # noqa: F401  # lines are edited and called back with the arrow keys, also Chinese ones
    start = start or ChatStart()
    client = endpoint_client(base_url, api_key)
    names = model_names(client)
    served = [name for name in start.models if name in names]
    talk = Conversation(client, (served or names)[0], start.system, dict(start.sampling))
    if start.models and not served:
        write(f"{base_url} does not serve {start.models[0]}; {nearest(start.models[0], names)}\n")
    write(f"{talk.model} at {base_url}; /help says what else there is\n")
    if talk.system:
        write(f"system prompt: {talk.system}\n")
    while True:
        try:
            text = read_lines(read)
        except (EOFError, KeyboardInterrupt):
            return
        if text in LEAVE:
            return
        if text:
            respond(talk, text, write)


def endpoint_client(base_url: str, api_key: str) -> openai.OpenAI:
    """A client that asks this machine's own addresses past every proxy."""
    http = openai.DefaultHttpxClient(trust_env=not is_loopback(base_url))
    return openai.OpenAI(base_url=base_url, api_key=api_key, max_retries=0, http_client=http)


def model_names(client: openai.OpenAI) -> list[str]:
    """The endpoint's models; raises StageError when it cannot be asked, or has none."""
    try:
        names = [model.id for model in client.models.list()]
    except openai.APIConnectionError as error:
        told = explanation(error, ENGLISH)
        raise StageError(f"{client.base_url}: {told} danlu serve RECIPE starts one") from None
    except openai.OpenAIError as error:
        raise StageError(f"{client.base_url}: {explanation(error, ENGLISH)}") from None
    if not names:
        raise StageError(f"{client.base_url}: the endpoint serves no model")
    return names


def read_lines(read: Callable[[str], str]) -> str:
    """One message: a line, and the next ones as long as a line ends with a backslash."""
    lines = [read("> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(read("… "))
    return "\n".join(lines).strip()


def respond(talk: Conversation, text: str, write: Callable[[str], None]) -> None:
    """Carry out a command, or stream the model's answer; errors are shown and leave the conversation as it was."""
    if text in RESET or text.startswith("/"):
        try:
            write(command(talk, text) + "\n")
        except StageError as error:
            write(f"(error: {error})\n")
        return
    try:
        for piece in talk.answer(text):
            write(piece)
    except KeyboardInterrupt:
        write(" (stopped)")
    except openai.OpenAIError as error:
        write(f"(error: {explanation(error, ENGLISH)})")
    if talk.left_out:
        write("\n" + ENGLISH["left_out"].format(talk.left_out))
    write("\n")


def command(talk: Conversation, text: str) -> str:
    """Change the conversation's settings; returns what to tell the person."""
    name, _, argument = text.partition(" ")
    argument = argument.strip()
    if text in RESET:
        talk.messages = []
        return "(a new conversation)"
    if name == "/save":
        return save(talk, argument)
    if name == "/thought":
        return talk.thought.strip() or "it did not think before its last answer"
    if name == "/model":
        return change_model(talk, argument)
    if name == "/system":
        talk.system, talk.messages = argument, []
        return "(a new conversation with this system prompt)" if argument else "(a new conversation without one)"
    if name == "/temperature":
        return change_temperature(talk, argument)
    return HELP if name == "/help" else f"no command {name}\n{HELP}"


def change_model(talk: Conversation, name: str) -> str:
    """Talk to another of the endpoint's models; the history goes with it."""
    names = model_names(talk.client)
    if not name:
        return "\n".join(f"{'*' if n == talk.model else ' '} {n}" for n in names)
    if name not in names:
        return f"no model {name!r}; {nearest(name, names)}"
    talk.model = name
    return f"({name})"


def change_temperature(talk: Conversation, text: str) -> str:
    """Set how freely tokens are drawn, from 0 to 2."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 2:
        return f"a temperature is a number from 0 to 2, not {text!r}"
    talk.sampling["temperature"] = value
    return f"(temperature {value:g})"


def save(talk: Conversation, name: str) -> str:
    """Add the conversation to a file as a line with `messages`, in a new file where no name is given."""
    if not talk.messages:
        return "nothing was said yet"
    file = Path(name or time.strftime("chat-%Y%m%d-%H%M%S.jsonl")).expanduser()
    system: Messages = [{"role": "system", "content": talk.system}] if talk.system else []
    try:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"messages": system + talk.messages}, ensure_ascii=False) + "\n")
    except OSError as error:
        return f"{file}: {error.strerror}"
    return f"({file}: saved)"


def page_command(base_url: str, host: str, port: int, start: ChatStart | None = None) -> list[str]:
    """The command that runs the chat page: Streamlit, which reports nothing and watches no files."""
    options = {
        "server.address": host,
        "server.port": port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "runner.magicEnabled": "false",  # or it shows strings that stand in the page's code
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",
        "theme.primaryColor": "#c2410c",
    }
    page = Path(__file__).parent / "chat_app.py"
    flags = [f"--{name}={value}" for name, value in options.items()]
    begins = json.dumps(asdict(start or ChatStart()))
    return [sys.executable, "-P", "-m", "streamlit", "run", *flags, str(page), base_url, begins]


def open_page(base_url: str, host: str, port: int, start: ChatStart | None = None) -> None:
    """Become the chat page's server until it is stopped.

    Raises InputError where Streamlit is not installed, or where others reach the page and it has no password: it asks
    the endpoint with its own key.
    """
    if host not in LOCAL and not os.environ.get(PASSWORD):
        raise InputError(f"others reach {host}: set {PASSWORD} in the environment, which visitors are then asked for")
    if importlib.util.find_spec("streamlit") is None:
        raise InputError("the chat page needs Streamlit: pip install 'danlu[ui]'; danlu chat needs nothing")
    command = page_command(base_url, host, port, start)
    os.execve(command[0], command, child_environment())
