"""The recipe: one YAML that is the whole experiment, checked before anything starts.

Every field carries its meaning and unit. Unknown keys are refused. `load_recipe` reports all problems at once.
A section that is absent means that its stage does not run.
"""

import re
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from pipelines import data_juicer
from pipelines.errors import Problem, RecipeError, nearest
from pipelines.evaluate.section import Compare, Evaluate
from pipelines.ingest.section import Ingest
from pipelines.progress import say
from pipelines.publish.section import Publish
from pipelines.section import Count, Ratio, Section
from pipelines.synthesize.refine_section import Refine
from pipelines.synthesize.section import Synthesize
from pipelines.train.section import Merge, Train, not_servable
from serve.section import Serve

SHIPPED = Path(__file__).parent / "recipes"
"""Where the recipes that come with the project lie."""

RECIPE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Names become folders, adapters' names and parts of URLs."""


class Analyze(Section):
    """The statistics of clean's filters over all rows, before clean and after it, as table and plots in the report."""

    concurrency: Count | None = Field(None, description="tasks at a time; null: what the cluster has")


class Clean(Section):
    """Operators by data-juicer's names and parameters, in order."""

    process: list[str | dict[str, dict[str, Any] | None]] = Field(min_length=1, description="operators, in order")
    dialect: Literal["zh", "data_juicer"] = Field("zh", description="zh: right for Chinese; data_juicer: bit-equal")
    text_keys: str = Field("response", description="column that operators read")
    assets: dict[str, str] = Field(
        default_factory=dict, description="model files by name, such as lid.176.ftz: path or URL#sha256=…"
    )
    custom_operators: list[str] = Field(default_factory=list, description="Python files with operators of your own")
    edited: str | None = Field(None, description="rows edited by hand: the file that clean --export wrote")
    concurrency: Count | None = Field(None, description="tasks at a time; null: what the cluster has")


class Export(Section):
    """The rows as one file for people and other tools, in data-set order."""

    path: Annotated[str, Field(pattern=r"\.(jsonl|parquet)$")] = Field(description="a .jsonl or .parquet file or URL")


class Split(Section):
    """Which rows are held out: by a seeded hash of a group, the first ones, or those of a source of their own."""

    test_ratio: Ratio | None = Field(None, description="share of groups held out, 0 to 1")
    first: Count | None = Field(
        None, description="hold out the first rows instead, in data-set order, and the rest of their groups"
    )
    group: str | None = Field(
        None,
        description="column whose equal values stay on one side; near_duplicates: rows of nearly the same text, "
        "clean.text_keys or else response; null: each row by itself",
    )
    test_source: str | None = Field(
        None, description="the rows held out lie here, as in ingest.source; all others are to train"
    )
    concurrency: Count | None = Field(None, description="tasks at a time; null: what the cluster has")

    @model_validator(mode="after")
    def _one_rule(self) -> "Split":
        if [self.test_ratio, self.first, self.test_source].count(None) != 2:
            raise ValueError("give one of test_ratio, first and test_source")
        if self.test_source is not None and self.group is not None:
            raise ValueError("test_source says which rows are held out; remove group, which goes with the other two")
        return self


class Recipe(Section):
    """One experiment, from rows to scores."""

    name: str
    seed: int = Field(42, description="every random choice follows from it")
    synthesize: Synthesize | None = None
    ingest: Annotated[Ingest | None, Field(validate_default=True)] = None
    refine: Refine | None = None
    analyze: Analyze | None = None
    clean: Clean | None = None
    export: Export | None = None
    split: Split | None = None
    train: Train | None = None
    merge: Merge | None = None
    serve: Serve = Serve()
    evaluate: Evaluate | None = None
    compare: Compare | None = None
    publish: Publish | None = None

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not RECIPE_NAME.fullmatch(name):
            raise ValueError(f"use ASCII letters, digits, '.', '_' and '-', not {name!r}")
        return name

    @field_validator("ingest")
    @classmethod
    def _rows_come_from_somewhere(cls, ingest: Ingest | None, info: ValidationInfo) -> Ingest | None:
        if "synthesize" not in info.data:  # given, but wrong
            return ingest
        if ingest is None and info.data["synthesize"] is None:
            raise PydanticCustomError("missing", "neither ingest nor synthesize")
        if ingest is not None and info.data["synthesize"] is not None:
            raise ValueError("rows come from ingest or from synthesize, not from both")
        return ingest

    @model_validator(mode="after")
    def _stages_have_what_they_read(self) -> "Recipe":
        needs = {"merge": "train", "evaluate": "train", "compare": "train", "publish": "train", "train": "split"}
        needs |= {"analyze": "clean"}
        for stage, needed in needs.items():
            if getattr(self, stage) is not None and getattr(self, needed) is None:
                raise ValueError(f"{stage} needs a section {needed}")
        if self.refine and not self.synthesize and not self.refine.styles:
            raise ValueError("refine needs a section synthesize, or refine.styles and refine.dimensions")
        if self.publish and self.publish.weights == "merged" and self.merge is None:
            raise ValueError("publish.weights merged needs a section merge")
        if self.train and self.train.method == "full":
            if self.publish and self.publish.weights == "adapter":
                raise ValueError("train.method full leaves no adapter; publish.weights: merged, with a section merge")
            if self.compare and self.compare.checkpoints:
                raise ValueError("compare.checkpoints asks adapters, and train.method full leaves none; remove it")
        return self

    @model_validator(mode="after")
    def _what_is_asked_can_be_served(self) -> "Recipe":
        reason = not_servable(self.train) if self.train else None
        asked = [stage for stage in ("evaluate", "compare") if getattr(self, stage) is not None]
        if reason and asked and self.merge is None:
            raise ValueError(f"{reason}; {' and '.join(asked)} can ask the merged model: add a section merge")
        if reason and self.compare and self.compare.checkpoints:
            raise ValueError(f"{reason}; remove compare.checkpoints, which asks them")
        return self


