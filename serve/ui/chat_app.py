"""The chat page: `danlu ui` runs it with Streamlit, the endpoint's address as its argument.

What is asked and kept stands in `serve.ui.conversation`; here it is drawn. Streamlit runs `main` anew at every click.
"""

import asyncio
import hmac
import html
import json
import os
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import openai
import streamlit as st
from PIL import Image
from streamlit.delta_generator import DeltaGenerator

from pipelines.direct_http import is_loopback
from pipelines.errors import DataError
from pipelines.recipe.keys import endpoint_key
from serve.ui import chat
from serve.ui.chat_words import LANGUAGES, words
from serve.ui.conversation import (
    BackgroundTask,
    ChatReply,
    ChatTurn,
    Persona,
    SamplingSettings,
    TableRow,
    Utterance,
    answer_table,
    answer_turn,
    as_csv,
    as_jsonl,
    background_loop,
    discuss,
    explanation,
    prompts_in,
    table_of,
    without_reasoning,
)

REDRAW_SECONDS = 0.05
LINE_PIXELS = 27
LOGIN_SECONDS = 1.0
"""How long a wrong password takes."""

ICON = Image.new("RGB", (32, 32), (194, 65, 12))
"""The page's icon, drawn here: icons by name are fetched from another host."""
MODES = ("chat", "table", "group")
FACES = tuple(f":material/face{n}:" for n in ("", "_2", "_3", "_4", "_5", "_6"))
STYLE = """<style>
[data-testid="stMainBlockContainer"] {padding-top: 4rem; padding-bottom: 1rem}
[data-testid="stSidebarHeader"] {height: 2.5rem}
[data-testid="stChatMessage"] {overflow-wrap: anywhere}
.said {white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.6}
[data-testid="stStatusWidget"] {display: none} /* it has a stop button of its own, which stops only the drawing */
@media (max-width: 640px) {[data-testid="stMainBlockContainer"] {padding-left: .8rem; padding-right: .8rem}}
</style>"""


@dataclass(frozen=True)
class Page:
    """What all modes need: where to ask, what was set, and the words of the language."""

    client: openai.AsyncOpenAI
    models: list[str]
    model: str
    second: str | None
    system: str
    sampling: SamplingSettings
    words: dict[str, str]


def main(base_url: str, start_with: chat.ChatStart) -> None:
    """Draw the page once; settings begin with `start_with`."""
    st.set_page_config(page_title="Danlu 丹炉", page_icon=ICON, layout="wide")
    st.html(STYLE)
    say = words(LANGUAGES[st.session_state.get("language", list(LANGUAGES)[0 if is_chinese() else 1])])
    if not is_logged_in(say):
        return
    keep_settings()
    if not (models := known_models(base_url, say)):
        st.button(say["retry"])
        return
    page = settings(models, endpoint_client(base_url), start_with)
    {"chat": chat_mode, "table": table_mode, "group": group_mode}[st.session_state.mode](page)


def is_chinese() -> bool:
    """Whether the visitor's browser asks for Chinese."""
    return (st.context.locale or "").startswith("zh")


def is_logged_in(say: dict[str, str]) -> bool:
    """Whether the visitor has given the password, where there is one; asks for it otherwise."""
    password = os.environ.get(chat.PASSWORD)
    if not password or st.session_state.get("logged_in"):
        return True
    with st.form("login"):
        given = st.text_input(say["password"], type="password")
        if st.form_submit_button(say["log_in"]):
            if hmac.compare_digest(given.encode(), password.encode()):
                st.session_state.logged_in = True
                st.rerun()
            time.sleep(LOGIN_SECONDS)
            st.error(say["wrong_password"])
    return False


def known_models(base_url: str, say: dict[str, str]) -> list[str]:
    """The endpoint's models; while it cannot be asked, those it had, under an error: what was said stays in sight."""
    try:
        listed = listed_models(base_url)
    except openai.OpenAIError as error:
        st.error(plain(f"{base_url}: {explanation(error, say)}"))
    else:
        if listed:
            st.session_state.models = listed
        else:
            st.error(f"{base_url}: {say['none_served']}")
    models: list[str] = st.session_state.get("models", [])
    return models


def keep_settings() -> None:
    """Hold on to the settings of modes that are not shown, which Streamlit would forget."""
    for key, value in st.session_state.items():
        mode, _, name = str(key).partition("_")
        if name and mode in MODES and mode != st.session_state.get("mode"):
            st.session_state[key] = value  # not those that are shown: what is being typed would be lost


