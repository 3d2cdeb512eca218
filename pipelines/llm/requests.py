"""Chat requests by position, whoever makes them; how a try can end; and the ledger record of each."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

import numpy as np
import regex

from pipelines.artifacts.rows import is_text
from pipelines.llm.ledger import Keys, LedgerRecord, RecordKind
from pipelines.llm.reasoning import split_reasoning
from pipelines.recipe.llm import ModelRequests

Positions = np.ndarray[Any, np.dtype[np.int64]]

MAX_CONVERSATIONS = 1000
"""Conversations that one answer may hold."""
MAX_VALUE_CHARACTERS = 24
"""Characters of a cell's value in a request's name; a longer one is cut and told apart by its digest."""


_DEBRIS = regex.compile(r"\ufffd|<[|｜][\w▁ ]{1,40}[|｜]>|^\s*<tool_call>\s*\{")
"""Half a character that the endpoint replaced, control tokens of a chat template, or a tool call that came as text."""


class MalformedError(ValueError):
    """An answer is not of the shape that was asked for."""


@dataclass(frozen=True)
class ChatRequest:
    """One answer that is wanted: its position, its cell, and the messages that are sent."""

    pos: int
    cell: Mapping[str, str]
    sample: int
    messages: list[dict[str, str]]
    query: str
    """The training input that goes with the answer."""
    key: bytes
    """What the ledger files the answer under."""

    @property
    def name(self) -> str:
        """The request's name for people: the cell's values and the sample's number."""
        return f"{'/'.join(map(_shown, self.cell.values()))}#{self.sample}"


class OutcomeKind(Enum):
    """What follows from how a try ended."""

    ANSWERED = "answered"
    FAILED = "failed"
    """This request has failed for good; sending it again would cost again."""
    RETRY = "retry"
    """An error that may pass; worth another try."""
    RATE_LIMITED = "rate limited"
    """The endpoint is sent too much; worth another try later."""
    FATAL = "fatal"
    """This endpoint will not answer anything until a person changes something."""


@dataclass(frozen=True)
class Outcome:
    """How one try ended. `reason` is the class of a failure; `text` the answer, or what the endpoint said."""

    kind: OutcomeKind
    reason: str = ""
    text: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    retry_after: float = 0.0
    """Seconds that the endpoint wants to be left alone."""
    reasoning: str = ""
    """What the model thought before it answered, where the endpoint tells."""
    is_estimated: bool = False
    """Whether the tokens are estimated, since the endpoint reports none."""
    cached_tokens: int = 0
    """Of the input tokens, those that the endpoint had in its cache."""
    reasoning_tokens: int = 0
    """Of the output tokens, those of the reasoning."""


