"""Reading a recipe: a shipped one by name or a file of one's own, with every problem in one message."""

import re
from collections.abc import Callable, Mapping
from itertools import groupby, islice
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from pipelines.errors import Problem, RecipeError, nearest
from pipelines.progress import say
from pipelines.recipe import data_juicer
from pipelines.recipe.base import SHIPPED, Section
from pipelines.recipe.schema import Recipe
from pipelines.recipe.yaml_text import MAX_BYTES, MAX_DEPTH, parse_yaml

MAX_PROBLEMS = 50
"""That are told at once; more of them say that the file is no recipe."""

Check = Callable[[Any], list[Problem]]
"""Takes a section, and says what is wrong with it beyond its schema."""


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the project, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load_recipe(
    name_or_path: str, overrides: list[str] | None = None, checks: Mapping[str, Check] | None = None
) -> Recipe:
    """Read a shipped recipe by name, or a file, apply `key=value` overrides, and check everything.

    `checks` say, by the name of a section, what is wrong with it beyond its schema. A data-juicer YAML is a recipe too;
    what of it is ignored is said in one line.

    Raises RecipeError with every problem found: file, key, and the nearest valid name.
    """
    path = recipe_file(name_or_path)
    tree = _parse(path)
    problems: list[Problem] = []
    theirs = data_juicer.is_data_juicer(tree)
    if theirs:
        tree, ignored, problems = data_juicer.as_recipe(tree, path)
        if ignored:
            say(f"{path}: a data-juicer recipe; steers only data-juicer itself, ignored: {', '.join(ignored)}")
    problems += [problem for item in overrides or [] if (problem := _override(tree, item))]
    recipe, found = _validated(tree, checks or {})
    problems += found
    if recipe is None or problems:
        raise RecipeError(str(path), [data_juicer.in_its_terms(p) for p in problems] if theirs else problems)
    return recipe


def _validated(tree: dict[str, Any], checks: Mapping[str, Check]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, where it fits the schema, and everything that is wrong."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        found = groupby(error.errors(include_url=False), key=_key)
        problems = [_problem(key, list(details)) for key, details in islice(found, MAX_PROBLEMS)]
        if next(found, None) is not None:
            problems.append(Problem("", f"and more; these are the first {MAX_PROBLEMS}"))
        for name, check in checks.items():
            section = _as_far_as_valid(name, tree.get(name))
            problems += check(section) if section is not None else []
        return None, problems
    given = dict(recipe)
    sections = ((check, given[name]) for name, check in checks.items())
    return recipe, [problem for check, section in sections if section is not None for problem in check(section)]


def _as_far_as_valid(name: str, given: Any) -> Section | None:
    """A section without those of its keys that are wrong; None where too little is left of it."""
    kinds = get_args(Recipe.model_fields[name].annotation)
    model: type[Section] = next(kind for kind in kinds if issubclass(kind, Section))
    if not isinstance(given, dict):
        return None
    try:
        return model.model_validate(given)
    except ValidationError as error:
        wrong = {str(detail["loc"][0]) for detail in error.errors() if detail["loc"]}
    try:
        return model.model_validate({key: value for key, value in given.items() if key not in wrong})
    except ValidationError:
        return None


def recipe_file(name_or_path: str) -> Path:
    """The file of a shipped recipe, by name, or a file of one's own; RecipeError where there is neither."""
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    try:
        if path.is_file():
            return path
        beside = [other for end in (".yaml", ".yml") if (other := path.parent / f"{path.stem}{end}").is_file()]
    except OSError as error:
        raise RecipeError(_short(name_or_path, 80), [Problem("", f"cannot be read: {error.strerror}")]) from None
    if beside:
        hint = f"did you mean {beside[0]}?"
    else:
        hint = nearest(name_or_path, shipped) if path.suffix == "" else "no such file"
    raise RecipeError(_short(name_or_path, 200), [Problem("", f"neither a shipped recipe nor a file; {hint}")])


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise RecipeError(str(path), [Problem("", f"more than {MAX_BYTES:,} bytes; is it a recipe?")])
        tree = parse_yaml(data.decode("utf-8"))
    except OSError as error:
        raise RecipeError(str(path), [Problem("", f"cannot be read: {error.strerror}")]) from None
    except UnicodeDecodeError:
        raise RecipeError(str(path), [Problem("", "not UTF-8; save it as UTF-8")]) from None
    except yaml.YAMLError as error:
        said = re.sub(r'in "<(?:unicode|byte) string>", ', "in ", str(error))
        raise RecipeError(str(path), [Problem("", f"not valid YAML: {_short(said, 400)}")]) from None
    if not isinstance(tree, dict):
        raise RecipeError(str(path), [Problem("", "a recipe is a mapping of sections; this file is not")])
    if odd := [key for key in tree if not isinstance(key, str)]:
        raise RecipeError(str(path), [Problem("", f"the key {_short(repr(odd[0]), 40)} is no section's name")])
    return tree


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text):,} characters)"


