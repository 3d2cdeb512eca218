"""The recipe's section `synthesize`."""

import itertools
import math
import string
from collections import Counter
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from pipelines.errors import nearest
from pipelines.recipe.base import SHIPPED, Count, Number, ReadPath, Section
from pipelines.recipe.llm import Endpoint, ModelRequests, Sampling

PASSAGE = "passage"
"""The dimension of pieces of documents."""
DRAWN = ("style", "injection", "examples", "max_length")
"""Fields of a template besides the dimensions."""


RuleName = Literal[
    "empty", "non_answer", "explanation", "quotes", "particle", "opening", "length", "emoji", "foreign", "mismatch"
]
"""The rules of refine."""
MOST_REQUESTS = 10**9
"""More requests than these in one grid are a mistake: a thousand a second would take twelve days."""


class Examples(Section):
    """A pool of few-shot examples that lies in files."""

    source: Annotated[str, ReadPath()] = Field(
        description="rows or lines: path, glob or fsspec URL, such as what `export` wrote"
    )
    text_key: str = Field(
        "response", description="column of the example, where the source has rows; of plain text each line is one"
    )
    pick: Count = Field(3, description="examples drawn into one prompt")


class Style(Section):
    """One style of answers: how they are asked for, and what they look like."""

    template: str = Field(
        description="prompt; fields: the dimensions, {style}, {injection}, {examples}, {max_length}; {{ is a brace"
    )
    query_suffix: str = Field("", description="put behind the training input, such as `,严肃风格`")
    min_length: Annotated[int, Number] = Field(1, ge=0, description="characters an answer has at least")
    max_length: Count | None = Field(None, description="characters an answer has at most; null: any number")
    emoji: Literal["any", "needed", "forbidden"] = Field("any", description="whether answers hold emoji")
    foreign: Literal["any", "forbidden"] = Field("any", description="whether answers hold words of other languages")
    lines: bool = Field(False, description="whether answers may have several lines; refine drops them else")
    rules: list[RuleName] | None = Field(None, description="defects refine looks for; null: those of refine.rules")
    examples: list[str] | Examples = Field(
        [], description="few-shot pool of answers in this style, or {source, text_key, pick} where it is kept elsewhere"
    )
    num_examples: Annotated[int, Number] = Field(
        0, ge=0, description="examples drawn into one prompt, as {examples}, one a line"
    )

    @property
    def picked(self) -> int:
        """Examples drawn into one prompt, whether the pool is listed or lies in files."""
        return self.examples.pick if isinstance(self.examples, Examples) else self.num_examples

    @property
    def pool(self) -> list[str]:
        """The examples, which have been read by now where they lie in files."""
        assert isinstance(self.examples, list)
        return self.examples

    @model_validator(mode="after")
    def _pool_suffices(self) -> "Style":
        if isinstance(self.examples, Examples) and self.num_examples:
            raise ValueError("num_examples is examples.pick, where the examples lie in files")
        if isinstance(self.examples, list) and self.num_examples > len(self.examples):
            raise ValueError(f"num_examples {self.num_examples} of a pool of {len(self.examples)} examples")
        if self.max_length is not None and self.max_length < self.min_length:
            raise ValueError(f"max_length {self.max_length} is below min_length {self.min_length}")
        return self


class Compatibility(Section):
    """Which cells of the grid make sense; of several rules that match a cell, the last one counts."""

    where: dict[str, str | list[str]] = Field(
        min_length=1, description="value or values by dimension, or style; * and ? are wildcards"
    )
    fits: bool = Field(False, description="whether the cells that match are asked")


class Passages(Section):
    """Texts cut into passages; each is a value of the dimension `passage`."""

    source: Annotated[str, ReadPath()] = Field(
        description="text files, .docx, .pdf or .epub, or rows: path, folder, glob or fsspec URL"
    )
    text_key: str = Field("text", description="column of the text, where the source has rows")
    size: Count = Field(800, description="characters of a passage at most; cut at the end of a paragraph or sentence")
    overlap: Annotated[int, Number] = Field(0, ge=0, description="characters that a passage repeats of the one before")

    @model_validator(mode="after")
    def _goes_on(self) -> "Passages":
        if self.overlap > self.size // 2:
            raise ValueError(f"overlap {self.overlap} is more than half of size {self.size}")
        return self