class RequestSource(Protocol):
    """Requests that are made one by one when they are needed; sent to every worker, so it must pickle."""

    @property
    def section(self) -> ModelRequests:
        """The model, its endpoints, and what the requests may take."""

    @property
    def section_key(self) -> str:
        """Where that stands in the recipe, such as `refine.judge`."""

    @property
    def size(self) -> int:
        """Positions run from 0 to `size` - 1; some may be left out."""

    @property
    def response_format(self) -> dict[str, Any] | None:
        """The parameter of that name, for all requests."""

    def positions(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """The positions from `start` up to `stop` that have a request, in order."""

    def keys(self, start: int, stop: int) -> tuple[Positions, Keys]:
        """Those positions with the keys of their requests."""

    def request(self, pos: int) -> ChatRequest:
        """The request at `pos`."""

    def check_answer(self, request: ChatRequest, text: str) -> None:
        """Raise MalformedError where an answer cannot be used."""


class RequestList:
    """Requests that are known from the beginning: each has a cell, and the fields that fill the template.

    `check_answer(request, text)` raises MalformedError where an answer cannot be used.
    """

    response_format = None

    def __init__(
        self,
        section: ModelRequests,
        section_key: str,
        template: str,
        entries: Sequence[tuple[Mapping[str, str], Mapping[str, Any]]],
        check_answer: Callable[[ChatRequest, str], object],
    ) -> None:
        self.section, self.section_key = section, section_key
        self._template, self._entries, self._check_answer = template, entries, check_answer

    @property
    def size(self) -> int:
        """As many as are listed."""
        return len(self._entries)

    def positions(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """All of them."""
        yield from range(start, self.size if stop is None else stop)

    def keys(self, start: int, stop: int) -> tuple[Positions, Keys]:
        """The positions with the keys of their requests."""
        return np.arange(start, stop), [self.request(pos).key for pos in range(start, stop)]

    def request(self, pos: int) -> ChatRequest:
        """One entry, as one message."""
        cell, fields = self._entries[pos]
        messages = [{"role": "user", "content": self._template.format(**fields)}]
        return ChatRequest(pos, cell, 0, messages, "", key_of(self.section, messages, cell, 0))

    def check_answer(self, request: ChatRequest, text: str) -> None:
        """Raise MalformedError where an answer cannot be used."""
        self._check_answer(request, text)


def key_of(
    section: ModelRequests, messages: list[dict[str, str]], cell: Mapping[str, str], sample: int, **more: Any
) -> bytes:
    """16 bytes that the answer is filed under: model, messages, parameters, cell and sample."""
    parameters = {**section.generation.model_dump(exclude_none=True), **more}
    parts = [section.model, messages, parameters, cell, sample]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).digest()[:16]


def checked(source: RequestSource, request: ChatRequest, outcome: Outcome) -> Outcome:
    """The outcome with reasoning split off its answer, a failure where its answer cannot be used."""
    if outcome.kind is OutcomeKind.ANSWERED:
        outcome = without_reasoning(outcome)
        if regex.search(r"[^\s\p{Cc}\p{Cf}]", outcome.text) is None:
            return replace(outcome, kind=OutcomeKind.FAILED, reason="empty")
        try:
            if not is_text(outcome.text) or "\0" in outcome.text:
                raise MalformedError("half a character, a lone surrogate, or NUL")
            prompt = "\n".join(turn["content"] for turn in request.messages)
            if (found := _DEBRIS.search(outcome.text)) and found[0] not in prompt:
                raise MalformedError(f"{found[0]!r}, which no model means to write")
            source.check_answer(request, outcome.text)
        except MalformedError:
            return replace(outcome, kind=OutcomeKind.FAILED, reason="malformed")
    return outcome


def without_reasoning(outcome: Outcome) -> Outcome:
    """The outcome, where reasoning stood in its text with the two told apart."""
    reasoning, text = split_reasoning(outcome.text)
    if not reasoning and text == outcome.text:
        return outcome
    return replace(outcome, text=text, reasoning="\n\n".join(filter(None, [outcome.reasoning, reasoning])))


def record_of(request: ChatRequest, outcome: Outcome, attempts: int, seconds: float) -> LedgerRecord:
    """What the ledger keeps of an outcome: an answer as it came, or a failure with its class."""
    payload = {
        "cell": dict(request.cell),
        "sample": request.sample,
        "query": request.query,
        "text": outcome.text,
        "attempts": attempts,
        "seconds": round(seconds, 3),
    }
    if outcome.reason:
        payload["reason"] = outcome.reason
    if outcome.reasoning:
        payload["reasoning"] = outcome.reasoning
    if outcome.is_estimated:
        payload["estimated"] = True
    if outcome.cached_tokens:
        payload["cached_tokens"] = outcome.cached_tokens
    if outcome.reasoning_tokens:
        payload["reasoning_tokens"] = outcome.reasoning_tokens
    kind = RecordKind.ANSWER if outcome.kind is OutcomeKind.ANSWERED else RecordKind.FAILURE
    data = json.dumps(payload, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return LedgerRecord(request.key, kind, data, outcome.input_tokens, outcome.output_tokens)


def _shown(value: str) -> str:
    if len(value) <= MAX_VALUE_CHARACTERS:
        return value
    digest = hashlib.sha256(value.encode()).hexdigest()[:8]
    return f"{' '.join(value[:MAX_VALUE_CHARACTERS].split())}…{digest}"
