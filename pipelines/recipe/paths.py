"""The files and folders that a recipe reads and writes, as the types of its fields tell them."""

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from pipelines.errors import InputError
from pipelines.recipe.base import SHIPPED, ReadPath, Section, WrittenPath
from pipelines.recipe.dataset_info import entry_of, file_of, list_of


def paths_read(recipe: Section) -> dict[str, str]:
    """Every path that a recipe reads, by the key that names it, such as `clean.assets.lid.176.ftz`.

    Where a source is an entry of a list of data sets, the file that the entry names has the key `….file_name`.
    """
    return {key: path for named, text in _paths("", recipe, ReadPath) for key, path in _of_source(named, text)}


def paths_written(recipe: Section) -> dict[str, str]:
    """Every path outside the workspace that a recipe writes, by the key that names it, such as `export.path`."""
    return dict(_paths("", recipe, WrittenPath))


def shipped_path(source: str) -> str:
    """The path of a source that is shipped with the project, `recipes://FILE`; any other source as it is."""
    scheme, _, name = source.partition("://")
    return str(SHIPPED / name) if scheme == "recipes" else source


def _of_source(key: str, source: str) -> Iterator[tuple[str, str]]:
    info = list_of(source)
    yield key, info or source
    if info:
        with suppress(InputError):  # of a list that cannot be read, whoever reads the source says so
            if file := file_of(source, entry_of(source)):
                yield f"{key}.file_name", file


def _paths(prefix: str, section: Section, kind: type[ReadPath | WrittenPath]) -> Iterator[tuple[str, str]]:
    for name, field in type(section).model_fields.items():
        marks = [mark for mark in field.metadata if isinstance(mark, kind)]
        for key, value in _entries(f"{prefix}{name}", getattr(section, name)):
            if isinstance(value, Section):
                yield from _paths(f"{key}.", value, kind)
            elif isinstance(value, str) and marks and (path := marks[0].path_in(section, value)):
                yield key, path


def _entries(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """What a field holds, by key: the entries of a list or mapping, or the value itself."""
    if isinstance(value, list):
        for number, entry in enumerate(value):
            yield from _entries(f"{key}[{number}]", entry)
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _entries(f"{key}.{name}", entry)
    else:
        yield key, value
