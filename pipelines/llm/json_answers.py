"""Answers in JSON: mended where they are nearly valid (json-repair), then held to a schema."""

import json
from typing import Any

from pipelines.artifacts.rows import is_text
from pipelines.llm.requests import MalformedError


def read_json(text: str, schema: dict[str, Any]) -> Any:
    """The value in an answer; MalformedError where it does not satisfy the schema.

    Models write JSON with a fence around it, a trailing comma or a missing bracket: that is mended. An object with one
    key is taken for a list where the schema wants one: endpoints that enforce JSON want an object.
    """
    import json_repair  # extras, which recipes that ask no model do without
    import jsonschema

    try:
        value = json.loads(text)
    except ValueError:
        value = json_repair.loads(text)
    if schema.get("type") == "array" and isinstance(value, dict) and len(value) == 1:
        (value,) = value.values()
    validator = jsonschema.validators.validator_for(schema)(schema)
    if error := jsonschema.exceptions.best_match(validator.iter_errors(value)):
        raise MalformedError(f"{error.json_path}: {error.message}"[:300])
    if not is_text(value):
        raise MalformedError("half a character, a lone surrogate")
    return value