@st.cache_resource
def answers_loop() -> asyncio.AbstractEventLoop:
    """The event loop of all visitors' requests."""
    return background_loop()


@st.cache_resource
def endpoint_client(base_url: str) -> openai.AsyncOpenAI:
    """The client; the key, if one is needed, comes from the environment and is never shown."""
    http = openai.DefaultAsyncHttpxClient(trust_env=not is_loopback(base_url))
    return openai.AsyncOpenAI(base_url=base_url, api_key=endpoint_key(), max_retries=0, http_client=http)


@st.cache_data(ttl=3, show_spinner=False)
def listed_models(base_url: str) -> list[str]:
    """The endpoint's models, asked again after a few seconds: adapters are published while the page is open."""
    client = chat.endpoint_client(base_url, endpoint_key()).with_options(timeout=10)
    return [model.id for model in client.models.list()]


def settings(models: list[str], client: openai.AsyncOpenAI, start_with: chat.ChatStart) -> Page:
    """The sidebar."""
    with st.sidebar:
        language = st.radio(
            "语言 / Language",
            LANGUAGES,
            index=0 if is_chinese() else 1,
            horizontal=True,
            key="language",
            label_visibility="collapsed",
        )
        say = words(LANGUAGES[language])
        mode = st.radio(
            say["chat"],
            MODES,
            format_func=say.__getitem__,
            horizontal=True,
            key="mode",
            on_change=stop,
            label_visibility="collapsed",
        )
        model, second = chat_models(models, say, start_with) if mode == "chat" else (models[0], None)
        st.session_state.setdefault("system", start_with.system)
        system = st.text_area(
            say["system"], placeholder=say["system_hint"], key="system", disabled=mode == "group", height=90
        )
        sampling = sampling_settings(say, start_with.sampling)
        st.button(say["clear"], on_click=clear, icon=":material/delete:", width="stretch")
    return Page(client, models, model, second, system, sampling, say)


def chat_models(models: list[str], say: dict[str, str], start_with: chat.ChatStart) -> tuple[str, str | None]:
    """The model to talk to, and the one beside it."""
    best = next((models.index(name) for name in start_with.models if name in models), 0)
    model = st.selectbox(say["model"], models, best, key="chat_model")
    beside = [None, *models]
    return model, st.selectbox(say["second"], beside, format_func=lambda m: m or say["nobody"], key="chat_second")


def sampling_settings(say: dict[str, str], given: Mapping[str, Any]) -> SamplingSettings:
    """The sliders, which begin where the recipe says, within what they show."""
    usual = SamplingSettings(
        max_tokens=min(int(given.get("max_tokens", 512)), 4096),
        temperature=float(given.get("temperature", 0.7)),
        top_p=max(float(given.get("top_p", 0.9)), 0.05),
        repetition_penalty=min(max(float(given.get("repetition_penalty", 1.0)), 1.0), 2.0),
    )
    return SamplingSettings(
        max_tokens=st.slider(say["max_tokens"], 1, 4096, usual.max_tokens, key="max_tokens"),
        temperature=st.slider(say["temperature"], 0.0, 2.0, usual.temperature, 0.05, key="temperature"),
        top_p=st.slider(say["top_p"], 0.05, 1.0, usual.top_p, 0.05, key="top_p"),
        repetition_penalty=st.slider(
            say["repetition_penalty"], 1.0, 2.0, usual.repetition_penalty, 0.05, key="repetition_penalty"
        ),
    )


def start(work: Coroutine[Any, Any, None]) -> None:
    """Begin work in the background, in place of what goes on."""
    stop()
    st.session_state.task = BackgroundTask(answers_loop(), work)


def stop() -> None:
    """End what goes on; what has arrived stays."""
    if "task" in st.session_state:
        st.session_state.task.stop()


def clear() -> None:
    """Forget what was said in every mode."""
    stop()
    for kept in ("turns", "rows", "lines"):
        st.session_state.pop(kept, None)


def is_running() -> bool:
    """Whether answers are still arriving."""
    return "task" in st.session_state and st.session_state.task.running()