def _override(tree: dict[str, Any], item: str) -> Problem | None:
    key, separator, text = item.partition("=")
    if not separator or not key:
        return Problem(item, "an override is written key=value, such as train.max_steps=20")
    if len(item) > MAX_BYTES:
        return Problem(_short(key, 40), f"too long; an override has at most {MAX_BYTES:,} characters")
    if not item.isascii() and any("\ud800" <= character <= "\udfff" for character in item):
        return Problem(_short(ascii(key)[1:-1], 40), "not UTF-8; the terminal has another encoding")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError:
        value = text
    node = tree
    *parents, last = key.split(".")
    if len(parents) > MAX_DEPTH:
        return Problem(_short(key, 40), f"nested deeper than {MAX_DEPTH} levels")
    for parent in parents:
        child = node.get(parent)
        if child is None:
            child = node[parent] = {}
        if not isinstance(child, dict):
            return Problem(key, f"{parent} holds a value, not a section")
        node = child
    node[last] = value
    return None


_BRANCH = re.compile(r"(str|int|float|bool|(list|dict|tuple|function|constrained|lax)[-\[].*)")
"""How pydantic calls one of several types that a value may have, in the place where it is wrong."""

_TYPES = {
    "string_type": "text",
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number"),
    **dict.fromkeys(("float_type", "float_parsing", "decimal_type", "decimal_parsing"), "a number"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false"),
    **dict.fromkeys(("list_type", "tuple_type"), "a list"),
    **dict.fromkeys(("dict_type", "model_type"), "keys with values"),
}


def _location(detail: Any) -> list[Any]:
    return [part for part in detail["loc"] if not (isinstance(part, str) and _BRANCH.fullmatch(part))]


def _key(detail: Any) -> str:
    key = ""
    for part in _location(detail):
        part = part if isinstance(part, int) else _short(str(part), 80)
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    return key


def _problem(key: str, details: list[Any]) -> Problem:
    """What is wrong at one key; where it may have several types, with each of them."""
    kind, given = details[0]["type"], details[0]["input"]
    if kind == "extra_forbidden":
        *section, name = _location(details[0])
        return Problem(key, f"unknown key; {nearest(str(name)[:80], _fields(section))}")
    if kind == "missing":
        return Problem(key, "missing; it must be given")
    shown = ""
    if kind not in ("value_error", "too_short") and not isinstance(given, dict):
        shown = f", not {_short(repr(given), 80)}"
    if types := dict.fromkeys(_TYPES[detail["type"]] for detail in details if detail["type"] in _TYPES):
        return Problem(key, f"must be {' or '.join(types)}{shown}")
    message = details[0]["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    return Problem(key, _short(message[0].lower() + message[1:], 2000) + shown)


def _fields(location: list[Any]) -> list[str]:
    """The keys valid in the section at `location`."""
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(str(part))
        for candidate in [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields)
