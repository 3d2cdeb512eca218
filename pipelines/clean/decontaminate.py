"""Rows that hold a text of an evaluation set: they would be trained on what the model is then asked.

The sets are those that the recipe names: folders of `evaluate.datasets`, and `split.test_source`. Each text of theirs
is looked for in questions and in answers, before any operator runs.
"""

import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from pipelines.artifacts.reports.clean import ComparedSet, OperatorStats
from pipelines.clean.column import Column, Indices
from pipelines.clean.operators.registry import Operator, Verdict
from pipelines.clean.plan import Plan, Step
from pipelines.errors import InputError
from pipelines.recipe.ingest import Source
from pipelines.similarity.containment import KnownTexts
from pipelines.sources.dataset_info import resolved
from pipelines.sources.files import digest_file, is_hub, list_files, sample_rows

NAME = "decontamination_filter"
MOST_SHARED = 0.6
"""A row goes that holds more of a text's runs of ten letters."""
FEW_ROWS, COMMON = 3, 0.05
"""A text in more rows than these, and than this share of them, is no question of its own."""
SHOWN = 40
"""Characters of the text that the reason quotes."""


@dataclass(frozen=True)
class EvaluationSets:
    """The evaluation sets that a recipe names."""

    places: Mapping[str, str]
    """Files, folders or entries of a list of data sets, by the name that reports call them."""
    fetched: tuple[str, ...] = ()
    """Those that only evalscope fetches, by name: rows are not compared with them."""

    def fingerprint(self) -> dict[str, Any]:
        """What is looked for: the files' content; of a hub's its name, since naming it must not download it."""
        sources = {name: _source_of(place) for name, place in self.places.items()}
        return {
            name: source if is_hub(source) else [digest_file(path) for path in list_files(source)]
            for name, source in sources.items()
        }

    @cached_property
    def texts(self) -> dict[str, list[str]]:
        """Every text of each set once; InputError where its files cannot be read."""
        return {name: _texts_in(name, place) for name, place in self.places.items()}


NO_SETS = EvaluationSets({})


def _source_of(place: str) -> str:
    """Where the rows lie: of an entry of a list of data sets its file or hub."""
    return resolved(Source(source=place)).source


def _texts_in(name: str, place: str) -> list[str]:
    """The different texts of a set's rows, but for those that so many rows have that they are a prompt's frame."""
    try:
        files = list_files(_source_of(place))
    except InputError as error:
        raise InputError(f"clean.decontaminate: {name}: {error}") from None
    rows = [row for path in files for row in sample_rows(path, sys.maxsize)]
    counts = Counter(text for row in rows for text in set(_strings(row)))
    return [text for text, count in counts.items() if count <= max(FEW_ROWS, COMMON * len(rows))]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _strings(part)
    elif isinstance(value, list):
        for part in value:
            yield from _strings(part)


def decontaminated(plan: Plan, sets: EvaluationSets) -> Plan:
    """The plan with a step for each set and each side of a conversation before all others."""
    steps = [
        Step(index, OPERATOR, {}, key, {"known": known, "texts": texts, "name": name}, if_missing="keep")
        for index, (name, known, texts, key) in enumerate(_looked_for(plan, sets), start=len(plan.steps))
    ]
    first = replace(plan.phases[0], row_ops=(*steps, *plan.phases[0].row_ops))
    return replace(plan, phases=(first, *plan.phases[1:]))


def _looked_for(plan: Plan, sets: EvaluationSets) -> Iterator[tuple[str, KnownTexts, list[str], str]]:
    for name, texts in sets.texts.items():
        known = KnownTexts(texts)
        for key in dict.fromkeys(("query", plan.text_key)):
            yield name, known, texts, key


def compared(plan: Plan, sets: EvaluationSets, operators: list[OperatorStats]) -> list[ComparedSet]:
    """What was looked for, and how many rows went for it."""
    dropped = {entry.index: entry.rows_in - entry.rows_out for entry in operators}
    steps = [step for step in plan.steps if step.operator is OPERATOR]
    found = []
    for name, texts in sets.texts.items():
        own = [step for step in steps if step.filled_in["name"] == name]
        too_short = own[0].filled_in["known"].too_short
        rows = sum(dropped[step.index] for step in own)
        found.append(ComparedSet(name=name, texts=len(texts), too_short=too_short, rows_dropped=rows))
    return found


def _decontamination_filter(column: Column, *, known: KnownTexts, texts: list[str], name: str) -> Verdict:
    """Drop texts that hold more than `MOST_SHARED` of a text of an evaluation set."""
    found = known.found_in(column.array)
    shares = np.zeros(len(column))
    for row, (_, share) in found.items():
        shares[row] = share

    def reasons(rows: Indices) -> list[str]:
        quoted = [(found[row][1], texts[found[row][0]]) for row in rows.tolist()]
        return [f"holds {share:.0%} of a text of {name}: {text[:SHOWN]}" for share, text in quoted]

    return Verdict(shares <= MOST_SHARED, {f"overlap with {name}": shares}, reasons)


OPERATOR = Operator(NAME, "filter", _decontamination_filter, version=2)