def shipped_recipes() -> dict[str, Path]:
    """The recipes that come with the project, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}


def load_recipe(name_or_path: str, overrides: list[str] | None = None) -> Recipe:
    """Read a shipped recipe by name, or a file, apply `key=value` overrides, and check everything.

    A data-juicer YAML is a recipe too; what of it is ignored is said in one line.

    Raises RecipeError with every problem found: file, key, and the nearest valid name.
    """
    path = _find(name_or_path)
    tree = _parse(path)
    problems: list[Problem] = []
    theirs = data_juicer.is_data_juicer(tree)
    if theirs:
        tree, ignored, problems = data_juicer.as_recipe(tree, path)
        if ignored:
            say(f"{path}: a data-juicer recipe; steers only data-juicer itself, ignored: {', '.join(ignored)}")
    problems += [problem for item in overrides or [] if (problem := _override(tree, item))]
    recipe, found = _validated(tree)
    problems += found
    if recipe is None or problems:
        raise RecipeError(str(path), [data_juicer.in_its_terms(p) for p in problems] if theirs else problems)
    return recipe


def _validated(tree: dict[str, Any]) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, where its sections are right, and everything that is wrong, operators included."""
    try:
        recipe = Recipe.model_validate(tree)
    except ValidationError as error:
        problems = [_problem(key, list(details)) for key, details in groupby(error.errors(), key=_key)]
        section = tree.get("clean")
        process = section.get("process") if isinstance(section, dict) else None
        if isinstance(process, list):
            files = section.get("custom_operators") if isinstance(section, dict) else None
            custom = [file for file in files if isinstance(file, str)] if isinstance(files, list) else []
            problems = [p for p in problems if not p.key.startswith("clean.process[")]  # the next line says it better
            problems += _check_process(Clean.model_construct(process=process, custom_operators=custom))
        return None, problems
    return recipe, _check_process(recipe.clean) if recipe.clean else []


def _check_process(clean: Clean) -> list[Problem]:
    from pipelines.clean.plan import check_process  # operators read this module's errors only through pipelines.errors

    return check_process(clean.process, clean.dialect, clean.assets, clean.custom_operators)


def _find(name_or_path: str) -> Path:
    shipped = shipped_recipes()
    if name_or_path in shipped:
        return shipped[name_or_path]
    path = Path(name_or_path)
    if path.is_file():
        return path
    hint = nearest(name_or_path, shipped) if path.suffix == "" else "no such file"
    raise RecipeError(name_or_path, [Problem("", f"neither a shipped recipe nor a file; {hint}")])


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key given twice and reads `1e-4` as a number."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?(?:\d[\d_]*\.?[\d_]*|\.\d+)(?:[eE][-+]?\d+)$|^[-+]?\d[\d_]*\.[\d_]*$|^[-+]?\.(?:inf|Inf|INF)$|^\.(?:nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key, _ in node.value:
        name = loader.construct_object(key, deep=True)  # type: ignore[no-untyped-call]
        if name in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {name!r} is given twice", key.start_mark)
        seen.add(name)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _parse(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except UnicodeDecodeError:
        raise RecipeError(str(path), [Problem("", "not UTF-8; save it as UTF-8")]) from None
    except yaml.YAMLError as error:
        said = str(error).replace('in "<unicode string>", ', "in ")
        raise RecipeError(str(path), [Problem("", f"not valid YAML: {said}")]) from None
    if not isinstance(tree, dict):
        raise RecipeError(str(path), [Problem("", "a recipe is a mapping of sections; this file is not")])
    return tree


def _override(tree: dict[str, Any], item: str) -> Problem | None:
    key, separator, text = item.partition("=")
    if not separator or not key:
        return Problem(item, "an override is written key=value, such as train.max_steps=20")
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = text
    node = tree
    *parents, last = key.split(".")
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
        key += f"[{part}]" if isinstance(part, int) else f".{part}" if key else str(part)
    return key


def _problem(key: str, details: list[Any]) -> Problem:
    """What is wrong at one key; where it may have several types, with each of them."""
    kind, given = details[0]["type"], details[0]["input"]
    if kind == "extra_forbidden":
        *section, name = _location(details[0])
        return Problem(key, f"unknown key; {nearest(str(name), _fields(section))}")
    if kind == "missing":
        return Problem(key, "missing; it must be given")
    shown = "" if kind in ("value_error", "too_short") else f", not {given!r}" if not isinstance(given, dict) else ""
    if types := dict.fromkeys(_TYPES[detail["type"]] for detail in details if detail["type"] in _TYPES):
        return Problem(key, f"must be {' or '.join(types)}{shown}")
    message = details[0]["msg"].removeprefix("Value error, ").replace("Input should", "must", 1)
    return Problem(key, message[0].lower() + message[1:] + shown)


def _fields(location: list[Any]) -> list[str]:
    """The keys valid in the section at `location`."""
    model: type[BaseModel] = Recipe
    for part in location:
        field = model.model_fields.get(str(part))
        for candidate in [field.annotation, *getattr(field.annotation, "__args__", ())] if field else []:
            if isinstance(candidate, type) and issubclass(candidate, BaseModel):
                model = candidate
    return list(model.model_fields)
