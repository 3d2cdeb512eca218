"""Each format of an export is read whole by the program that it is for, in an environment of its own."""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.rows import turns_said
from pipelines.export.formats import conversation_as
from tests.pipelines.export.test_formats import MARKED, PLAIN, TALK, TOOLS

pytestmark = pytest.mark.slow

PROGRAMS = ("ms-swift==4.6.0", "llamafactory==0.9.5", "xtuner==0.2.0", "mmengine==0.10.7", "yapf==0.43.0")
PROGRAMS += ("omegaconf==2.4.0", "antlr4-python3-runtime==4.9.3", "termcolor==3.3.0")
SHIPPED = Path(__file__).parents[3] / "pipelines" / "recipe" / "shipped" / "data" / "tiny.jsonl"
ROLES = {"tool_call": "call", "function": "call", "tool_response": "tool", "observation": "tool"}
"""What programs call a turn with a tool call, and its result."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment's Python that has the programs, and of ours what they share with us."""
    folder = tmp_path_factory.mktemp("readers")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / "bin" / "python"
    (own,) = folder.glob("lib/*/site-packages")
    command = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PROGRAMS]
    installed = subprocess.run(command, capture_output=True, text=True, timeout=600)
    if installed.returncode:
        pytest.skip(f"the programs cannot be installed here: {installed.stderr.strip()[-200:]}")
    (own / "zz_shared.pth").write_text(sysconfig.get_path("purelib"))  # behind its own packages
    return python


def read_by(python: Path, reader: str, path: Path) -> list[list[tuple[str, str]]]:
    script = Path(__file__).with_name("read_by_others.py")
    caches = {"HF_HOME": f"{path.parent}/hf", "MODELSCOPE_CACHE": f"{path.parent}/ms", "DISABLE_VERSION_CHECK": "1"}
    command = [str(python), str(script), reader, str(path)]
    told = subprocess.run(
        command, env={**os.environ, **caches, "PYTHONPATH": ""}, capture_output=True, text=True, timeout=600
    )
    assert told.returncode == 0, told.stderr[-3000:]
    return [[(ROLES.get(role, role), text) for role, text in chat] for chat in json.loads(told.stdout.splitlines()[-1])]


def rows_of_tiny() -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in SHIPPED.read_text(encoding="utf-8").splitlines()]
    return [{"row_id": row["id"], "query": row["query"], "response": row["response"]} for row in rows]


def said_in(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The turns that a reader should find: a tool call is the turn's text."""
    return [
        ("call" if "tool_calls" in turn else turn["role"], _call(turn) if "tool_calls" in turn else turn["content"])
        for turn in turns_said(row)
    ]


def _call(turn: dict[str, Any]) -> str:
    (call,) = json.loads(turn["tool_calls"])
    return json.dumps(call["function"], ensure_ascii=False)


@pytest.mark.parametrize(
    ("name", "reader", "more"),
    [
        ("swift", "swift", [TALK, TOOLS, {**MARKED, "messages": [*MARKED["messages"][:3], TALK["messages"][-1]]}]),
        ("messages", "swift", [TALK]),
        ("alpaca", "swift", [TALK]),
        ("sharegpt", "swift", [TALK]),
        ("llamafactory", "llamafactory", [TALK, TOOLS]),
        ("alpaca", "alpaca", [TALK]),
        ("xtuner", "xtuner", [TALK]),
    ],
)
def test_every_row_is_read_with_every_turn(
    tmp_path: Path, environment: Path, name: str, reader: str, more: list[dict[str, Any]]
) -> None:
    rows = [PLAIN, *rows_of_tiny(), *more]
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(conversation_as(name, row), ensure_ascii=False, allow_nan=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = read_by(environment, reader, path)
    assert len(found) == len(rows) > 600
    assert found == [said_in(row) for row in rows]
