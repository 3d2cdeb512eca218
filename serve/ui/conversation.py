"""What the chat page asks and keeps; `serve.ui.chat_app` draws it.

Answers arrive in an event loop of their own, so that the page may be drawn again at any moment without losing one.
"""

import asyncio
import csv
import io
import json
import re
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import suppress
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

CONTEXT = re.compile(r"maximum context length is (\d+) tokens")
PROMPT_TOKENS = re.compile(r"contains (?:at least )?(\d+) input tokens")
"""What vLLM and OpenAI write where prompt and answer do not fit."""

LEAST_ANSWER = 64
"""Tokens left for an answer below which the oldest turn is left out instead."""

THINK = ("<think>", "</think>")
"""How models mark their reasoning where the endpoint has no parser for it."""


@dataclass(frozen=True)
class SamplingSettings:
    """How an answer is drawn."""

    max_tokens: int = 512
    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.0


@dataclass
class ChatReply:
    """One answer as it grows; times in seconds. `left_out`: turns of the history for which there was no room."""

    model: str
    text: str = ""
    error: str = ""
    reasoning: str = ""
    left_out: int = 0
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
        if answer is not None:  # models are trained and asked without what they thought before
            messages.append({"role": "assistant", "content": without_reasoning(answer.text)[1]})
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
    client: openai.AsyncOpenAI,
    messages: Messages,
    sampling: SamplingSettings,
    answer: ChatReply,
    say: Mapping[str, str],
) -> None:
    """Stream an answer into `answer`; what the endpoint refuses is noted there. Cancelling stops the engine too.

    Where prompt and answer do not fit the model's context, the answer is made shorter, then the oldest turns left out.
    """
    began = time.monotonic()
    penalty = sampling.repetition_penalty
    beyond_openai = {"repetition_penalty": penalty} if penalty != 1 else None  # vLLM's own, others refuse it
    max_tokens: int | None = sampling.max_tokens
    try:
        while True:
            try:
                stream = await client.chat.completions.create(
                    model=answer.model,
                    messages=messages,
                    max_tokens=max_tokens,
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    stream=True,
                    stream_options={"include_usage": True},
                    extra_body=beyond_openai,
                )
                break
            except openai.BadRequestError as error:
                smaller = fitted(str(error), messages, max_tokens)
                if smaller is None:
                    raise
                answer.left_out += smaller[0] is not messages
                messages, max_tokens = smaller
        async with stream:
            async for part in stream:
                _take(answer, part, began)
    except openai.OpenAIError as error:
        answer.error = explanation(error, say)
    finally:
        answer.seconds, answer.ended = time.monotonic() - began, True


def _take(answer: ChatReply, part: ChatCompletionChunk, began: float) -> None:
    answer.seconds = time.monotonic() - began
    delta = part.choices[0].delta if part.choices else None
    if thought := delta and (getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None)):
        answer.to_first = answer.to_first or answer.seconds
        answer.reasoning += thought
    if piece := delta and delta.content:
        answer.to_first = answer.to_first or answer.seconds
        answer.text += piece
    if part.usage is not None:
        answer.prompt_tokens, answer.completion_tokens = part.usage.prompt_tokens, part.usage.completion_tokens


def told_apart(deltas: Iterable[Any]) -> Iterator[tuple[bool, str]]:
    """The pieces of an answer as they come, each with whether it is thought.

    Thoughts are what the endpoint tells apart, else what stands between tags at the beginning.
    """
    begin, end = THINK
    held, is_begun, is_tagged, has_thought = "", False, False, False
    for delta in deltas:
        if thought := getattr(delta, "reasoning", None) or getattr(delta, "reasoning_content", None):
            has_thought = True
            yield True, thought
        held += delta.content or ""
        if not is_begun:
            head = held.lstrip()
            if not head or (begin.startswith(head) and head != begin):
                continue  # perhaps the tag's first half
            is_begun, is_tagged = True, head.startswith(begin)
            has_thought |= is_tagged
            held = head.removeprefix(begin) if is_tagged else held
        if is_tagged:
            thought, found, rest = held.partition(end)
            kept = "" if found else next((end[:n] for n in range(len(end) - 1, 0, -1) if held.endswith(end[:n])), "")
            if thought := thought.removesuffix(kept):
                yield True, thought
            is_tagged, held = not found, rest or kept
        if has_thought and not is_tagged:
            held = held.lstrip()
            has_thought = not held
        if held and not is_tagged:
            yield False, held
            held = ""
    if held:
        yield is_tagged, held


