"""Chat in the terminal with any OpenAI-compatible endpoint, or open the page that does so in a browser."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import openai
from openai.types.chat import ChatCompletionMessageParam

from pipelines.direct_http import is_loopback
from pipelines.errors import InputError, StageError, nearest
from pipelines.kill_with_parent import child_environment

HELP = """\
RESET                  forget the conversation
EXIT                   leave (also Ctrl-D)
/model NAME            talk to another model; without a name, list them
/system TEXT           set the system prompt and begin anew; without a text, none
/temperature NUMBER    0 answers the same every time
\\ at a line's end      goes on in the next line
"""


@dataclass
class Conversation:
    """A model, its settings, and what was said."""

    client: openai.OpenAI
    model: str
    system: str = ""
    temperature: float | None = None
    messages: list[ChatCompletionMessageParam] = field(default_factory=list)

    def answer(self, text: str) -> Iterator[str]:
        """Ask, and yield the answer piece by piece; history grows by both when the answer is complete."""
        asked: list[ChatCompletionMessageParam] = [*self.messages, {"role": "user", "content": text}]
        system: list[ChatCompletionMessageParam] = [{"role": "system", "content": self.system}] if self.system else []
        said = ""
        temperature = openai.omit if self.temperature is None else self.temperature
        with self.client.chat.completions.create(
            model=self.model, messages=system + asked, temperature=temperature, stream=True
        ) as stream:
            for part in stream:
                if part.choices and (piece := part.choices[0].delta.content):
                    said += piece
                    yield piece
        self.messages = [*asked, {"role": "assistant", "content": said}]


def chat(
    base_url: str,
    model: str | None = None,
    api_key: str = "none",
    read: Callable[[str], str] = input,
    write: Callable[[str], None] = lambda text: print(text, end="", flush=True),
) -> None:
    """Talk to a model until EXIT; without a model, the first that the endpoint lists.

    `read` takes a prompt and returns a line, raising EOFError at the end; Ctrl-C stops an answer, not the chat.
    Raises StageError when the endpoint cannot be reached.
    """
    with suppress(ImportError):  # some Pythons are built without it
        import readline  # noqa: F401  # lines are edited and called back with the arrow keys, also Chinese ones
    client = endpoint_client(base_url, api_key)
    names = model_names(client)
    talk = Conversation(client, model or names[0])
    write(f"{talk.model} at {base_url}; /help says what else there is\n")
    while True:
        try:
            text = read_lines(read)
        except (EOFError, KeyboardInterrupt):
            return
        if text == "EXIT":
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
    except openai.OpenAIError as error:
        raise StageError(f"{client.base_url}: {error}; is the endpoint up? danlu serve RECIPE starts one") from None
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
    if text == "RESET" or text.startswith("/"):
        write(command(talk, text) + "\n")
        return
    try:
        for piece in talk.answer(text):
            write(piece)
    except KeyboardInterrupt:
        write(" (stopped)")
    except openai.OpenAIError as error:
        write(f"(error: {error})")
    write("\n")


def command(talk: Conversation, text: str) -> str:
    """Change the conversation's settings; returns what to tell the person."""
    name, _, argument = text.partition(" ")
    argument = argument.strip()
    if name == "RESET":
        talk.messages = []
        return "(a new conversation)"
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
    talk.temperature = value
    return f"(temperature {value:g})"


def page_command(base_url: str, host: str, port: int) -> list[str]:
    """The command that runs the chat page: Streamlit, which reports nothing and watches no files."""
    options = {
        "server.address": host,
        "server.port": port,
        "server.headless": "true",
        "server.fileWatcherType": "none",
        "browser.gatherUsageStats": "false",
        "client.toolbarMode": "viewer",
        "theme.primaryColor": "#c2410c",
    }
    page = Path(__file__).parent / "chat_app.py"
    flags = [f"--{name}={value}" for name, value in options.items()]
    return [sys.executable, "-P", "-m", "streamlit", "run", *flags, str(page), base_url]


def open_page(base_url: str, host: str, port: int) -> None:
    """Become the chat page's server until it is stopped; raises InputError where Streamlit is not installed."""
    if importlib.util.find_spec("streamlit") is None:
        raise InputError("the chat page needs Streamlit: pip install 'danlu[ui]'; danlu chat needs nothing")
    command = page_command(base_url, host, port)
    os.execve(command[0], command, child_environment())
