"""How well cleaning decides, on rows labelled by hand, beside data-juicer on the same rows.

    python -m benchmarks.quality --data FOLDER --assets FOLDER [--peer data-juicer|dialect|none] [--mistakes]

For each operator, with the parameters of the recipe `zhihu`: precision and recall (for a filter what it drops, for
near-duplicates what it joins), for a mapper the share of texts that come out as labelled. Then the whole recipe's
filters and mappers over all rows. `--peer dialect` runs our `dialect: data_juicer`, which is bit-equal to data-juicer,
in its place. The rules of labelling stand in tests/data/labelled/README.md. The last line is one JSON object.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks.labelled import LabelledPair, LabelledText, labelled_pairs, labelled_texts
from benchmarks.peer_data_juicer import ASSETS, SIMHASH, check_peer, model_home, rows_of, run_peer, write_config
from pipelines.clean.dataset_ops import decide
from pipelines.clean.fused import apply
from pipelines.clean.operators import OPERATORS
from pipelines.clean.operators.registry import Dialect
from pipelines.clean.plan import Step, build_plan
from pipelines.recipe.load import shipped_recipes
from pipelines.report.page import environment
from pipelines.similarity.on_ray import find_near

FILTERS = {
    "language": ("language_id_score_filter",),
    "flagged_words": ("flagged_words_filter",),
    "perplexity": ("garbled_text_filter", "perplexity_filter"),
    "alphanumeric": ("alphanumeric_filter",),
    "promotion": ("promotion_filter",),
}
"""The operators that the labels of a file speak of."""
MAPPERS = {
    "html": "clean_html_mapper",
    "links": "clean_links_mapper",
    "promotion": "promotion_mapper",
    "personal_data": "personal_data_mapper",
}
BY_VOLUME = ("specified_numeric_field_filter", "text_length_filter", "topk_specified_field_selector")
"""Operators of the recipe that do not judge content."""
OURS = frozenset(
    {"garbled_text_filter", "promotion_filter", "promotion_mapper", "personal_data_mapper", "quotation_filter"}
)
"""Operators that data-juicer has not."""


@dataclass(frozen=True)
class Counts:
    """Right and wrong positive answers, and positives that were missed; `mistakes` are their rows."""

    right: int
    wrong: int
    missed: int
    mistakes: tuple[str, ...] = ()

    @property
    def precision(self) -> float | None:
        """The share of positive answers that are right; None where there is none."""
        return self.right / (self.right + self.wrong) if self.right + self.wrong else None

    @property
    def recall(self) -> float:
        """The share of positives that were found."""
        return self.right / (self.right + self.missed)

    def told(self) -> dict[str, Any]:
        """As JSON."""
        precision = None if self.precision is None else round(self.precision, 4)
        return {"precision": precision, "recall": round(self.recall, 4), "right": self.right, "wrong": self.wrong}


@dataclass(frozen=True)
class Equal:
    """Texts that came out as labelled."""

    equal: int
    rows: int
    mistakes: tuple[str, ...] = ()

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return {"equal": round(self.equal / self.rows, 4), "rows": self.rows}


Result = Counts | Equal


@dataclass(frozen=True)
class Side:
    """Whose operators answer: ours in a dialect, or data-juicer in an environment of its own."""

    dialect: Dialect
    assets: Mapping[str, str]
    peer_python: Path | None = None

    def texts(self, process: Sequence[Any], texts: Sequence[str], folder: Path) -> list[str | None]:
        """Each text as it comes out of the operators, None where it is dropped."""
        if self.peer_python is not None:
            return _through_data_juicer(self.peer_python, process, texts, folder)
        plan = build_plan(process, self.dialect, "response", self.assets)
        kept = apply(plan.phases[0].row_ops, _table([("", text) for text in texts]), "response").kept
        found = dict(zip(kept["pos"].to_pylist(), kept["response"].to_pylist(), strict=True))
        return [found.get(row) for row in range(len(texts))]

    def clusters(self, process: Sequence[Any], rows: Sequence[tuple[str, str]], folder: Path) -> list[int]:
        """For each row the first row of its cluster."""
        if self.peer_python is not None:
            kept = _through_data_juicer(self.peer_python, process, [answer for _, answer in rows], folder)
            return [row if text is not None else -1 for row, text in enumerate(kept)]
        plan = build_plan(process, self.dialect, "response", self.assets)
        steps: Sequence[Step] = plan.phases[0].dataset_ops
        outcome = apply((), _table(rows), "response", steps)
        decisions = decide(steps, outcome.keys.sort_by("pos"), reorder=False, find=find_near)
        first = np.arange(len(rows))
        first[decisions.clusters["pos"].to_numpy()] = decisions.clusters["cluster"].to_numpy()
        return [int(number) for number in first]


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds the real rows")
    parser.add_argument("--assets", type=Path, required=True, help=f"folder with {', '.join(ASSETS)}")
    parser.add_argument("--peer", choices=["data-juicer", "dialect", "none"], default="dialect")
    parser.add_argument("--peer-python", type=Path, default=Path(".peers/data-juicer/bin/python"))
    parser.add_argument("--mistakes", action="store_true", help="name the rows that our side gets wrong")
    options = parser.parse_args()
    if options.peer == "data-juicer":
        check_peer(options.peer_python)
    with tempfile.TemporaryDirectory(prefix="danlu-bench-") as temporary:
        folder = Path(temporary)
        os.environ.update(model_home(options.assets, folder / "models"))
        summary = compare(options, folder)
    print(json.dumps(summary, ensure_ascii=False))
    return 0


def compare(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Both sides' answers, as a table for people and as JSON."""
    assets = {name: str(options.assets / name) for name in ASSETS}
    ours = measured(Side("zh", assets), options.data, folder)
    peer: dict[str, Result] = {}
    if options.peer != "none":
        python = options.peer_python if options.peer == "data-juicer" else None
        peer = measured(Side("data_juicer", assets, python), options.data, folder)
    table = Table("measure", "ours", options.peer if peer else "", box=None)
    for name, result in ours.items():
        table.add_row(name, _words(result), _words(peer[name]) if name in peer else "")
    Console(width=120).print(table)
    if options.mistakes:
        for name, result in ours.items():
            print(f"{name}: {', '.join(result.mistakes)}")
    return {
        "name": "quality",
        "ours": {name: result.told() for name, result in ours.items()},
        "peer": {name: result.told() for name, result in peer.items()} or None,
        "peer_is": options.peer,
        "unit": "share of labelled rows",
        "environment": environment().model_dump(),
    }


