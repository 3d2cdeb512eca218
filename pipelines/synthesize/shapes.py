"""The shape of an answer: how it is read, and which conversations it holds.

A shape is one entry of `SHAPES`: the JSON schema that the answer must satisfy, and a function from the value to
conversations.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.llm.json_answers import read_json
from pipelines.llm.requests import MAX_CONVERSATIONS, MalformedError
from pipelines.recipe.synthesize import AnswerShape

_AROUND_NAMES = " \t\n\u3000:：【】[]「」"
"""What models write around a speaker's name, as in a script."""
Conversation = list[dict[str, str]]
"""Turns of user and assistant in turn, from the first of a user to the last of an assistant."""


@dataclass(frozen=True)
class Shape:
    """`conversations` takes the value, the training input of the request, the answer's section, and the cell."""

    schema: dict[str, Any] | None
    conversations: Callable[[Any, str, AnswerShape, Mapping[str, str]], list[Conversation]]


def _text(value: Any, query: str, answer: AnswerShape, cell: Mapping[str, str]) -> list[Conversation]:
    return [exchange(query, str(value))]


def _json(value: Any, query: str, answer: AnswerShape, cell: Mapping[str, str]) -> list[Conversation]:
    return [exchange(query, json.dumps(value, ensure_ascii=False))]


def _pairs(value: Any, query: str, answer: AnswerShape, cell: Mapping[str, str]) -> list[Conversation]:
    return [exchange(pair["question"].strip(), pair["answer"].strip()) for pair in value]


def _dialogue(value: Any, query: str, answer: AnswerShape, cell: Mapping[str, str]) -> list[Conversation]:
    """One conversation; what one speaker says in a row is a turn, what follows the last answer is left out."""
    roles = {answer.user.format_map(cell): "user", answer.assistant.format_map(cell): "assistant"}
    turns: Conversation = []
    for said in value:
        speaker, text = said["speaker"].strip(_AROUND_NAMES), said["text"].strip()
        role = roles.get(speaker)
        if role is None:
            raise MalformedError(f"speaker {said['speaker']!r} is neither {' nor '.join(roles)}")
        text = text.removeprefix(f"{speaker}：").removeprefix(f"{speaker}:").lstrip()
        if not text:
            raise MalformedError(f"{speaker} says nothing")
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n" + text
        else:
            turns.append({"role": role, "content": text})
    while turns and turns[-1]["role"] == "user":
        turns.pop()
    if not turns or turns[0]["role"] != "user":
        raise MalformedError("the user does not speak first, or is not answered")
    return [turns]


def _list_of(first: str, second: str) -> dict[str, Any]:
    """A list of objects with two texts that are not empty."""
    text = {"type": "string", "pattern": r"\S"}
    entry = {"type": "object", "properties": {first: text, second: text}, "required": [first, second]}
    return {"type": "array", "items": entry, "minItems": 1, "maxItems": MAX_CONVERSATIONS}


SHAPES = {
    "text": Shape(None, _text),
    "json": Shape(None, _json),
    "pairs": Shape(_list_of("question", "answer"), _pairs),
    "dialogue": Shape(_list_of("speaker", "text"), _dialogue),
}


def exchange(query: str, response: str) -> Conversation:
    """One question with its answer."""
    return [{"role": "user", "content": query}, {"role": "assistant", "content": response}]


def conversations(text: str, query: str, answer: AnswerShape, cell: Mapping[str, str]) -> list[Conversation]:
    """What an answer holds; MalformedError where it is not of its shape."""
    shape = SHAPES[answer.shape]
    value = text if answer.shape == "text" else read_json(text, schema_of(answer))
    return shape.conversations(value, query, answer, cell)


def schema_of(answer: AnswerShape) -> dict[str, Any]:
    """The JSON schema of an answer that is not text."""
    schema = SHAPES[answer.shape].schema if answer.json_schema is None else answer.json_schema
    assert schema is not None  # the section requires json_schema of the one shape of JSON that has none here
    return schema


def response_format(answer: AnswerShape) -> dict[str, Any] | None:
    """The request's parameter of that name, as OpenAI defines it."""
    if answer.response_format != "json_schema":
        return {"type": answer.response_format} if answer.response_format else None
    schema = schema_of(answer)
    if schema.get("type") == "array":  # OpenAI's API takes objects only
        schema = {"type": "object", "properties": {"items": schema}, "required": ["items"]}
    return {"type": "json_schema", "json_schema": {"name": answer.shape, "schema": schema}}
