"""The data sets of a recipe in the form in which evalscope takes them."""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place
from pipelines.errors import DataError
from pipelines.evaluate.questions import Question, folder_questions, held_out_questions
from pipelines.recipe.evaluate import Benchmark, Evaluate

QUESTION_ANSWERING = "general_qa"
SUBSET = "test"
"""The one subset under which questions and answers are given to evalscope."""


@dataclass(frozen=True)
class Dataset:
    """One data set: its name in the report, evalscope's name and arguments for it, and, where a person's answers are
    the reference, the questions themselves."""

    label: str
    benchmark: str
    arguments: dict[str, Any]
    questions: list[Question]

    @property
    def is_local(self) -> bool:
        """Whether evalscope needs no hub for it."""
        return "local_path" in self.arguments


def prepare(section: Evaluate, split: Output[SplitReport], system: str | None, place: Place) -> list[Dataset]:
    """Every data set of `evaluate.datasets`, written to the stage's folder where evalscope needs another form."""
    seen: Counter[str] = Counter()
    prepared = []
    for entry in section.datasets:
        seen[entry.benchmark] += 1
        number = seen[entry.benchmark]
        label = entry.benchmark if number == 1 else f"{entry.benchmark}-{number}"
        folder = place.local("questions", label)
        folder.mkdir(parents=True, exist_ok=True)
        if entry.benchmark not in ("test", QUESTION_ANSWERING):
            prepared.append(Dataset(label, entry.benchmark, _arguments(entry, folder), []))
            continue
        if entry.path is None:
            questions = held_out_questions(split, system, section.limit)
        else:
            questions = folder_questions(Path(entry.path), entry.subsets, system, section.limit)
        _write_questions(questions, folder / f"{SUBSET}.jsonl")
        arguments = {"local_path": str(folder), "subset_list": [SUBSET]}
        prepared.append(Dataset(label, QUESTION_ANSWERING, arguments, questions))
    return prepared


def _write_questions(questions: list[Question], file: Path) -> None:
    """The questions as evalscope's general_qa reads them."""
    rows = ({"messages": question.messages, "response": question.reference} for question in questions)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _arguments(entry: Benchmark, folder: Path) -> dict[str, Any]:
    given = {"subset_list": entry.subsets or None, "few_shot_num": entry.few_shot_num}
    arguments: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    if entry.path is not None:
        source = Path(entry.path).resolve()
        own = entry.benchmark.startswith("general_")  # read by evalscope itself, not through the library datasets
        arguments["local_path"] = str(source if own else _mirror(source, folder))
    return arguments


def _mirror(source: Path, folder: Path) -> Path:
    """Links to the files of `source`, with the README that says which file holds which subset and split.

    Links, because evalscope deletes a dataset_infos.json where it finds one.
    """
    for file in source.iterdir():
        if file.name != "dataset_infos.json":
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file)
    if not (source / "README.md").exists():
        (folder / "README.md").write_text(_index(source), encoding="utf-8")
    return folder


def _index(source: Path) -> str:
    """A README for files called SUBSET_SPLIT.jsonl, split being dev, val, test or train; DataError for other names."""
    configs: dict[str, list[dict[str, str]]] = {}
    for file in sorted(source.glob("*.jsonl")):
        match = re.fullmatch(r"(.+)_(dev|val|test|train)", file.stem)
        if match is None:
            raise DataError(f"{file}: not called SUBSET_SPLIT.jsonl; rename it, or describe the files in a README.md")
        configs.setdefault(match[1], []).append({"split": match[2], "path": file.name})
    if not configs:
        raise DataError(f"{source}: no *.jsonl files")
    listed = [{"config_name": name, "data_files": files} for name, files in configs.items()]
    return f"---\n{yaml.safe_dump({'configs': listed}, allow_unicode=True)}---\n"
