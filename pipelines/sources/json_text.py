"""One JSON text at a time, as Python's `json` reads it; an object that has a key twice is refused."""

import json
from typing import Any


class RepeatedKey(ValueError):
    """An object of JSON has a key twice, of which Python's reader would keep the last."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise RepeatedKey(f"key {next(key for key in keys if keys.count(key) > 1)!r:.80} is there twice; delete one")
    return found


STRICT = json.JSONDecoder(object_pairs_hook=_object)
"""Reads JSON; RepeatedKey where an object has a key twice."""


def value_of(text: str) -> Any:
    """What `STRICT.decode` gives, sooner where nothing stands before the value: a row is read in microseconds."""
    try:
        found, end = STRICT.raw_decode(text)
    except json.JSONDecodeError:
        return STRICT.decode(text)
    return STRICT.decode(text) if text[end:].strip(" \t\r\n") else found
