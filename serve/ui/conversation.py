"""What the chat page asks and keeps; `serve.ui.chat_app` draws it.

Answers arrive in an event loop of their own, so that the page may be drawn again at any moment without losing one.
"""

import asyncio
import csv
import io
import json
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from typing import Any

import openai
from openai.types.chat import ChatCompletionChunk, ChatCompletionMessageParam

from pipelines.errors import DataError

AT_ONCE = 8
"""Prompts of a table that are asked together."""

UNWATCHED_SECONDS = 10.0
"""After so long without a page that looks, work ends: a closed tab must not keep an engine busy."""

PROMPT_COLUMNS = ("prompt", "query", "instruction", "question")

Messages = list[ChatCompletionMessageParam]


@dataclass(frozen=True)
class SamplingSettings:
    """How an answer is drawn."""

    max_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.0


@dataclass
class ChatReply:
    """One answer as it grows; times in seconds."""

    model: str
    text: str = ""
    error: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    to_first: float = 0.0
    seconds: float = 0.0
    ended: bool = False


@dataclass
class ChatTurn:
    """What a person said, and what each column's model answered."""

    said: str
    answers: list[ChatReply]


@dataclass(frozen=True)
class Persona:
    """One who takes part in a group: a name, the model that speaks, and who it is told to be."""

    name: str
    model: str
    system: str = ""


@dataclass
class Utterance:
    """One utterance in a group; a person's has no model."""

    speaker: str
    answer: ChatReply


@dataclass
class TableRow:
    """A prompt of the table with each model's answer."""

    prompt: str
    answers: list[ChatReply] = field(default_factory=list)


def history(turns: Iterable[ChatTurn], column: int, system: str) -> Messages:
    """The messages that a column's model sees; a turn without an answer ends them, being the one asked about."""
    messages: Messages = [{"role": "system", "content": system}] if system.strip() else []
    for turn in turns:
        answer = turn.answers[min(column, len(turn.answers) - 1)] if turn.answers else None
        if answer is not None and not answer.text:
            continue  # refused or stopped before a word: the model would take silence for its style
        messages.append({"role": "user", "content": turn.said})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer.text})
    return messages


def persona_history(persona: Persona, lines: Iterable[Utterance]) -> Messages:
    """A group's lines as one of them hears it: its own as the assistant's, all others by name, joined to one turn."""
    messages: Messages = [{"role": "system", "content": persona.system}] if persona.system.strip() else []
    waiting: list[str] = []
    for line in lines:
        if line.speaker != persona.name:
            waiting += [f"{line.speaker}: {line.answer.text}"] if line.answer.text else []
            continue
        if waiting:
            messages.append({"role": "user", "content": "\n".join(waiting)})
        messages.append({"role": "assistant", "content": line.answer.text})
        waiting = []
    if waiting:
        messages.append({"role": "user", "content": "\n".join(waiting)})
    return messages


async def stream_reply(
    client: openai.AsyncOpenAI, messages: Messages, sampling: SamplingSettings, answer: ChatReply
) -> None:
    """Stream an answer into `answer`; what the endpoint refuses is noted there. Cancelling stops the engine too."""
    began = time.monotonic()
    penalty = sampling.repetition_penalty
    try:
        stream = await client.chat.completions.create(
            model=answer.model,
            messages=messages,
            max_tokens=sampling.max_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"repetition_penalty": penalty} if penalty != 1 else None,  # vLLM's own, others refuse it
        )
        async with stream:
            async for part in stream:
                _take(answer, part, began)
    except openai.OpenAIError as error:
        answer.error = explanation(error)
    finally:
        answer.seconds, answer.ended = time.monotonic() - began, True


def _take(answer: ChatReply, part: ChatCompletionChunk, began: float) -> None:
    answer.seconds = time.monotonic() - began
    if part.choices and (piece := part.choices[0].delta.content):
        answer.to_first = answer.to_first or answer.seconds
        answer.text += piece
    if part.usage is not None:
        answer.prompt_tokens, answer.completion_tokens = part.usage.prompt_tokens, part.usage.completion_tokens


def explanation(error: openai.OpenAIError) -> str:
    """What the endpoint said, without the client's wrapping."""
    body = getattr(error, "body", None)
    return str(body["message"]) if isinstance(body, dict) and "message" in body else str(error)