class AnswerShape(Section):
    """What an answer is read as. All but text are JSON, mended where it is nearly valid."""

    shape: Literal["text", "json", "pairs", "dialogue"] = Field(
        "text",
        description="text: the response as it is; json: a value that json_schema allows; pairs: a list of {question, "
        "answer}, each a conversation; dialogue: a list of {speaker, text}, one conversation",
    )
    json_schema: dict[str, Any] | None = Field(None, description="JSON schema of the value; for json, required")
    response_format: Literal["json_object", "json_schema"] | None = Field(
        None, description="have the endpoint enforce it, where it can"
    )
    reasoning: bool = Field(
        False, description="keep what the model thought before it answered, in the answer's turn; for text and json"
    )
    user: str = Field("user", description="speaker of a dialogue who becomes the user; may name dimensions")
    assistant: str = Field("assistant", description="speaker of a dialogue who is trained; may name dimensions")

    @model_validator(mode="after")
    def _has_a_schema(self) -> "AnswerShape":
        if (self.shape == "json") != (self.json_schema is not None):
            raise ValueError("shape json needs json_schema, and the others have their own")
        if self.json_schema is not None:
            check_schema(self.json_schema)
        if self.reasoning and self.shape not in ("text", "json"):
            raise ValueError(f"reasoning is of an answer as a whole; {self.shape} makes several turns of it")
        if self.response_format is not None and self.shape == "text":
            raise ValueError("response_format needs a shape of JSON")
        return self


def _model_folder(section: "Synthesize", model: str) -> str | None:
    """What is loaded as the model: nothing where endpoints answer, nor where a shipped recipe has the name."""
    is_loaded = section.engine == "vllm" and not (SHIPPED / f"{model}.yaml").is_file()
    return model if is_loaded else None


class Synthesize(ModelRequests):
    """Conversations from a grid of dimensions and styles, answered by a model."""

    engine: Literal["api", "vllm"] = Field(
        "api",
        description="api: endpoints; vllm: the model, a folder, hf://, modelscope://, pypi:// or a shipped recipe's "
        "name, is loaded in the cluster, as serve says (that recipe's serve, with its name)",
    )
    model: Annotated[str, ReadPath(_model_folder)] = Field(description="the model asked")
    endpoints: list[Endpoint] = Field([], description="where it answers; needed unless engine is vllm")
    system: str | None = Field(None, description="system prompt of the requests")
    dimensions: dict[Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")], Annotated[list[str], Field(min_length=1)]] = (
        Field({}, description="values by name; every combination with a style is a cell")
    )
    passages: Passages | None = Field(None, description="null: no dimension `passage`")
    styles: dict[str, Style] = Field(min_length=1, description="manners of answering, by name")
    compatibility: list[Compatibility] = Field([], description="cells that do not fit are not asked")
    samples_per_cell: Annotated[int, Field(ge=1, le=1_000_000)] = Field(1, description="answers to each cell")
    injections: list[str] = Field([""], min_length=1, description="extra conditions, one drawn into each prompt")
    queries: list[str] = Field(
        [], description="phrasings of the training input, one drawn for each answer; pairs and dialogue bring theirs"
    )
    query_system: str | None = Field(
        None, description="system prompt of the conversations that come out; may name dimensions"
    )
    generation: Sampling = Sampling(temperature=1.0)
    answer: AnswerShape = AnswerShape()

    @model_validator(mode="after")
    def _templates_name_what_exists(self) -> "Synthesize":
        if self.engine == "api" and not self.endpoints:
            raise ValueError("endpoints: at least one is needed, or engine: vllm")
        check_grid(self)
        return self


def fits(rules: list[Compatibility], cell: Mapping[str, str]) -> bool:
    """Whether a cell is asked; the last rule that matches it decides, and without one it is."""
    for rule in reversed(rules):
        if all(matches(cell[name], patterns) for name, patterns in rule.where.items()):
            return rule.fits
    return True


def matches(value: str, patterns: str | list[str]) -> bool:
    """Whether a value is one of those that a rule names."""
    return any(fnmatchcase(value, pattern) for pattern in ([patterns] if isinstance(patterns, str) else patterns))


