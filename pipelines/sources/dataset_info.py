"""Entries of LLaMA-Factory's dataset_info.json: where a data set lies and what its columns are called."""

import json
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

import fsspec

from pipelines.errors import InputError, nearest
from pipelines.recipe.ingest import INFO, Source
from pipelines.sources.turns import ROLES, says_nothing

COLUMNS = {
    "alpaca": {
        **{"prompt": "instruction", "query": "input", "response": "output"},
        **{"history": "history", "system": "system", "tools": "tools"},
    },
    "sharegpt": {"messages": "conversations", "system": "system", "tools": "tools"},
}
"""What entries call columns, by formatting, and what our adapters do, as LLaMA-Factory does where nothing is said."""
HUBS = {"hf_hub_url": "hf://", "ms_hub_url": "modelscope://"}
TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "observation_tag": "tool",
    "function_tag": "call",
    "system_tag": "system",
}


def resolved(section: Source) -> Source:
    """A section whose source is an entry, `dataset_info.json#NAME`, as one that names the entry's data and columns.

    InputError where the entry says something that is not read.
    """
    match = INFO.fullmatch(section.source)
    if match is None:
        return section
    path, name = match.groups()
    try:
        with fsspec.open(path, "rb") as stream:
            entries = json.load(stream)
    except (OSError, ValueError) as error:
        raise InputError(f"ingest.source {path}: cannot be read ({error})") from None
    if not isinstance(entries, dict) or not isinstance(entries.get(name), dict):
        raise InputError(f"ingest.source {section.source}: no such entry; {nearest(name, entries)}")
    try:
        found = _read(entries[name], path)
    except ValueError as error:
        raise InputError(f"ingest.source {section.source}: {error}") from None
    columns = {**found.pop("columns"), **section.columns}
    return section.model_copy(update={**found, "columns": columns})


def _read(entry: Mapping[str, Any], path: str) -> dict[str, Any]:
    """The entry as keys of a section."""
    rest = {key: value for key, value in entry.items() if not says_nothing(value) and value is not False}
    formatting = rest.pop("formatting", "alpaca")
    if formatting not in COLUMNS:
        raise ValueError(f"formatting {formatting!r} is not alpaca or sharegpt")
    if "ranking" in rest:
        raise ValueError("ranking: it tells good answers from bad ones, for preference tuning")
    names = {**rest.pop("columns", {})}
    ours = COLUMNS[formatting]
    if odd := next((name for name in names if name not in ours), None):
        raise ValueError(f"columns.{odd} is not read")
    _require_known(rest.pop("tags", {}))
    if "file_name" in rest:
        source = str(PurePosixPath(path).parent / rest.pop("file_name"))
    else:
        hub = next((hub for hub in HUBS if hub in rest), None)
        if hub is None:
            raise ValueError(f"has neither file_name nor {' nor '.join(HUBS)}")
        source = HUBS[hub] + rest.pop(hub)
        for other in HUBS:
            rest.pop(other, None)  # the same data on another hub
    if rest:
        raise ValueError(f"{next(iter(rest))} is not read")
    columns = {ours[name]: given for name, given in names.items() if not says_nothing(given) and given != ours[name]}
    if columns.get("conversations") == "messages":  # which are read by that name too
        del columns["conversations"]
    return {"source": source, "columns": columns}


def _require_known(tags: Mapping[str, Any]) -> None:
    """ValueError for names of keys and roles that the adapter does not take for what they are here."""
    for tag, value in tags.items():
        if tag in TAGS:
            is_known = ROLES.get(value) == TAGS[tag]
        else:
            is_known = value in {"role_tag": ("from", "role"), "content_tag": ("value", "content")}.get(tag, ())
        if not is_known:
            raise ValueError(f"tags.{tag} {value!r} is not read")
