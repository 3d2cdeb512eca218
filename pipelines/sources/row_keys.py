"""What each column of a source's row is: read by the adapter, carried along as it is, or a reason to refuse the row.

A column that an adapter does not read and that changes what the row means to those who train on it refuses the row by
its name. Every other column is carried: it is there for operators and exports, and not trained.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.artifacts.rows import ROW, TOOLS
from pipelines.errors import InputError
from pipelines.sources.adapters import ADAPTERS, SAID_OF_ROW, SYSTEM, Adapter
from pipelines.sources.turns import says_nothing

_PREFERENCE = (
    "it tells good answers from bad ones, for preference tuning, and here every answer is learnt from; leave the bad "
    "ones out and delete the column"
)
_MEDIA = "only text is trained, and the row needs what it points to; leave such rows out"
_MEANING = "it changes what the row says, and adapter {adapter} does not read it; rename the column, or delete it"
_MASK = (
    "it says which of the tokens are trained, which here each turn's loss says; mark the turns and delete the column"
)

REFUSED = {
    **dict.fromkeys(("chosen", "rejected", "kto_tag", "kto_label", "margin", "preference"), _PREFERENCE),
    **dict.fromkeys(("positive_messages", "negative_messages", "is_preferred", "is_desirable"), _PREFERENCE),
    **dict.fromkeys(("preferred_output", "non_preferred_output"), _PREFERENCE),
    **dict.fromkeys(("mask", "loss_mask", "label_mask", "completion_mask", "assistant_mask", "assistant_masks"), _MASK),
    **dict.fromkeys(("loss_scale", "loss_weight", "sample_weight"), _MASK),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios", "objects"), _MEDIA),
    **dict.fromkeys(
        ("history", "functions", "tool_calls", "function_call", "instruction", "chat_template_kwargs", *SAID_OF_ROW),
        _MEANING,
    ),
    **dict.fromkeys(("input", "context", *SYSTEM, "messages", "conversations", "conversation"), _MEANING),
    **dict.fromkeys(("query_role", "history_roles", "system_message"), _MEANING),
    **dict.fromkeys((*ROW.names, TOOLS.name), _MEANING),
    "pos": "column pos has the name that the order of the rows has here; rename it",
}
"""Why a column that is not read refuses a row in which it says something."""

LABEL = "label"
"""Tells good answers from bad ones where it is true, false, 0 or 1, as for KTO; any other label is carried."""
_VERDICTS = {"true", "false", "0", "1", "0.0", "1.0"}
_OURS = ("row_id", "pos")
"""Refused by these names alone: in other capital letters they mean something else."""

TURNS = ("messages", "conversations", "conversation", "chat")
"""Columns of turns, which a table of texts has empty where a row has none."""

OWN_KEYS = ("row_id", "id")
"""Columns that name a row."""


@dataclass
class Columns:
    """What the columns of rows with the same ones are."""

    adapters: list[str]
    """Adapters whose needed columns are all there, in the order in which they are tried."""
    own_key: str | None
    """The column that names the row."""
    guarded: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """By adapter, columns that refuse a row in which they say something, each with its usual name."""
    carried: dict[str, list[str]] = field(default_factory=dict)
    """By adapter, columns that are carried along."""
    given: set[tuple[str, ...]] = field(default_factory=set)
    """What adapters gave of such rows so far: their names, each with the columns that came out."""


def classify(names: Iterable[str], adapter: str, named_by: str | None = None) -> Columns:
    """What the columns of those names are; `adapter` is one of `ADAPTERS`, or auto.

    `named_by`: the column that names the row, in place of `row_id` or else `id`; an empty text for none.
    """
    names = [*names]
    given = names if named_by is None else [name for name in names if name == named_by]
    keys = OWN_KEYS if named_by is None else (named_by,)
    own_key = next((name for name in keys if name in given), None)
    tried = [adapter]
    if adapter == "auto":
        tried = [name for name in ADAPTERS if ADAPTERS[name].needs <= set(names)] or _nearest(set(names))
    columns = Columns(tried, own_key)
    for name in tried:
        others = [n for n in names if n not in ADAPTERS[name].uses and n != own_key]
        columns.guarded[name] = [(n, usual) for n in others if (usual := _usual_name(n))]
        columns.carried[name] = [n for n in others if _usual_name(n) in (None, LABEL)]
    return columns


def _usual_name(name: str) -> str | None:
    """The name among `REFUSED` that a column has, whatever its capital letters and blanks; None where it is carried.

    `rejectedResponse` is `rejected_response`.
    """
    if name in _OURS:
        return name
    usual = re.sub(r"[\s-]+|(?<=[a-z])(?=[A-Z])", "_", name.strip()).lower()
    if verdict := {"chosen", "rejected"} & {*usual.split("_")}:
        return verdict.pop()
    return usual if usual not in _OURS and (usual in REFUSED or usual == LABEL) else None


def refusal(name: str, value: Any, adapter: str) -> str | None:
    """Why a column that the adapter does not read refuses a row with that value in it; None where it is carried."""
    usual = _usual_name(name)
    return None if usual is None else _refusal(usual, value, adapter)


def _refusal(usual: str, value: Any, adapter: str) -> str | None:
    if value is None or says_nothing(value):
        return None
    if usual != LABEL:
        return REFUSED[usual].format(adapter=adapter)
    is_verdict = adapter != "text" and isinstance(value, bool | int | float | str)  # a text may be one of two kinds
    return _PREFERENCE if is_verdict and str(value).strip().lower() in _VERDICTS else None


def _nearest(names: set[str]) -> list[str]:
    """The adapter of whose needed columns most are there, so that it can say what is missing; none where none is."""
    share = {name: len(adapter.needs & names) / len(adapter.needs) for name, adapter in ADAPTERS.items()}
    best = max(share, key=lambda name: share[name])
    return [best] if share[best] else []


def adapter_for(columns: Columns, row: Mapping[str, Any]) -> tuple[str, Adapter]:
    """The adapter that reads a row: the first whose columns all say something, else the first.

    ValueError where there is none, or where a column that it does not read refuses the row.
    """
    if not columns.adapters:
        for name in row:
            if (why := refusal(name, row[name], "text")) in (_PREFERENCE, _MEDIA):
                raise ValueError(f"column {name}: {why}")
        raise ValueError(f"no adapter reads columns {', '.join(map(str, row))}")
    name = columns.adapters[0]
    if len(columns.adapters) > 1:
        for candidate in columns.adapters:
            if not any(_is_absent(needed, row[needed]) for needed in ADAPTERS[candidate].needs):
                name = candidate
                break
    for guarded, usual in columns.guarded[name]:
        if row[guarded] is not None and (why := _refusal(usual, row[guarded], name)):
            raise ValueError(
                f"column {guarded}: {why}; ingest.columns={{OTHER: {guarded!r}}} carries it under another name"
            )
    return name, ADAPTERS[name]


def _is_absent(column: str, value: Any) -> bool:
    """Whether a column is one of another schema's rows: empty text is a text, but it is no list of turns."""
    return says_nothing(value) and (value != "" or column in TURNS)


def renamed(row: dict[str, Any], columns: dict[str, str | None]) -> dict[str, Any]:
    """A row with the columns that the recipe names under the names that adapters read; a dot leads into a structure."""
    if not columns:
        return row
    found = {}
    taken = set()
    for name, given in columns.items():
        if given is None or name == "row_id":
            continue
        value, parts = row, [given] if given in row else given.split(".")
        for part in parts:
            value = value.get(part) if isinstance(value, dict) else None  # type: ignore[assignment]
        if len(parts) == 1:  # of a structure, the rest is carried
            taken.add(given)
        if parts[0] in row:
            found[name] = value
    if hidden := next((name for name in found if name in row and name not in taken), None):
        raise InputError(
            f"ingest.columns: {hidden} would take the place of the source's own column {hidden}; name both"
        )
    return {**{name: value for name, value in row.items() if name not in taken}, **found}
