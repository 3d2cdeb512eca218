"""Entries of LLaMA-Factory's dataset_info.json: where a data set lies and what its columns are called."""

from collections.abc import Mapping
from typing import Any

from pipelines.errors import InputError
from pipelines.recipe.dataset_info import entry_of, file_of, list_of
from pipelines.recipe.ingest import Source
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
    if list_of(section.source) is None:
        return section
    entry = entry_of(section.source)
    try:
        found = _read(entry, file_of(section.source, entry))
    except ValueError as error:
        raise InputError(f"ingest.source {section.source}: {error}") from None
    columns = {**found.pop("columns"), **section.columns}
    return section.model_copy(update={**found, "columns": columns})


def _read(entry: Mapping[str, Any], file: str | None) -> dict[str, Any]:
    """The entry, whose data lie in the file or else on a hub, as keys of a section."""
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
    if file is not None:
        source = file
        del rest["file_name"]
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
