"""Answers in JSON: mended where they are nearly valid (json-repair), then held to a schema."""

import json
from collections.abc import Iterator
from typing import Any

from pipelines.artifacts.rows import is_text
from pipelines.llm.requests import MalformedError


def read_json(text: str, schema: dict[str, Any]) -> Any:
    """The value in an answer; MalformedError where it does not satisfy the schema.

    Models write JSON with a fence or words around it, a trailing comma or a missing bracket: that is mended. What is
    not mended is a guess: a text that breaks off, and a draft beside the final version. An object with one key is taken
    for a list where the schema wants one: endpoints that enforce JSON want an object.
    """
    try:
        value = _read(text, schema)
        if not is_text(value) or _holds_nul(value):
            raise MalformedError("half a character, a lone surrogate, or NUL")
    except RecursionError:
        raise MalformedError("lists or objects too deep within each other") from None
    return value


def _read(text: str, schema: dict[str, Any]) -> Any:
    import json_repair  # extras, which recipes that ask no model do without
    import jsonschema

    validator = jsonschema.validators.validator_for(schema)(schema)

    def unwrapped(value: Any) -> Any:
        is_wrapped = schema.get("type") == "array" and isinstance(value, dict) and len(value) == 1
        return next(iter(value.values())) if is_wrapped else value

    try:
        value = unwrapped(json.loads(text))
    except (ValueError, RecursionError):
        whole = [unwrapped(found) for found in _values_in(text)]
        fitting = [found for found in whole if validator.is_valid(found)]
        if any(found != fitting[0] for found in fitting):
            raise MalformedError(f"{len(fitting)} answers, one of them a draft perhaps") from None
        if not fitting and _breaks_off(text):
            raise MalformedError("the text breaks off") from None
        value = fitting[0] if fitting else unwrapped(json_repair.loads(text))
    if error := jsonschema.exceptions.best_match(validator.iter_errors(value)):
        raise MalformedError(f"{error.json_path}: {error.message}"[:300])
    return value


def _holds_nul(value: Any) -> bool:
    if isinstance(value, str):
        return "\0" in value
    if isinstance(value, dict):
        return any(map(_holds_nul, [*value, *value.values()]))
    return isinstance(value, list) and any(map(_holds_nul, value))


def _values_in(text: str) -> Iterator[Any]:
    """The lists and objects of JSON that stand whole among other words."""
    decoder = json.JSONDecoder()
    at = 0
    while at < len(text):
        if text[at] in "[{":
            try:
                value, at = decoder.raw_decode(text, at)
            except (ValueError, RecursionError):
                at += 1
                continue
            yield value
        else:
            at += 1


def _breaks_off(text: str) -> bool:
    """Whether a text ends within quotation marks of JSON."""
    is_inside = is_escaped = False
    for character in text[max(0, min(text.find(mark) % (len(text) + 1) for mark in "[{")) :]:
        if is_escaped:
            is_escaped = False
        elif character == "\\":
            is_escaped = is_inside
        elif character == '"':
            is_inside = not is_inside
    return is_inside
