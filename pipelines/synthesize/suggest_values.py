"""More values for a dimension, or more phrasings of the training input, as a model proposes them: a person accepts."""

import string
import unicodedata
from collections.abc import Sequence
from functools import cache
from typing import Any

import regex
import yaml

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import InputError, nearest
from pipelines.llm.dispatch import answers_to
from pipelines.llm.json_answers import read_json
from pipelines.llm.requests import MalformedError, RequestList
from pipelines.recipe.llm import Sampling
from pipelines.recipe.synthesize import check_grid
from pipelines.synthesize.grid import Grid

QUERIES = "queries"
ROUNDS = 5
"""How often the model is asked for more, at most."""
MAX_CHARACTERS = 60
"""A value longer than this is no value but a sentence."""
_BULLET = regex.compile(r"\s*(?:\d{1,3}[.、)）](?!\d)|[-*•·](?=\s))\s*")
_DRESS = regex.compile(r"\*\*(.+)\*\*|`(.+)`|“([^“”]+)”|\"([^\"]+)\"|「([^「」]+)」")
"""What lists are written with that is no part of a value: emphasis and quotation marks around the whole."""
PROMPT = """要用下面这样的提示词批量生成文本：
“{example}”

{what}目前有：
{known}

请再想出 {count} 个不同的，同样具体、同样写法，不要和已有的重复或只差一个字。
只回答 JSON，一个字符串列表：["…", "…"]"""


def suggest_values(workspace: Workspace, grid: Grid, name: str, count: int) -> tuple[str, int]:
    """Ask the model for `count` more values; returns the longer list as YAML for a recipe, and how many are new.

    New values leave all prompts as they are that were asked before. What repeats a value or fits no cell of the map is
    left out, and so are phrasings that lack what all others name. InputError for a name of which that does not hold.
    The answers are kept in the ledger.
    """
    section = grid.section
    if not section.endpoints:
        raise InputError("synthesize.endpoints: values are asked of an API; name one")
    names = [*section.dimensions, QUERIES]
    if name not in names:
        raise InputError(f"--suggest-values: {name} is no dimension, nor queries; {nearest(name, names)}")
    if name == QUERIES and not section.queries:
        raise InputError(f"--suggest-values: this recipe has no queries, its answers are {section.answer.shape}")
    known = list(section.queries if name == QUERIES else section.dimensions[name])
    found: list[str] = []
    for _ in range(ROUNDS):
        proposed = _proposed(workspace, grid, name, [*known, *found], count - len(found))
        fresh = _without_repeats([*known, *found], proposed)
        fresh = [value for value in fresh if _fits(grid, name, value)][: count - len(found)]
        found += fresh
        if not fresh or len(found) == count:
            break
    listed = {QUERIES: [*known, *found]} if name == QUERIES else {"dimensions": {name: [*known, *found]}}
    return yaml.safe_dump(listed, allow_unicode=True, default_flow_style=None, width=1000), len(found)


def _proposed(workspace: Workspace, grid: Grid, name: str, known: Sequence[str], count: int) -> list[str]:
    """What the model answers; nothing where its answer is no list of texts."""
    sampling = Sampling(max_tokens=max(1024, grid.section.generation.max_tokens), temperature=1.0)
    section = grid.section.model_copy(update={"generation": sampling})
    fields = {
        "example": grid.request(next(grid.positions())).messages[-1]["content"],
        "what": "用户的问法（花括号里是维度的名字，要原样保留）" if name == QUERIES else f"维度 {name} 的取值",
        "known": "、".join(known) if name != QUERIES else "\n".join(known),
        "count": count,
    }
    requests = RequestList(
        section,
        grid.section_key,
        PROMPT,
        [({"suggest_values": name}, fields)],
        lambda request, text: read_values(text),
    )
    ((_, answer),) = answers_to(workspace, requests)
    return [] if "reason" in answer else read_values(answer["text"])


def read_values(text: str) -> list[str]:
    """The values that an answer lists: a list of JSON, or lines with numbers or bullets; MalformedError without any.

    What in a list is neither text nor a whole number is left out.
    """
    try:
        entries = read_json(text, {"type": "array", "minItems": 1})
        listed = [str(entry) for entry in entries if isinstance(entry, (str, int)) and not isinstance(entry, bool)]
    except MalformedError:
        listed = [line for line in text.splitlines() if _BULLET.match(line)]
    if not listed:
        raise MalformedError("no list of texts")
    return [_undressed(value) for value in listed]


def _undressed(value: str) -> str:
    bare = value[found.end() :].strip() if (found := _BULLET.match(value)) else value.strip()
    return next(filter(None, found.groups())) if (found := _DRESS.fullmatch(bare)) else bare


def _without_repeats(known: Sequence[str], proposed: Sequence[str]) -> list[str]:
    """The proposed values that are new, apart from width, case, spaces, punctuation and traditional characters."""
    seen = {_bare(value) for value in known}
    fresh = []
    for value in proposed:
        bare = _bare(value)
        if bare and bare not in seen and len(value) <= MAX_CHARACTERS and value.isprintable():
            seen.add(bare)
            fresh.append(value)
    return fresh


def _bare(value: str) -> str:
    bare: str = regex.sub(r"[^\p{L}\p{N}]", "", unicodedata.normalize("NFKC", value).casefold())
    return str(_simplifier().convert(bare))


@cache
def _simplifier() -> Any:
    import opencc  # an extra, which recipes that ask no model do without

    return opencc.OpenCC("t2s.json")


def _named(query: str) -> set[str]:
    """The fields of a phrasing; none where it has a lone brace."""
    try:
        return {field for _, field, _, _ in string.Formatter().parse(query) if field}
    except ValueError:
        return set()


def _fits(grid: Grid, name: str, value: str) -> bool:
    """Whether the recipe is sound with this value, and the map has a cell for it."""
    section = grid.section
    if name == QUERIES:
        if not set.intersection(*map(_named, section.queries)) <= _named(value):
            return False  # it says what each cell says for itself, such as one person's name, or leaves it out
        try:
            check_grid(section.model_copy(update={"queries": [*section.queries, value]}))
        except ValueError:
            return False
        return True
    alone = Grid(
        section.model_copy(update={"dimensions": {**section.dimensions, name: [value]}}), grid.seed, grid.passages
    )
    return next(alone.positions(), None) is not None
