"""A person's file with operators, read without running it: its text, the modules it imports, what it declares.

A recipe may come from somebody else: `danlu check` looks at it before anything of it is run.
"""

import ast
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pipelines.clean.operators import OPERATORS, Operator
from pipelines.clean.operators.registry import Count, Kind, PositiveCount, Ratio, Regex
from pipelines.errors import Problem

TYPES: Mapping[str, Any] = {
    **{kind.__name__: kind for kind in (bool, dict, float, int, list, set, str, tuple)},
    "Any": Any,
    "Literal": Literal,
    **{"Ratio": Ratio, "Count": Count, "PositiveCount": PositiveCount, "Regex": Regex},
}
"""Names that stand for themselves in the type of a parameter; what else stands there is known when the file is run."""

IN_TYPES = (ast.Name, ast.Constant, ast.Subscript, ast.BinOp, ast.BitOr, ast.Tuple, ast.Load)
"""What types are written with: nothing that calls or looks up."""


@dataclass(frozen=True)
class Source:
    """A file with operators, and the modules and packages beside it that it imports, as text: what workers run."""

    path: str
    text: str
    helpers: tuple[tuple[str, str], ...] = ()
    """Path from the file's folder and text of each."""

    @property
    def digest(self) -> str:
        """SHA-256 of the file, or of all files where it imports some of its neighbours."""
        parts = [self.text, *(f"{name}\n{text}" for name, text in self.helpers)] if self.helpers else [self.text]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def source_of(path: str) -> Source:
    """A file's text and that of its neighbours that it imports, wherever in them; OSError where it is missing,
    SyntaxError where one of them is not Python."""
    file = Path(path).expanduser().resolve()
    text = file.read_text(encoding="utf-8")
    helpers: dict[Path, str] = {}
    waiting = [(file, text)]
    while waiting:
        for found in _neighbours(file.parent, *waiting.pop()):
            if found != file and found not in helpers:
                helpers[found] = found.read_text(encoding="utf-8")
                waiting.append((found, helpers[found]))
    texts = sorted((found.relative_to(file.parent).as_posix(), text) for found, text in helpers.items())
    return Source(str(file), text, tuple(texts))


def _neighbours(folder: Path, file: Path, text: str) -> Iterator[Path]:
    """The files below the folder that a file's imports name, packages' own included."""
    package = file.parent.relative_to(folder).parts
    for node in ast.walk(ast.parse(text, str(file))):
        if isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            base += node.module.split(".") if node.module else []
            names = [base, *([*base, alias.name] for alias in node.names)]
        else:
            continue
        for name in names:
            for end in range(1, len(name) + 1):
                place = folder.joinpath(*name[:end])
                yield from (one for one in (place.with_suffix(".py"), place / "__init__.py") if one.is_file())


def declared_operators(paths: Sequence[str]) -> tuple[dict[str, Operator], list[Problem]]:
    """The operators that the files declare, by name, and what is wrong with the files; nothing of them is run.

    Operators are functions at the top of a file with `@operator(…)`. Those returned have the parameters of the
    declared ones, for recipes to be checked against, and cannot be called.
    """
    return operators_of(paths, lambda source: {made.name: made for made in _declared(source)})


def operators_of(
    paths: Sequence[str], read: Callable[[Source], dict[str, Operator]]
) -> tuple[dict[str, Operator], list[Problem]]:
    """The operators that `read` finds in the files, by name, and what is wrong with files that cannot be used."""
    found: dict[str, Operator] = {}
    problems: list[Problem] = []
    for index, path in enumerate(paths):
        here = f"clean.custom_operators[{index}]"
        try:
            own = read(source_of(path))
            wrong = _wrong_with(path, own, found)
        except Exception as error:  # whatever a person's own file raises
            problems.append(Problem(here, f"{path} cannot be used ({type(error).__name__}: {error})"))
            continue
        problems += [Problem(here, f"{path}{text}") for text in wrong]
        found |= {} if wrong else own
    return found, problems


def _wrong_with(path: str, own: Mapping[str, Operator], others: Mapping[str, Operator]) -> list[str]:
    """Why the operators of a file cannot be used beside ours and those of other files; to be read after its name."""
    if not own:
        return [" registers no operator; see docs/operators.md"]
    taken = sorted(own.keys() & {*OPERATORS, *others})
    flaws = [text for made in own.values() for text in _flaws(made)]
    return [f": another operator has the name {name}" for name in taken] + [f": {text}" for text in flaws]


def _flaws(made: Operator) -> Iterator[str]:
    for parameter in inspect.signature(made.function, eval_str=True).parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.annotation is inspect.Parameter.empty:
            yield f"parameter {parameter.name} of {made.name} has no type, so that a recipe cannot be checked"
    if made.kind == "deduplicator" and made.cluster is None:
        yield f"{made.name} is a deduplicator and needs a function cluster"


def _declared(source: Source) -> Iterator[Operator]:
    for node in ast.parse(source.text, source.path).body:
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).split(".")[-1] == "operator":
                assert isinstance(node, ast.FunctionDef)
                yield _made(node, decorator)


def _made(node: ast.FunctionDef, decorator: ast.Call) -> Operator:
    named = {keyword.arg: keyword.value for keyword in decorator.keywords}
    kind = _literal(decorator.args[0] if decorator.args else named.get("kind"), "mapper")
    if kind not in get_args(Kind):
        raise ValueError(f"operator {node.name}: {kind!r} is no kind; it is one of {', '.join(get_args(Kind))}")

    def function(*_: Any, **__: Any) -> Any:
        raise RuntimeError(f"{node.name} was read, and not loaded")

    column = inspect.Parameter("column", inspect.Parameter.POSITIONAL_ONLY)
    parameters = [column, *_parameters(node.args)]
    function.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # inspect reads it
    version, reads = _literal(named.get("version"), 1), _literal(named.get("reads"), "text")
    return Operator(node.name, kind, function, version, reads, cluster=function if "cluster" in named else None)


def _parameters(arguments: ast.arguments) -> Iterator[inspect.Parameter]:
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        value = inspect.Parameter.empty if default is None else _literal(default, None)
        yield inspect.Parameter(
            argument.arg, inspect.Parameter.KEYWORD_ONLY, default=value, annotation=_type(argument.annotation)
        )


def _literal(node: ast.expr | None, other: Any) -> Any:
    """The value that is written there, the other where there is none or it has to be computed."""
    try:
        return other if node is None else ast.literal_eval(node)
    except ValueError:
        return other


def _type(node: ast.expr | None) -> Any:
    """The type that is written there, Any where only running the file tells it."""
    if node is None:
        return inspect.Parameter.empty
    if not all(isinstance(part, IN_TYPES) for part in ast.walk(node)):
        return Any
    if not all(part.id in TYPES for part in ast.walk(node) if isinstance(part, ast.Name)):
        return Any
    try:
        return eval(compile(ast.Expression(node), "type", "eval"), {"__builtins__": {}}, dict(TYPES))
    except TypeError:
        return Any