def follow(answers: Callable[[], list[ChatReply]], draw: Callable[[], None], say: dict[str, str]) -> None:
    """Draw what changes, above a stop button, until the work ends; then the page is drawn as a whole."""
    st.button(say["stop"], on_click=stop, icon=":material/stop_circle:")
    drawn: list[tuple[int, bool]] = []
    while is_running():
        now = [(len(answer.text), answer.ended) for answer in answers()]
        if now != drawn:
            draw()
            drawn = now
        time.sleep(REDRAW_SECONDS)
    st.rerun()


def draw_answer(spot: DeltaGenerator, answer: ChatReply, say: dict[str, str], growing: bool) -> None:
    """An answer with its numbers below it; a cursor stands at the end of one that grows."""
    growing = growing and not answer.ended
    with spot.container():
        thought, said = without_reasoning(answer.text)
        if reasoning := answer.reasoning or thought:
            with st.expander(say["reasoning"], expanded=False):
                show_text(reasoning)
        show_text(said + (" ▌" if growing else ""))
        if answer.left_out:
            st.caption(say["left_out"].format(answer.left_out))
        if answer.error:
            st.error(plain(answer.error))
        if answer.model and not growing:
            st.caption(numbers(answer, say))


def show_text(text: str) -> None:
    """What was said, as it was said: nothing in it is markup, and no picture is fetched."""
    st.html(f'<div class="said">{html.escape(text)}</div>')


def numbers(answer: ChatReply, say: dict[str, str]) -> str:
    """Model, tokens and times of an answer, as far as they are known."""
    parts = [f"**{plain(answer.model)}**"]
    if answer.completion_tokens:
        parts.append(say["tokens"].format(answer.completion_tokens))
    if answer.to_first:
        parts += [say["to_first"].format(answer.to_first), say["seconds"].format(answer.seconds)]
    return " · ".join(parts)


def plain(text: str) -> str:
    """A name with its Markdown characters taken literally."""
    return "".join(f"\\{mark}" if mark in r"\`*_{}[]()#+-.!|~:$<>" else mark for mark in text)


def chat_mode(page: Page) -> None:
    """A conversation with one model, or with two side by side."""
    turns: list[ChatTurn] = st.session_state.setdefault("turns", [])
    if said := st.chat_input(page.words["say"]):
        turns.append(ChatTurn(said, []))
        answer_last(page, turns)
    if not turns:
        st.info(page.words["welcome"], icon=":material/forum:")
        return
    for turn in turns[:-1]:
        draw_turn(turn, page.words, growing=False)
    running, answers = is_running(), turns[-1].answers
    spots = draw_turn(turns[-1], page.words, running)
    if running:
        follow(lambda: answers, lambda: redraw(spots, answers, page.words), page.words)
    if st.button(page.words["regenerate"], icon=":material/refresh:"):
        answer_last(page, turns)
        st.rerun()


def answer_last(page: Page, turns: list[ChatTurn]) -> None:
    """Ask about what was said last, with the settings as they are now."""
    turns[-1].answers = [ChatReply(model) for model in (page.model, page.second) if model]
    start(answer_turn(page.client, turns, turns[-1].answers, page.system, page.sampling, page.words))


def draw_turn(turn: ChatTurn, say: dict[str, str], growing: bool) -> list[DeltaGenerator]:
    """What was said and the answers in columns, which a phone stacks; returns the places of the answers."""
    with st.chat_message("user"):
        show_text(turn.said)
    spots = []
    for column, answer in zip(st.columns(len(turn.answers)), turn.answers, strict=True):
        with column, st.chat_message("assistant"):
            spots.append(st.empty())
            draw_answer(spots[-1], answer, say, growing)
    return spots


def redraw(spots: Sequence[DeltaGenerator], answers: Sequence[ChatReply], say: dict[str, str]) -> None:
    """Show how far answers have come."""
    for spot, answer in zip(spots, answers, strict=True):
        draw_answer(spot, answer, say, growing=True)


def table_mode(page: Page) -> None:
    """A list of prompts, each answered by every chosen model, to be downloaded."""
    say = page.words
    text = st.text_area(say["prompts"], height=160, key="table_prompts")
    file = st.file_uploader(say["file"], type=["txt", "csv", "jsonl"])
    chosen = st.multiselect(say["models"], page.models, default=page.models[:1], key="table_models")
    try:
        prompts = prompts_in("", text.encode()) + (prompts_in(file.name, file.getvalue()) if file else [])
    except DataError as error:
        st.error(plain(str(error)))
        return
    if st.button(say["run"], type="primary", disabled=not (prompts and chosen), icon=":material/play_arrow:"):
        st.session_state.rows = [TableRow(prompt, [ChatReply(model) for model in chosen]) for prompt in prompts]
        start(answer_table(page.client, st.session_state.rows, page.system, page.sampling, page.words))
    if rows := st.session_state.get("rows"):
        draw_table(rows, say)


