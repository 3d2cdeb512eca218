"""Keys of APIs come from the environment; one that was mangled on its way there is refused before it is sent."""

import os

from pipelines.errors import Problem, RecipeError

ENDPOINT_KEY = "OPENAI_API_KEY"
"""Where `danlu chat`, `danlu ui`, evaluate and compare find the key of the endpoint that they ask."""
QUOTES = "\"'`“”‘’"


def key_problem(name: str) -> str:
    """What is wrong with the key in an environment variable, empty where nothing is; the key itself is never shown."""
    value = os.environ.get(name)
    if not value:
        return f"the environment variable {name} is not set"
    if "\r" in value:
        return (
            f"the environment variable {name} holds a carriage return: the .env file it comes from has the line ends "
            "of Windows (CRLF); save it with those of Unix (LF)"
        )
    if any(mark in value for mark in QUOTES):
        return f"the environment variable {name} holds quotation marks; write the key without them"
    if value.startswith("$"):
        return f"the environment variable {name} holds the name of another variable, not a key: nothing expanded it"
    if value != value.strip() or any(character.isspace() for character in value):
        return f"the environment variable {name} holds a space or a line break; write the key without it"
    if not value.isascii() or not value.isprintable():
        return f"the environment variable {name} holds a character that no key has; copy the key once more"
    return ""


def endpoint_key() -> str:
    """The key that endpoints are asked with, "none" where there is none; RecipeError where it cannot be a key."""
    if not os.environ.get(ENDPOINT_KEY):
        return "none"
    if said := key_problem(ENDPOINT_KEY):
        raise RecipeError("the environment", [Problem("", said)])
    return os.environ[ENDPOINT_KEY]