def check_grid(section: Synthesize) -> None:
    """Raise ValueError, naming them all, for fields, names and values that do not exist and cells that never fit."""
    passage = {PASSAGE: ["…"]} if section.passages else {}
    axes = {**passage, **section.dimensions, "style": list(section.styles)}
    problems = [problem for name, style in section.styles.items() for problem in _template_problems(name, style, axes)]
    for number, query in enumerate(section.queries):
        problems += _field_problems(f"queries[{number}]", query, [*axes])
    templates = {"query_system": section.query_system or "", "answer.user": section.answer.user}
    for where, template in {**templates, "answer.assistant": section.answer.assistant}.items():
        problems += _field_problems(where, template, [*axes])
    if section.answer.shape in ("text", "json") and not section.queries:
        problems.append("queries: at least one is needed, for answers that are not conversations of their own")
    if not section.dimensions and section.passages is None:
        problems.append("dimensions: at least one is needed, or passages")
    for name in section.dimensions:
        if name in (*DRAWN, PASSAGE):
            problems.append(f"dimensions.{name}: the name is taken; templates have {', '.join(DRAWN)}, and {PASSAGE}")
    for name, values in axes.items():
        repeated = sorted(value for value, count in Counter(values).items() if count > 1)
        if repeated:
            problems.append(f"dimensions.{name}: given twice: {', '.join(repeated)}")
    for number, rule in enumerate(section.compatibility):
        problems += _rule_problems(f"compatibility[{number}].where", rule, axes)
    size = math.prod(map(len, axes.values())) * section.samples_per_cell
    if not problems and size > MOST_REQUESTS:
        problems.append(f"samples_per_cell: the grid has {size:,} requests; the most is {MOST_REQUESTS:,}")
    if not problems and section.answer.shape == "dialogue":
        problems += _speaker_problems(section, axes)
    if not problems and not any(
        fits(section.compatibility, dict(zip(axes, values, strict=True)))
        for values in itertools.product(*axes.values())
    ):
        problems.append("compatibility: no cell fits")
    if problems:
        raise ValueError("; ".join(problems))


def _speaker_problems(section: Synthesize, axes: Mapping[str, list[str]]) -> list[str]:
    """A problem for the first cell that is asked for a dialogue of one speaker with himself."""
    answer = section.answer
    named = [name for name in axes if name in {*_fields(answer.user), *_fields(answer.assistant)}]
    ruled = [name for name in axes if name not in named and any(name in rule.where for rule in section.compatibility)]
    first = {name: values[0] for name, values in axes.items()}
    for values in itertools.product(*(axes[name] for name in named)):
        cell = {**first, **dict(zip(named, values, strict=True))}
        speaker = answer.user.format_map(cell).strip()
        if speaker != answer.assistant.format_map(cell).strip():
            continue
        others = itertools.product(*(axes[name] for name in ruled))
        if any(fits(section.compatibility, {**cell, **dict(zip(ruled, other, strict=True))}) for other in others):
            where = " and ".join(f"{name} {cell[name]}" for name in named) or "all cells"
            return [f"answer: user and assistant are both {speaker}, in {where}; leave such cells out by compatibility"]
    return []


def _template_problems(name: str, style: Style, axes: Mapping[str, list[str]]) -> list[str]:
    where = f"styles.{name}.template"
    problems = _field_problems(where, style.template, [*axes, *DRAWN])
    if not problems and style.picked and "examples" not in _fields(style.template):
        problems.append(f"{where}: has no {{examples}}, but {style.picked} of them are drawn")
    return problems


def _field_problems(where: str, template: str, valid: list[str]) -> list[str]:
    try:
        fields = _fields(template)
    except ValueError as error:
        return [f"{where}: {error}; a literal brace is written twice"]
    return [f"{where}: unknown field {{{field}}}; {nearest(field, valid)}" for field in fields if field not in valid]


def _fields(template: str) -> list[str]:
    parts = [part for part in string.Formatter().parse(template) if part[1] is not None]
    for _, field, specification, conversion in parts:
        if specification or conversion:
            raise ValueError(f"field {{{field}}} takes no format")
    return [str(field) for _, field, _, _ in parts]


def _rule_problems(where: str, rule: Compatibility, axes: Mapping[str, list[str]]) -> list[str]:
    problems = []
    for name, patterns in rule.where.items():
        if name not in axes:
            problems.append(f"{where}.{name}: no such dimension; {nearest(name, axes)}")
            continue
        for pattern in [patterns] if isinstance(patterns, str) else patterns:
            if name != PASSAGE and not any(fnmatchcase(value, pattern) for value in axes[name]):
                problems.append(f"{where}.{name}: {pattern} matches no value; {nearest(pattern, axes[name])}")
    return problems


def check_schema(schema: dict[str, Any]) -> None:
    """Raise ValueError where it is not a JSON schema."""
    import jsonschema  # an extra that other recipes do without

    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(f"json_schema{error.json_path.removeprefix('$')}: {error.message}") from None