def draw_table(rows: list[TableRow], say: dict[str, str]) -> None:
    """The answers so far, and when all are there, the downloads."""
    spot = st.empty()
    answers = [answer for row in rows for answer in row.answers]
    widths: dict[str, Any] = {"prompt": 140, **{answer.model: 300 for answer in rows[0].answers}}
    columns = {name: st.column_config.Column(width=width) for name, width in widths.items()}

    def draw() -> None:
        done = sum(answer.ended for answer in answers)
        with spot.container():
            st.progress(done / len(answers), say["done_of"].format(done, len(answers)))
            st.dataframe(table_of(rows), hide_index=True, row_height=3 * LINE_PIXELS, column_config=columns)

    if is_running():
        follow(lambda: answers, draw, say)
    draw()
    left, right = st.columns(2)
    table = table_of(rows)
    left.download_button(say["csv"], as_csv(table), "answers.csv", "text/csv", width="stretch")
    right.download_button(say["jsonl"], as_jsonl(table), "answers.jsonl", "application/jsonl", width="stretch")


def group_mode(page: Page) -> None:
    """Personas who answer each other in turn; a person gives the topic and may join in."""
    say = page.words
    lines: list[Utterance] = st.session_state.setdefault("lines", [])
    with st.expander(say["who"], expanded=not lines, icon=":material/groups:"):
        personas, rounds = group_settings(page)
    names = [persona.name for persona in personas]
    if len({*names, say["you"]}) <= len(names):
        st.error(say["same_names"].format(say["you"]))
        return
    if said := st.chat_input(say["topic"]):
        lines.append(Utterance(say["you"], ChatReply("", said)))
        start(discuss(page.client, personas, rounds, lines, page.sampling, page.words))
    if not lines:
        st.info(say["group_welcome"], icon=":material/groups:")
    spots: list[DeltaGenerator] = []
    running = is_running()
    draw_lines(spots, lines, names, say, growing=running)
    if running:
        below = st.container()

        def draw() -> None:
            with below:
                draw_lines(spots, lines, names, say, growing=True)

        follow(lambda: [line.answer for line in list(lines)], draw, say)


def group_settings(page: Page) -> tuple[list[Persona], int]:
    """Who takes part, and how often each speaks."""
    say = page.words
    left, right = st.columns(2)
    count = int(left.number_input(say["personas"], 2, len(FACES), 2, key="group_count"))
    rounds = int(right.number_input(say["rounds"], 1, 20, 2, key="group_rounds"))
    personas = []
    for n in range(count):
        name, model, system = st.columns([2, 3, 5])
        usual = page.models[n % len(page.models)]
        personas.append(
            Persona(
                name.text_input(say["name"], say["persona"].format(n + 1), key=f"group_name_{n}"),
                model.selectbox(say["model"], page.models, page.models.index(usual), key=f"group_model_{n}"),
                system.text_input(say["persona_system"], key=f"group_system_{n}"),
            )
        )
    return personas, rounds


def draw_lines(
    spots: list[DeltaGenerator], lines: list[Utterance], names: list[str], say: dict[str, str], growing: bool
) -> None:
    """The discussion so far; new lines get places of their own, and the last one grows."""
    for n, line in enumerate(list(lines)):
        last = n == len(lines) - 1
        if n < len(spots):
            if n >= len(spots) - 2:
                draw_line(spots[n], line, say, growing and last)
            continue
        face = FACES[names.index(line.speaker)] if line.speaker in names else "user"
        with st.chat_message(line.speaker, avatar=face):
            spots.append(st.empty())
        draw_line(spots[n], line, say, growing and last)


def draw_line(spot: DeltaGenerator, line: Utterance, say: dict[str, str], growing: bool) -> None:
    """One utterance under its speaker's name."""
    with spot.container():
        st.html(f"<b>{html.escape(line.speaker)}</b>")
        draw_answer(st.empty(), line.answer, say, growing and bool(line.answer.model))


if __name__ == "__main__":
    main(sys.argv[1], chat.ChatStart(**json.loads(sys.argv[2])))