def fitted(refusal: str, messages: Messages, max_tokens: int | None) -> tuple[Messages, int | None] | None:
    """What to ask instead, after an endpoint refused messages and an answer's length as too long for the context.

    None where the refusal is about something else, or nothing is left to leave out.
    """
    limit, prompt = CONTEXT.search(refusal), PROMPT_TOKENS.search(refusal)
    if limit is None and "context_length_exceeded" not in refusal:
        return None
    if limit and prompt and max_tokens is not None:
        room = int(limit[1]) - int(prompt[1])
        if min(LEAST_ANSWER, max_tokens) <= room < max_tokens:
            return messages, room
    start = 1 if messages and messages[0]["role"] == "system" else 0
    next_turn = next((n for n in range(start + 1, len(messages)) if messages[n]["role"] == "user"), None)
    return None if next_turn is None else ([*messages[:start], *messages[next_turn:]], max_tokens)


def explanation(error: openai.OpenAIError, say: Mapping[str, str]) -> str:
    """What went wrong, in the person's language where its cause is known, with what the endpoint said."""
    body = getattr(error, "body", None)
    said = str(body["message"]) if isinstance(body, dict) and "message" in body else str(error)
    causes = (
        (openai.AuthenticationError, "wrong_key"),
        (openai.PermissionDeniedError, "not_allowed"),
        (openai.NotFoundError, "no_model"),
        (openai.RateLimitError, "too_many"),
        (openai.APITimeoutError, "timed_out"),
        (openai.APIConnectionError, "not_up"),
        (openai.InternalServerError, "unavailable"),
    )
    key = next((key for kind, key in causes if isinstance(error, kind)), None)
    return said if key is None else f"{say[key]} ({said})"


def without_reasoning(text: str) -> tuple[str, str]:
    """An answer's reasoning, where it stands in the text, and what is said.

    A template that opens the reasoning itself leaves only its end in the answer.
    """
    begin, end = THINK
    thought, found, said = text.partition(end)
    if found:
        return thought.removeprefix(begin).strip(), said.lstrip()
    if text.lstrip().startswith(begin):
        return text.lstrip().removeprefix(begin).strip(), ""
    return "", text


async def answer_turn(
    client: openai.AsyncOpenAI,
    turns: Sequence[ChatTurn],
    answers: list[ChatReply],
    system: str,
    sampling: SamplingSettings,
    say: Mapping[str, str],
) -> None:
    """Answer what was said last, every column's model at the same time."""
    asked = [*turns[:-1], ChatTurn(turns[-1].said, [])]
    each = (stream_reply(client, history(asked, n, system), sampling, answer, say) for n, answer in enumerate(answers))
    await asyncio.gather(*each)


async def answer_table(
    client: openai.AsyncOpenAI,
    rows: Iterable[TableRow],
    system: str,
    sampling: SamplingSettings,
    say: Mapping[str, str],
) -> None:
    """Fill a table's answers, a few prompts at a time."""
    places = asyncio.Semaphore(AT_ONCE)

    async def fill(prompt: str, answer: ChatReply) -> None:
        async with places:
            await stream_reply(client, history([ChatTurn(prompt, [])], 0, system), sampling, answer, say)

    await asyncio.gather(*(fill(row.prompt, answer) for row in rows for answer in row.answers))


async def discuss(
    client: openai.AsyncOpenAI,
    personas: Sequence[Persona],
    rounds: int,
    lines: list[Utterance],
    sampling: SamplingSettings,
    say: Mapping[str, str],
) -> None:
    """Let personas speak in turn, each hearing all lines so far; `lines` grows. An error ends the discussion."""
    for persona in list(personas) * rounds:
        answer, messages = ChatReply(persona.model), persona_history(persona, lines)
        lines.append(Utterance(persona.name, answer))
        await stream_reply(client, messages, sampling, answer, say)
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
    text = None
    for encoding in ("utf-8-sig", "gb18030"):  # the second holds GBK and GB2312, which Chinese spreadsheets write
        with suppress(UnicodeDecodeError):
            text = content.decode(encoding)
            break
    if text is None:
        raise DataError(f"{name}: neither UTF-8 nor GBK")
    readers: dict[str, Callable[[str, str], list[str]]] = {"csv": _csv_prompts, "jsonl": _jsonl_prompts}
    return readers.get(name.rpartition(".")[2].lower(), _line_prompts)(name, text)


def _line_prompts(_: str, text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def _csv_prompts(_: str, text: str) -> list[str]:
    rows = [row for row in csv.reader(io.StringIO(text)) if row]
    named = [n for n, title in enumerate(rows[0]) if title.strip().lower() in PROMPT_COLUMNS] if rows else []
    column = named[0] if named else 0
    cells = (row[column].strip() for row in (rows[1:] if named else rows) if len(row) > column)
    return [cell for cell in cells if cell]


def _jsonl_prompts(name: str, text: str) -> list[str]:
    prompts = []
    for number, line in enumerate(text.split("\n"), 1):
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
