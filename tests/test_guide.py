"""The commands of docs/data.md train a model on each kind of data that it names."""

import csv
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
GUIDE = (PROJECT / "docs" / "data.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^danlu (.+)$", GUIDE, re.MULTILINE)
SHORT = ["train.max_steps=2", "train.eval_steps=2", "train.save_steps=2", "train.eval_rows=2"]


def danlu(folder: Path, command: str, *more: str) -> subprocess.CompletedProcess[str]:
    arguments = [str(Path(sys.executable).parent / "danlu"), *shlex.split(command), *more]
    return subprocess.run(
        [*arguments, "--workspace", str(folder / "w")], cwd=folder, capture_output=True, text=True, timeout=850
    )


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder with each of the files that the guide names."""
    shipped = PROJECT / "pipelines" / "recipe" / "shipped" / "data" / "tiny.jsonl"
    rows = [json.loads(line) for line in shipped.read_text(encoding="utf-8").splitlines()[:120]]
    with (tmp_path / "table.csv").open("w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file).writerows([["问题", "答案"], *([row["query"], row["response"]] for row in rows)])
    talk = []
    for number, row in enumerate(rows):
        for later, (sender, text) in enumerate((("小明", row["query"]), ("爱莉", row["response"]))):
            time = str(1_700_000_000 + number * 7200 + later)
            talk.append({"id": len(talk), "type": "message", "date_unixtime": time, "from": sender, "text": text})
    (tmp_path / "result.json").write_text(json.dumps({"name": "小明", "messages": talk}), encoding="utf-8")
    (tmp_path / "notes").mkdir()
    for number, row in enumerate(rows[:40]):
        (tmp_path / "notes" / f"{number:02}.md").write_text(
            f"# {row['query']}\n\n{row['response']}\n", encoding="utf-8"
        )
    turns = [[{"from": "human", "value": row["query"]}, {"from": "gpt", "value": row["response"]}] for row in rows]
    shared = [{"conversations": chat} for chat in turns]
    (tmp_path / "sharegpt.json").write_text(json.dumps(shared, ensure_ascii=False), encoding="utf-8")
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("run")])
def test_each_kind_of_data_reaches_a_trained_model(data: Path, command: str) -> None:
    assert len(re.findall(r"'[^']*'|\S+=\S+", command)) <= 3  # the source, and at most two edits more
    result = danlu(data, command, *SHORT)
    assert result.returncode == 0, result.stderr[-3000:]
    (manifest,) = data.glob("w/train/*/manifest.json")
    report = json.loads(manifest.read_text(encoding="utf-8"))["report"]
    assert report["steps"] == 2 and report["eval_loss"] > 0
    assert (manifest.parent / report["adapter"]).is_dir()


@pytest.mark.slow
def test_what_was_set_aside_is_shown(data: Path) -> None:
    run = danlu(data, "run tiny ingest.source=sharegpt.json --to ingest")
    assert run.returncode == 0, run.stderr[-3000:]
    for command in (command for command in COMMANDS if not command.startswith("run")):
        shown = danlu(data, command)
        assert shown.returncode == 0, shown.stderr
    assert "ingest: kept (rows), position 0" in shown.stdout
