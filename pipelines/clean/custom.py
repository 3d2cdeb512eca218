"""A person's own operators, from Python files that the recipe names: run, and sent to workers as text."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, update_wrapper
from importlib.abc import ExecutionLoader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_file_location
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import Any

from pipelines.clean.custom_source import Source, operators_of
from pipelines.clean.operators import OPERATORS, Operator
from pipelines.errors import Problem

CALLABLE_FIELDS = ("function", "assets", "check", "cluster", "overlap")
"""What of an operator a person's file may define."""


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
    """Run the files: the operators that they register and that can be used, by name, and what is wrong with others."""
    return operators_of(
        paths, lambda source: {name: _travelling(source, made) for name, made in _registered(source).items()}
    )


class _Helpers(MetaPathFinder, ExecutionLoader):
    """Imports the modules beside a person's file from their texts, on workers too, to which only these came."""

    def __init__(self, source: Source) -> None:
        folder = Path(source.path).parent
        self._modules = {
            ".".join(PurePosixPath(name.removesuffix("/__init__.py").removesuffix(".py")).parts): (folder / name, text)
            for name, text in source.helpers
        }

    @contextmanager
    def at_hand(self) -> Iterator[None]:
        """Let them be imported, and modules of the same names from another person's folder be forgotten."""
        for name in self._modules:
            if name in sys.modules and not _is_installed(name):
                del sys.modules[name]
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        """Where the module is, if it is one of them."""
        if fullname not in self._modules:
            # a folder without __init__.py is a package too, where a module in it is imported
            inside = any(name.startswith(f"{fullname}.") for name in self._modules)
            return ModuleSpec(fullname, None, is_package=True) if inside else None
        file, _ = self._modules[fullname]
        folders = [str(file.parent)] if file.name == "__init__.py" else None
        return spec_from_file_location(fullname, file, loader=self, submodule_search_locations=folders)

    def get_filename(self, fullname: str) -> str:
        """The file that the module's text came from."""
        return str(self._modules[fullname][0])

    def get_source(self, fullname: str) -> str:
        """Its text."""
        return self._modules[fullname][1]


def _is_installed(module: str) -> bool:
    place = getattr(sys.modules[module], "__file__", None)
    return place is None or "site-packages" in place or place.startswith(sys.base_prefix)


@cache
def _registered(source: Source) -> dict[str, Operator]:
    """What the file registers."""
    with _Helpers(source).at_hand():
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
