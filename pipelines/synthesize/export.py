"""Export to `{"conversation": [{system, input, output}]}`, which xtuner and ingest's adapter `conversation` read."""

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from pipelines.errors import InputError
from pipelines.records import messages_of
from pipelines.shards import read_tables
from pipelines.workspace import Place


def export_conversations(place: Place, path: Path) -> int:
    """Write a finished stage's rows to one JSON file, in their order; returns how many.

    The file appears when it is whole. InputError where it cannot be written.
    """
    count = 0
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            for table in read_tables(place.workspace, place.outputs("rows")):
                for row in table.to_pylist():
                    stream.write("[\n" if count == 0 else ",\n")
                    stream.write(json.dumps({"conversation": _turns(row)}, ensure_ascii=False))
                    count += 1
            stream.write("\n]\n" if count else "[]\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; export to a file that can be written") from None
    return count


def _turns(row: dict[str, Any]) -> list[dict[str, str]]:
    """One entry per exchange; the system prompt stands in the first."""
    messages = messages_of(row)
    system = messages.pop(0)["content"] if messages[0]["role"] == "system" else ""
    pairs = zip(messages[::2], messages[1::2], strict=True)
    turns = [{"system": "", "input": asked["content"], "output": said["content"]} for asked, said in pairs]
    turns[0]["system"] = system
    return turns
