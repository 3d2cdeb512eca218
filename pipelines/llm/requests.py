"""What is asked: requests by position, whoever makes them; how a try can end, and what it is filed as."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, Protocol

from pipelines.artifacts.rows import is_text
from pipelines.llm.ledger import Kind, Record
from pipelines.recipe.llm import Asking

MOST = 1000
"""Conversations that one answer may hold."""
SHOWN_VALUE = 24
"""Characters of a cell's value in a request's name; a longer one is cut and told apart by its digest."""


class MalformedError(ValueError):
    """An answer is not of the shape that was asked for."""


@dataclass(frozen=True)
class Request:
    """One answer to be asked for: its position, its cell, and the words."""

    pos: int
    cell: Mapping[str, str]
    sample: int
    messages: list[dict[str, str]]
    query: str
    key: bytes

    @property
    def name(self) -> str:
        """The request's name for people: the cell's values and the sample's number."""
        return f"{'/'.join(map(_shown, self.cell.values()))}#{self.sample}"


class Verdict(Enum):
    """What an outcome means for the run."""

    ANSWER = "answer"
    FAILURE = "failure"
    """This request has failed for good; asking again would cost again."""
    AGAIN = "again"
    """Something passing; worth another try."""
    REFUSED = "refused"
    """The endpoint is asked too fast."""
    FATAL = "fatal"
    """This endpoint will not answer anything until a person changes something."""


@dataclass(frozen=True)
class Outcome:
    """How one try ended. `reason` is the class of a failure; `text` the answer, or what the endpoint said."""

    verdict: Verdict
    reason: str = ""
    text: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    retry_after: float = 0.0


class Questions(Protocol):
    """Requests that are made one by one when they are needed; sent to every worker, so it must pickle."""

    @property
    def section(self) -> Asking:
        """What is asked, where, and what that may take."""

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
        """The positions from `start` up to `stop` that are asked, in order."""

    def request(self, pos: int) -> Request:
        """The request at `pos`."""

    def check(self, request: Request, text: str) -> None:
        """Raise MalformedError where an answer cannot be used."""


class Listed:
    """Questions that are known from the beginning: each has a cell, and what fills the template.

    `check(request, text)` raises MalformedError where an answer cannot be used.
    """

    response_format = None

    def __init__(
        self,
        section: Asking,
        section_key: str,
        template: str,
        asked: Sequence[tuple[Mapping[str, str], Mapping[str, Any]]],
        check: Callable[[Request, str], object],
    ) -> None:
        self.section, self.section_key = section, section_key
        self._template, self._asked, self._check = template, asked, check

    @property
    def size(self) -> int:
        """As many as are listed."""
        return len(self._asked)

    def positions(self, start: int = 0, stop: int | None = None) -> Iterator[int]:
        """All of them."""
        yield from range(start, self.size if stop is None else stop)

    def request(self, pos: int) -> Request:
        """One question, as one message."""
        cell, fields = self._asked[pos]
        messages = [{"role": "user", "content": self._template.format(**fields)}]
        return Request(pos, cell, 0, messages, "", key_of(self.section, messages, cell, 0))

    def check(self, request: Request, text: str) -> None:
        """Raise MalformedError where an answer cannot be used."""
        self._check(request, text)


def key_of(section: Asking, messages: list[dict[str, str]], cell: Mapping[str, str], sample: int, **more: Any) -> bytes:
    """16 bytes that the answer is filed under: model, messages, parameters, cell and sample."""
    parameters = {**section.generation.model_dump(exclude_none=True), **more}
    parts = [section.model, messages, parameters, cell, sample]
    return hashlib.sha256(json.dumps(parts, ensure_ascii=False, sort_keys=True).encode()).digest()[:16]


def checked(questions: Questions, request: Request, outcome: Outcome) -> Outcome:
    """The outcome, a failure where its answer cannot be used."""
    if outcome.verdict is Verdict.ANSWER:
        try:
            if not is_text(outcome.text):
                raise MalformedError("half a character, a lone surrogate")
            questions.check(request, outcome.text)
        except MalformedError:
            return replace(outcome, verdict=Verdict.FAILURE, reason="malformed")
    return outcome


def record_of(request: Request, outcome: Outcome, attempts: int, seconds: float) -> Record:
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
    kind = Kind.ANSWER if outcome.verdict is Verdict.ANSWER else Kind.FAILURE
    data = json.dumps(payload, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return Record(request.key, kind, data, outcome.input_tokens, outcome.output_tokens)


def _shown(value: str) -> str:
    if len(value) <= SHOWN_VALUE:
        return value
    digest = hashlib.sha256(value.encode()).hexdigest()[:8]
    return f"{' '.join(value[:SHOWN_VALUE].split())}…{digest}"
