"""What every model is asked, and the answer a person gave: from the test split, the recipe, or a folder of JSONL."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.rows import messages_of
from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.stage import Output
from pipelines.errors import DataError


@dataclass(frozen=True)
class Question:
    """One question: its chat up to the answer, and the reference answer, empty for a probe."""

    row_id: str
    messages: list[dict[str, str]]
    reference: str

    @property
    def query(self) -> str:
        """What the person asks in the last turn."""
        return self.messages[-1]["content"]


def held_out_questions(split: Output[SplitReport], system: str | None, limit: int | None) -> list[Question]:
    """The first `limit` rows of the test split in data-set order.

    Rows without a system prompt get `system`, the one that training gave them, so that models are asked as they were
    taught. DataError where there are none, or where a row has nothing to ask or to compare with.
    """
    tables = read_tables(split.folder.workspace, split.paths(split.report.outputs.test))
    rows = (row for table in tables for row in table.to_pylist())
    questions = [_question(row, f"test row {row['row_id']}", system) for row in islice(rows, limit)]
    if not questions:
        raise DataError(f"{split.folder.path()}: the test split is empty; raise split.test_ratio")
    return questions


def folder_questions(folder: Path, subsets: list[str], system: str | None, limit: int | None) -> list[Question]:
    """The first `limit` rows of every SUBSET.jsonl, in evalscope's general_qa form: `query`/`response`, or
    `question`/`answer`, or `messages` up to the answer.

    DataError names the file and line of what is missing or broken.
    """
    return [
        _question(row, where, system)
        for subset in subsets
        for where, row in islice(_general_qa_rows(folder / f"{subset}.jsonl"), limit)
    ]


def probe_questions(probes: dict[str, list[str]], system: str | None) -> dict[str, list[Question]]:
    """The recipe's own questions by group, without references."""
    return {
        group: [
            Question(f"{group}-{index}", _with_system([_turn("user", text)], system), "")
            for index, text in enumerate(texts)
        ]
        for group, texts in probes.items()
    }


def _general_qa_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if not path.is_file():
        found = ", ".join(sorted(file.stem for file in path.parent.glob("*.jsonl"))) or "none"
        raise DataError(f"{path}: no such file; subsets in that folder: {found}")
    with open(path, encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except ValueError as error:
                raise DataError(f"{where}: not valid JSON ({error})") from None
            query, response = (row.get(a) or row.get(b) for a, b in (("question", "query"), ("answer", "response")))
            turns = [*(row.get("messages") or []), _turn("assistant", response or "")]
            own = {"messages": turns} if row.get("messages") else {"query": query, "response": response}
            yield where, {"row_id": f"{path.stem}:{number}", "system": row.get("system"), **own}


def _question(row: dict[str, Any], where: str, system: str | None) -> Question:
    messages = messages_of(row)
    reference = messages.pop()["content"] if messages and messages[-1]["role"] == "assistant" else ""
    if not reference.strip():
        raise DataError(f"{where}: no reference answer to compare with; drop the row")
    if not messages or messages[-1]["role"] != "user":
        raise DataError(f"{where}: no question before the answer")
    return Question(str(row["row_id"]), _with_system(messages, system), reference)


def _with_system(messages: list[dict[str, str]], system: str | None) -> list[dict[str, str]]:
    if system and messages[0]["role"] != "system":
        return [_turn("system", system), *messages]
    return messages


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}
