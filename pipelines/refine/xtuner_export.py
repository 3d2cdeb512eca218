"""Export to `{"conversation": [{system, input, output}]}`, which xtuner and ingest's adapter `conversation` read."""

import io
import json
from typing import Any

from pipelines.artifacts.files import Destination, created
from pipelines.artifacts.reports.rows import RowsReport
from pipelines.artifacts.rows import messages_of
from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.stage import Output


def export_conversations(output: Output[RowsReport], destination: Destination) -> int:
    """Write a finished stage's rows to one JSON file, in their order; returns how many.

    The file appears when it is whole. InputError where it may not or cannot be written.
    """
    count = 0
    workspace = output.folder.workspace
    with created(destination, workspace) as sink, io.TextIOWrapper(sink, encoding="utf-8") as stream:
        for table in read_tables(output.folder.workspace, output.paths(output.report.outputs.rows)):
            for row in table.to_pylist():
                stream.write("[\n" if count == 0 else ",\n")
                stream.write(json.dumps({"conversation": _turns(row)}, ensure_ascii=False))
                count += 1
        stream.write("\n]\n" if count else "[]\n")
    return count


def _turns(row: dict[str, Any]) -> list[dict[str, str]]:
    """One entry per exchange; the system prompt stands in the first."""
    messages = messages_of(row)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    pairs = zip(messages[::2], messages[1::2], strict=True)
    turns = [{"system": "", "input": asked["content"], "output": said["content"]} for asked, said in pairs]
    turns[0]["system"] = system
    return turns
