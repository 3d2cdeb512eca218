"""LLaMA-Factory's list of data sets, dataset_info.json, whose entries a recipe may name as sources."""

import json
import posixpath
import re
from typing import Any

import fsspec

from pipelines.errors import InputError, nearest

_NAMED = re.compile(r"(.*dataset_info\.json)#(.+)")
"""A source that is an entry of a list."""


def list_of(source: str) -> str | None:
    """The list that a source names an entry of, None for any other source."""
    match = _NAMED.fullmatch(source)
    return match[1] if match else None


def entry_of(source: str) -> dict[str, Any]:
    """The entry that a source names, as it stands; InputError where there is none."""
    match = _NAMED.fullmatch(source)
    assert match is not None
    path, name = match.groups()
    try:
        with fsspec.open(path, "rb") as stream:
            entries = json.load(stream)
    except (OSError, ValueError) as error:
        raise InputError(f"ingest.source {path}: cannot be read ({error})") from None
    if not isinstance(entries, dict):
        raise InputError(f"ingest.source {path}: not a JSON object whose keys name data sets")
    if not isinstance(entries.get(name), dict):
        raise InputError(f"ingest.source {source}: no such entry; {nearest(name, entries)}")
    entry: dict[str, Any] = entries[name]
    return entry


def file_of(source: str, entry: dict[str, Any]) -> str | None:
    """The path of the entry's file, which lies beside the list; None where it lies on a hub."""
    name = entry.get("file_name")
    return posixpath.join(posixpath.dirname(list_of(source) or ""), name) if name and isinstance(name, str) else None
