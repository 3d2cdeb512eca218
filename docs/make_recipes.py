"""Write docs/recipes.md from the recipe's schema: python docs/make_recipes.py > docs/recipes.md"""

from collections.abc import Iterator
from types import NoneType
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from pipelines.recipe.schema import Recipe

HEAD = """# Recipes

A recipe is one YAML file that is the whole experiment. It is checked before anything starts: unknown keys, wrong
types and operators or parameters that do not exist are reported together, each with the nearest valid name. There is
no inheritance between recipes. A section that is absent means that its stage does not run. Any key can be changed on
the command line:
`danlu run tiny train.max_steps=20 'train.resources_per_worker={GPU: 1}'`.

Paths are relative to the current directory; `recipes://data/tiny.jsonl` names data that come with the project.

This page follows from `pipelines/recipe/schema.py` (`python docs/make_recipes.py > docs/recipes.md`).
"""


def page() -> str:
    """The whole page."""
    return "\n".join([HEAD, *_section("The recipe itself", "", Recipe)])


def _section(title: str, prefix: str, model: type[BaseModel]) -> Iterator[str]:
    nested: list[tuple[str, type[BaseModel]]] = []
    rows = []
    for name, field in model.model_fields.items():
        section = _model_in(field.annotation)
        if section:
            nested.append((f"{prefix}{name}", section))
        else:
            rows.append(f"| `{name}` | {_type(field.annotation)} | {_default(field)} | {field.description or ''} |")
    yield f"## {title}\n"
    if prefix:
        yield f"{(model.__doc__ or '').strip()}\n"
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    yield from rows
    yield ""
    for name, section in nested:
        yield from _section(f"`{name}`", f"{name}.", section)


def _model_in(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " or ".join(f"`{value}`" for value in get_args(annotation))
    parts = get_args(annotation)
    if get_origin(annotation) in (Union, type(int | str)):
        return " or ".join(_type(part) for part in parts if part is not NoneType)
    if get_origin(annotation) is list:
        return f"list of {_type(parts[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if hasattr(annotation, "__metadata__"):
        return _type(parts[0])
    return {"str": "text", "int": "integer", "float": "number", "bool": "true or false"}.get(
        annotation.__name__, "value"
    )


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return ""
    if isinstance(value, str):
        return f"`{value}`"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`".replace("'", "")


if __name__ == "__main__":
    print(page(), end="")