def measured(side: Side, data: Path, folder: Path) -> dict[str, Result]:
    """Every measure that the side has operators for."""
    recipe = shipped_process()
    found: dict[str, Result] = {}
    for name, operators in FILTERS.items():
        if steps := [step_of(operator, recipe) for operator in operators if _has(side, operator)]:
            rows = labelled_texts(name, data)
            answers = side.texts(steps, [row.text for row in rows], folder)
            found[f"{name}, filter"] = _counts(rows, [answer is None for answer in answers])
    for name, operator in MAPPERS.items():
        if _has(side, operator):
            rows = labelled_texts(name, data)
            answers = side.texts([step_of(operator, recipe)], [row.text for row in rows], folder)
            found[f"{name}, mapper"] = _touched(rows, answers)
            found[f"{name}, texts"] = _equal(rows, answers)
    duplicates = [step for step in recipe if OPERATORS[_name(step)].kind == "deduplicator"]
    found["near_duplicates"] = _joined(side, duplicates, labelled_pairs(data), folder)
    found["whole recipe"] = _whole(side, recipe, data, folder)
    return found


def shipped_process() -> list[Any]:
    """The recipe `zhihu`'s operators that judge content; those by votes, length and rank are left out."""
    shipped = yaml.safe_load(shipped_recipes()["zhihu"].read_text(encoding="utf-8"))
    return [step for step in shipped["clean"]["process"] if _name(step) not in BY_VOLUME]


def _name(step: Any) -> str:
    return step if isinstance(step, str) else str(next(iter(step)))


def step_of(operator: str, recipe: Sequence[Any]) -> Any:
    """The operator as the recipe has it; with its defaults where the recipe has none."""
    return next((step for step in recipe if _name(step) == operator), operator)


def _has(side: Side, operator: str) -> bool:
    return operator in OPERATORS and (side.dialect == "zh" or operator not in OURS)


def _counts(rows: Sequence[LabelledText], dropped: Sequence[bool]) -> Counts:
    pairs = list(zip(rows, dropped, strict=True))
    return Counts(
        sum(row.label == "drop" and drop for row, drop in pairs),
        sum(row.label != "drop" and drop for row, drop in pairs),
        sum(row.label == "drop" and not drop for row, drop in pairs),
        tuple(row.id for row, drop in pairs if (row.label == "drop") != drop),
    )


