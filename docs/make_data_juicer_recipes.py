r"""Write docs/data-juicer-recipes.md from snapshots of data-juicer's repository and its hub of recipes.

    python docs/make_data_juicer_recipes.py data-juicer@COMMIT=FOLDER data-juicer-hub@COMMIT=FOLDER \
        > docs/data-juicer-recipes.md

A text recipe is a YAML with operators outside tests, none of which reads images, video or audio.
"""

import contextlib
import io
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from pipelines.errors import InputError, Problem, RecipeError
from rayjobs.pipeline import load

OTHER_MEDIA = re.compile(r"image|video|audio|img|sdxl|vlm|mllm|phrase_grounding")
NOT_HERE = re.compile(r"needs the (file|tokenizer|package) |no file like ")
"""Problems of a machine that has not the model files or word lists, which count as no problem here."""
HEAD = """# data-juicer's published recipes

Which of the text recipes of data-juicer's repository and of its hub `danlu check` takes as they are, without a change.
A model file or word list that is missing on this machine counts as there. What is not taken is said by name; nothing is
left out in silence.
"""


def recipes_in(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The text recipes below a folder, by their path in it."""
    for path in sorted(folder.rglob("*.yaml")):
        name = path.relative_to(folder).as_posix()
        if name.startswith(("tests/", ".github/")):
            continue
        try:
            tree = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError:
            continue
        process = tree.get("process") if isinstance(tree, dict) else None
        if not isinstance(process, list) or not process:
            continue
        operators = [step if isinstance(step, str) else next(iter(step)) for step in process]
        if not any(OTHER_MEDIA.search(operator) for operator in operators):
            yield name, tree


def problems_of(path: Path) -> list[Problem]:
    """What is wrong with a recipe on every machine."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            load(str(path))
    except RecipeError as error:
        return [problem for problem in error.problems if not NOT_HERE.search(problem.message)]
    except InputError as error:
        return [Problem("", str(error))]
    return []


def _told(problem: Problem) -> str:
    if problem.message == "data-juicer's, not in Danlu":
        return f"no `{problem.key.rpartition('.')[2]}`"
    return f"`{problem.key}`: {problem.message.partition(';')[0]}"


def page(folders: dict[str, Path]) -> str:
    """The whole page."""
    lines, passed, total = [], 0, 0
    for source, folder in folders.items():
        lines += ["", f"## {source}", "", "| recipe | operators | `danlu check` |", "| --- | --- | --- |"]
        for name, tree in recipes_in(folder):
            problems = problems_of(folder / name)
            told = "; ".join(dict.fromkeys(map(_told, problems))) or "valid"
            lines.append(f"| {name} | {len(tree['process'])} | {told} |")
            passed, total = passed + (not problems), total + 1
    return "\n".join([HEAD, f"**{passed} of {total} are valid.**", *lines]) + "\n"


if __name__ == "__main__":
    print(page({name: Path(folder) for name, _, folder in (given.partition("=") for given in sys.argv[1:])}), end="")
