"""A person's own operators, from Python files that the recipe names."""

import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType

from pipelines.clean.operators import OPERATORS, Operator
from pipelines.errors import Problem


def load_operators(paths: Sequence[str]) -> tuple[dict[str, Operator], list[Problem]]:
    """The operators that the files register and that can be used, by name, and what is wrong with the others.

    A file is run, but its module is not entered in `sys.modules`: so its functions travel to workers by value, and
    these need no copy of the file.
    """
    found: dict[str, Operator] = {}
    problems: list[Problem] = []
    for index, path in enumerate(paths):
        here = f"clean.custom_operators[{index}]"
        registered = dict(OPERATORS)
        try:
            _run(path)
            own = {name: made for name, made in OPERATORS.items() if made is not registered.get(name)}
            flaws = [text for made in own.values() for text in _flaws(made)]
        except Exception as error:  # whatever a person's own file raises
            problems.append(Problem(here, f"{path} cannot be used ({type(error).__name__}: {error})"))
            continue
        finally:
            OPERATORS.clear()
            OPERATORS.update(registered)
        if not own:
            problems.append(Problem(here, f"{path} registers no operator; see docs/operators.md"))
        taken = own.keys() & {*registered, *found}
        problems += [Problem(here, f"{path}: another operator has the name {name}") for name in sorted(taken)]
        problems += [Problem(here, f"{path}: {text}") for text in flaws]
        found |= {name: made for name, made in own.items() if not flaws and name not in taken}
    return found, problems


def _run(path: str) -> None:
    file = Path(path).expanduser()
    module = ModuleType(file.stem)
    module.__file__ = str(file)
    exec(compile(file.read_text(encoding="utf-8"), str(file), "exec"), module.__dict__)


def _flaws(made: Operator) -> Iterator[str]:
    parameters = inspect.signature(made.function, eval_str=True).parameters.values()
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.annotation is inspect.Parameter.empty:
            yield f"parameter {parameter.name} of {made.name} has no type, so that a recipe cannot be checked"
    if made.kind == "deduplicator" and made.cluster is None:
        yield f"{made.name} is a deduplicator and needs a function cluster"
