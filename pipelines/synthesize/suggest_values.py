"""More values for a dimension, or more phrasings of the training input, as a model proposes them: a person accepts."""

import unicodedata
from collections.abc import Sequence

import regex
import yaml

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import InputError, nearest
from pipelines.llm.dispatch import answers_to
from pipelines.llm.json_answers import read_json
from pipelines.llm.requests import RequestList
from pipelines.recipe.llm import Sampling
from pipelines.recipe.synthesize import check_grid
from pipelines.synthesize.grid import Grid

QUERIES = "queries"
ROUNDS = 5
"""How often the model is asked for more, at most."""
MAX_CHARACTERS = 60
"""A value longer than this is no value but a sentence."""
VALUES = {"type": "array", "items": {"type": "string"}, "minItems": 1}
PROMPT = """要用下面这样的提示词批量生成文本：
“{example}”

{what}目前有：
{known}

请再想出 {count} 个不同的，同样具体、同样写法，不要和已有的重复或只差一个字。
只回答 JSON，一个字符串列表：["…", "…"]"""


def suggest_values(workspace: Workspace, grid: Grid, name: str, count: int) -> tuple[str, int]:
    """Ask the model for `count` more values; returns the longer list as YAML for a recipe, and how many are new.

    New values leave all prompts as they are that were asked before. What repeats a value or fits no cell of the map is
    left out. InputError for a name of which that does not hold. The answers are kept in the ledger.
    """
    section = grid.section
    if not section.endpoints:
        raise InputError("synthesize.endpoints: values are asked of an API; name one")
    names = [*section.dimensions, QUERIES]
    if name not in names:
        raise InputError(f"--suggest-values: {name} is no dimension, nor queries; {nearest(name, names)}")
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
        lambda request, text: read_json(text, VALUES),
    )
    ((_, answer),) = answers_to(workspace, requests)
    return [] if "reason" in answer else list(read_json(answer["text"], VALUES))


def _without_repeats(known: Sequence[str], proposed: Sequence[str]) -> list[str]:
    """The proposed values that are new, apart from width, case, spaces and punctuation, as they are to be written."""
    seen = {_bare(value) for value in known}
    fresh = []
    for value in map(str.strip, proposed):
        bare = _bare(value)
        if bare and bare not in seen and len(value) <= MAX_CHARACTERS and "\n" not in value:
            seen.add(bare)
            fresh.append(value)
    return fresh


def _bare(value: str) -> str:
    bare: str = regex.sub(r"[^\p{L}\p{N}]", "", unicodedata.normalize("NFKC", value).casefold())
    return bare


def _fits(grid: Grid, name: str, value: str) -> bool:
    """Whether the recipe is sound with this value, and the map has a cell for it."""
    section = grid.section
    if name == QUERIES:
        try:
            check_grid(section.model_copy(update={"queries": [*section.queries, value]}))
        except ValueError:
            return False
        return True
    alone = Grid(
        section.model_copy(update={"dimensions": {**section.dimensions, name: [value]}}), grid.seed, grid.passages
    )
    return next(alone.positions(), None) is not None