async def answer_turn(
    client: openai.AsyncOpenAI,
    turns: Sequence[ChatTurn],
    answers: list[ChatReply],
    system: str,
    sampling: SamplingSettings,
) -> None:
    """Answer what was said last, every column's model at the same time."""
    asked = [*turns[:-1], ChatTurn(turns[-1].said, [])]
    each = (stream_reply(client, history(asked, n, system), sampling, answer) for n, answer in enumerate(answers))
    await asyncio.gather(*each)


async def answer_table(
    client: openai.AsyncOpenAI, rows: Iterable[TableRow], system: str, sampling: SamplingSettings
) -> None:
    """Fill a table's answers, a few prompts at a time."""
    places = asyncio.Semaphore(AT_ONCE)

    async def fill(prompt: str, answer: ChatReply) -> None:
        async with places:
            await stream_reply(client, history([ChatTurn(prompt, [])], 0, system), sampling, answer)

    await asyncio.gather(*(fill(row.prompt, answer) for row in rows for answer in row.answers))


async def discuss(
    client: openai.AsyncOpenAI,
    personas: Sequence[Persona],
    rounds: int,
    lines: list[Utterance],
    sampling: SamplingSettings,
) -> None:
    """Let personas speak in turn, each hearing all lines so far; `lines` grows. An error ends the discussion."""
    for persona in list(personas) * rounds:
        answer, messages = ChatReply(persona.model), persona_history(persona, lines)
        lines.append(Utterance(persona.name, answer))
        await stream_reply(client, messages, sampling, answer)
        if answer.error:
            return


class BackgroundTask:
    """Work in the event loop that goes on only while a page looks at it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
        self._watched = time.monotonic()
        self._future = asyncio.run_coroutine_threadsafe(self._while_watched(work), loop)

    def running(self) -> bool:
        """Whether it goes on; asking is looking. A bug in the work is raised here."""
        self._watched = time.monotonic()
        if not self._future.done():
            return True
        try:
            self._future.result()
        except CancelledError:
            return False
        return False

    def stop(self) -> None:
        """End it where it stands; what has arrived stays."""
        self._future.cancel()

    async def _while_watched(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        try:
            while not (await asyncio.wait({task}, timeout=1))[0]:
                if time.monotonic() - self._watched > UNWATCHED_SECONDS:
                    return
            task.result()
        finally:
            task.cancel()


def background_loop() -> asyncio.AbstractEventLoop:
    """An event loop that runs in a thread of its own until the process ends."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="answers", daemon=True).start()
    return loop


def prompts_in(name: str, content: bytes) -> list[str]:
    """The prompts of a file: a line each, or the column `prompt`, `query`, … of a CSV (its first) or JSONL file.

    Raises DataError, with the line, for what cannot be read.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: not UTF-8: {error}") from None
    readers: dict[str, Callable[[str, str], list[str]]] = {"csv": _csv_prompts, "jsonl": _jsonl_prompts}
    return readers.get(name.rpartition(".")[2].lower(), _line_prompts)(name, text)


def _line_prompts(_: str, text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _csv_prompts(_: str, text: str) -> list[str]:
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    named = [n for n, title in enumerate(rows[0]) if title.strip().lower() in PROMPT_COLUMNS] if rows else []
    column = named[0] if named else 0
    cells = (row[column].strip() for row in (rows[1:] if named else rows) if len(row) > column)
    return [cell for cell in cells if cell]


def _jsonl_prompts(name: str, text: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{name}, line {number}: not JSON: {error}") from None
        found = [row[key] for key in PROMPT_COLUMNS if isinstance(row, dict) and isinstance(row.get(key), str)]
        if not found:
            raise DataError(f"{name}, line {number}: none of {', '.join(PROMPT_COLUMNS)} in it")
        prompts.append(found[0])
    return prompts


def table_of(rows: Iterable[TableRow]) -> list[dict[str, Any]]:
    """A row per prompt with, for each model, its answer (or its error), tokens and seconds."""
    table = []
    for row in rows:
        columns: dict[str, Any] = {"prompt": row.prompt}
        for answer in row.answers:
            columns[answer.model] = answer.text or answer.error
            columns[f"{answer.model} tokens"] = answer.completion_tokens
            columns[f"{answer.model} s"] = round(answer.seconds, 2)
        table.append(columns)
    return table


def as_csv(table: list[dict[str, Any]]) -> bytes:
    """The table for spreadsheets, which know Chinese by its byte order mark; cells never begin a formula."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(table[0])
    writer.writerows([_plain(value) for value in row.values()] for row in table)
    return text.getvalue().encode("utf-8-sig")


def _plain(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t")) else value


def as_jsonl(table: list[dict[str, Any]]) -> bytes:
    """The table as one JSON object per line."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table).encode()
