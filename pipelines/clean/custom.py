"""A person's own operators, from Python files that the recipe names."""

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, update_wrapper
from pathlib import Path
from types import ModuleType
from typing import Any

from pipelines.clean.operators import OPERATORS, Operator
from pipelines.errors import Problem

CALLABLE_FIELDS = ("function", "assets", "check", "cluster", "overlap")
"""What of an operator a person's file may define."""


@dataclass(frozen=True)
class Source:
    """A file with operators, and the modules beside it that it imports, as text: what workers run it from."""

    path: str
    text: str
    helpers: tuple[tuple[str, str], ...] = ()
    """Name and text of each."""

    @property
    def digest(self) -> str:
        """SHA-256 of the file, or of all files where it imports some of its neighbours."""
        parts = [self.text, *(f"{name}\n{text}" for name, text in self.helpers)] if self.helpers else [self.text]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class FromFile:
    """A function of a person's file, which reaches a worker as the file's text.

    So it may use what cannot be pickled: caches, locks, modules of its own folder.
    """

    def __init__(self, source: Source, operator: str, field: str, function: Callable[..., Any]) -> None:
        self.source, self.operator, self.field, self.function = source, operator, field, function
        update_wrapper(self, function)

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """Run the function."""
        return self.function(*args, **keywords)

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.source, self.operator, self.field)


def _restored(source: Source, operator: str, field: str) -> FromFile:
    return FromFile(source, operator, field, getattr(_registered(source)[operator], field))


def load_operators(paths: Sequence[str]) -> tuple[dict[str, Operator], list[Problem]]:
    """The operators that the files register and that can be used, by name, and what is wrong with the others."""
    found: dict[str, Operator] = {}
    problems: list[Problem] = []
    for index, path in enumerate(paths):
        here = f"clean.custom_operators[{index}]"
        try:
            source = source_of(path)
            own = _registered(source)
            flaws = [text for made in own.values() for text in _flaws(made)]
        except Exception as error:  # whatever a person's own file raises
            problems.append(Problem(here, f"{path} cannot be used ({type(error).__name__}: {error})"))
            continue
        if not own:
            problems.append(Problem(here, f"{path} registers no operator; see docs/operators.md"))
        taken = own.keys() & {*OPERATORS, *found}
        problems += [Problem(here, f"{path}: another operator has the name {name}") for name in sorted(taken)]
        problems += [Problem(here, f"{path}: {text}") for text in flaws]
        usable = own.items() if not flaws else ()
        found |= {name: _travelling(source, made) for name, made in usable if name not in taken}
    return found, problems


def source_of(path: str) -> Source:
    """A file's text and that of its neighbours that it imports; it is run for that, and OSError says it is missing."""
    file = Path(path).expanduser().resolve()
    source = Source(str(file), file.read_text(encoding="utf-8"))
    neighbours = {other.stem: other for other in file.parent.glob("*.py") if other != file}
    neighbours |= {other.parent.name: other for other in file.parent.glob("*/__init__.py")}
    with _importing_from(file.parent, neighbours):
        _run(source)
        used = {name for name in sys.modules if name.split(".")[0] in neighbours and _lies_in(name, file.parent)}
    helpers = {name: str(sys.modules[name].__file__) for name in sorted(used)}
    texts = ((name, Path(place).read_text(encoding="utf-8")) for name, place in helpers.items())
    return replace(source, helpers=tuple(texts))


def _lies_in(module: str, folder: Path) -> bool:
    place = getattr(sys.modules[module], "__file__", None)
    return place is not None and folder in Path(place).parents


@contextmanager
def _importing_from(folder: Path, neighbours: dict[str, Path]) -> Iterator[None]:
    """Let modules of the folder be imported, and those of the same names from another person's folder be forgotten."""
    for name in [name for name in sys.modules if name.split(".")[0] in neighbours]:
        if not _lies_in(name, folder) and not _is_installed(name):
            del sys.modules[name]
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _is_installed(module: str) -> bool:
    place = getattr(sys.modules[module], "__file__", None)
    return place is None or "site-packages" in place or place.startswith(sys.base_prefix)


@cache
def _registered(source: Source) -> dict[str, Operator]:
    """What the file registers; in a worker, to which only its text came, its neighbours are made from theirs."""
    for name, text in source.helpers:
        if name not in sys.modules:
            module = ModuleType(name)
            module.__path__ = []  # type: ignore[attr-defined]  # so that modules inside it are found by name
            sys.modules[name] = module
            exec(compile(text, f"{name}.py", "exec"), module.__dict__)
    return _run(source)


def _run(source: Source) -> dict[str, Operator]:
    registered = dict(OPERATORS)
    module = ModuleType(Path(source.path).stem)
    module.__file__ = source.path
    try:
        exec(compile(source.text, source.path, "exec"), module.__dict__)
        return {name: made for name, made in OPERATORS.items() if made is not registered.get(name)}
    finally:
        OPERATORS.clear()
        OPERATORS.update(registered)


def _travelling(source: Source, made: Operator) -> Operator:
    """The operator with functions that reach workers as the file's text."""
    given = {field: getattr(made, field) for field in CALLABLE_FIELDS}
    own: dict[str, Any] = {
        field: FromFile(source, made.name, field, function)
        for field, function in given.items()
        if function is not None and getattr(function, "__module__", None) == Path(source.path).stem
    }
    return replace(made, **own)


def _flaws(made: Operator) -> Iterator[str]:
    parameters = inspect.signature(made.function, eval_str=True).parameters.values()
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.annotation is inspect.Parameter.empty:
            yield f"parameter {parameter.name} of {made.name} has no type, so that a recipe cannot be checked"
    if made.kind == "deduplicator" and made.cluster is None:
        yield f"{made.name} is a deduplicator and needs a function cluster"
