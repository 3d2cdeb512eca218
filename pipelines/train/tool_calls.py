"""Tool calls of a turn, as JSON text: parsed, and with a part left out, which shows whether a template writes it."""

import json
from collections.abc import Iterator
from typing import Any

from pipelines.errors import DataError


def parsed(text: str, what: str) -> Any:
    """What a row's JSON says; DataError where it is none."""
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f"its {what} are no JSON: {error}") from None


def lessened(calls: str) -> Iterator[tuple[str, str]]:
    """Each call, and each argument of one that has a value, with the calls as they are without it."""
    whole = parsed(calls, "tool calls")
    for place in range(len(whole) if len(whole) > 1 else 0):
        yield f"tool call {place + 1} of {len(whole)} in a turn", json.dumps(whole[:place] + whole[place + 1 :])
    for place, call in enumerate(whole):
        function = call["function"]
        given = function.get("arguments")
        for name in [name for name, value in given.items() if value is not None] if isinstance(given, dict) else []:
            rest = {key: value for key, value in given.items() if key != name}
            less = {**call, "function": {**function, "arguments": rest}}
            yield f"the argument {name!r} of a tool call", json.dumps([*whole[:place], less, *whole[place + 1 :]])