def _lines(text: str) -> str:
    """A text as it is compared: blank space at the ends of lines, and kinds of space, are not judged."""
    return "\n".join(line.rstrip() for line in text.replace("\xa0", " ").strip().split("\n"))


def _equal(rows: Sequence[LabelledText], answers: Sequence[str | None]) -> Equal:
    same = [_lines(row.right) == _lines(answer or "") for row, answer in zip(rows, answers, strict=True)]
    return Equal(sum(same), len(rows), tuple(row.id for row, equal in zip(rows, same, strict=True) if not equal))


def _touched(rows: Sequence[LabelledText], answers: Sequence[str | None]) -> Counts:
    """A mapper as one that decides which texts to change."""
    changed = [_lines(answer or "") != _lines(row.text) for row, answer in zip(rows, answers, strict=True)]
    wanted = [_lines(row.right) != _lines(row.text) for row in rows]
    triples = list(zip(rows, wanted, changed, strict=True))
    return Counts(
        sum(want and change for _, want, change in triples),
        sum(change and not want for _, want, change in triples),
        sum(want and not change for _, want, change in triples),
        tuple(row.id for row, want, change in triples if want != change),
    )


def _joined(side: Side, process: Sequence[Any], pairs: Sequence[LabelledPair], folder: Path) -> Counts:
    """All rows of all pairs at once; a pair is joined if both are in one cluster."""
    if side.peer_python is not None:
        side = Side(side.dialect, side.assets)  # its output names no clusters; the dialect's are the same
    if side.dialect == "data_juicer":
        process = [_as_data_juicer(step) for step in process]
    first = side.clusters(process, [row for pair in pairs for row in (pair.first, pair.second)], folder)
    answers = [
        (pair, first[2 * number] == first[2 * number + 1], pair.label == "duplicate")
        for number, pair in enumerate(pairs)
    ]
    return Counts(
        sum(joined and same for _, joined, same in answers),
        sum(joined and not same for _, joined, same in answers),
        sum(same and not joined for _, joined, same in answers),
        tuple(pair.id for pair, joined, same in answers if joined != same),
    )


def _as_data_juicer(step: Any) -> Any:
    """A step without what only `zh` knows; its published deduplicator for another of ours."""
    return step if _name(step) == "document_simhash_deduplicator" else SIMHASH


def _whole(side: Side, recipe: Sequence[Any], data: Path, folder: Path) -> Counts:
    """Filters and mappers one after the other over all rows of the filters' files.

    A row counts as a positive if its label says drop. A row that its label keeps counts as wrong whatever drops it.
    """
    rows = [row for name in FILTERS for row in labelled_texts(name, data)]
    single = [step for step in recipe if OPERATORS[_name(step)].kind in ("filter", "mapper")]
    if side.dialect == "data_juicer":
        single = [step for step in single if _name(step) not in OURS]
    answers = side.texts(single, [row.text for row in rows], folder)
    dropped = [answer is None or not answer.strip() for answer in answers]
    return _counts(rows, dropped)


def _table(rows: Sequence[tuple[str, str]]) -> pa.Table:
    """Canonical rows of one turn."""
    queries, texts = [query for query, _ in rows], [text for _, text in rows]
    return pa.table(
        {
            "row_id": [str(row) for row in range(len(rows))],
            "pos": pa.array(range(len(rows)), pa.int64()),
            "query": queries,
            "response": texts,
        }
    )


def _through_data_juicer(python: Path, process: Sequence[Any], texts: Sequence[str], folder: Path) -> list[str | None]:
    source = folder / "labelled.parquet"
    pq.write_table(pa.table({"id": list(range(len(texts))), "response": list(texts)}), source)
    export = folder / "theirs" / "labelled.jsonl"
    run_peer(python, "dj-process", write_config(folder / "theirs.yaml", source, export, process), {})
    found = dict(rows_of(export, ("id", "response")))
    return [found.get(row) for row in range(len(texts))]


def _words(result: Result) -> str:
    if isinstance(result, Equal):
        return f"{result.equal / result.rows:.1%} of {result.rows} as labelled"
    precision = "no answer" if result.precision is None else f"precision {result.precision:.3f}"
    return f"{precision}, recall {result.recall:.3f} ({result.right} right, {result.wrong} wrong)"


if __name__ == "__main__":
    sys.exit(main())
