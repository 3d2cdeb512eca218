"""Operators of one's own, in a file that the recipe names."""

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipelines.artifacts.workspace import Workspace
from pipelines.clean.custom import load_operators
from pipelines.clean.custom_source import source_of
from pipelines.clean.operators import OPERATORS
from pipelines.clean.stage import CleanStage, plan_of
from pipelines.errors import RecipeError
from rayjobs import pipeline
from rayjobs.cli import app
from rayjobs.cluster import Cluster
from tests.outputs import rows_of

OWN = '''
import pyarrow as pa
from pipelines.clean.column import Column
from pipelines.clean.operators import operator

GREETINGS = ("谢邀", "泻药")


@operator("mapper")
def strip_greeting_mapper(column: Column, *, greetings: list[str] = list(GREETINGS)) -> pa.Array:
    """Remove a greeting at the head."""
    return column.rewrite(column.contains(""), lambda text: _without(text, greetings))


def _without(text: str, greetings: list[str]) -> str:
    for greeting in greetings:
        text = text.removeprefix(greeting).lstrip("，。 ")
    return text


@operator("filter")
def question_marks_filter(column: Column, *, max_count: int = 1):
    """Drop texts that ask too much."""
    import numpy as np

    counts = np.array([text.count("？") for text in column.texts()])
    return counts <= max_count, {"question_marks": counts}
'''

RECIPE = """
name: own
ingest: {{source: {folder}/rows.jsonl}}
clean:
  custom_operators: [{folder}/my_ops.py]
  process:
    - strip_greeting_mapper:
    - text_length_filter: {{min_len: 2}}
    - question_marks_filter: {{max_count: 2}}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_ops.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "own.yaml").write_text(RECIPE.format(folder=tmp_path), encoding="utf-8")
    answers = ["谢邀，好的", "为什么？真的？是吗？", "泻药。", "可以吗？"]
    lines = [f'{{"query": "问", "response": "{answer}"}}' for answer in answers]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


def problems_of(folder: Path) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        pipeline.load(str(folder / "own.yaml"))
    return {problem.key: problem.message for problem in caught.value.problems}


def test_they_run_on_workers_like_the_built_in_ones(folder: Path, ray_cluster: None) -> None:
    recipe = pipeline.load(str(folder / "own.yaml"))
    done = pipeline.run(recipe, Workspace(str(folder / "run")), Cluster())
    outputs = done["clean"].report.outputs
    assert [row["response"] for row in rows_of(done["clean"], outputs.rows)] == ["好的", "可以吗？"]
    dropped = {row["pos"]: row for row in rows_of(done["clean"], outputs.dropped)}
    assert {pos: row["operator"] for pos, row in dropped.items()} == {
        1: "question_marks_filter",
        2: "text_length_filter",
    }
    assert dropped[1]["reason"] == "question_marks 3"
    assert "question_marks_filter" not in OPERATORS


def test_the_file_is_part_of_what_decides_the_output(folder: Path) -> None:
    recipe = pipeline.load(str(folder / "own.yaml"))
    assert recipe.clean
    before = CleanStage(recipe.clean).fingerprint_inputs()
    (folder / "my_ops.py").write_text(OWN.replace("谢邀", "谢谢"), encoding="utf-8")
    assert CleanStage(recipe.clean).fingerprint_inputs() != before


def test_they_are_checked_like_the_built_in_ones(folder: Path) -> None:
    text = (folder / "own.yaml").read_text(encoding="utf-8")
    wrong = text.replace("max_count: 2", "max_count: many").replace(
        "- strip_greeting_mapper", "- strip_greetings_mapper"
    )
    (folder / "own.yaml").write_text(wrong, encoding="utf-8")
    found = problems_of(folder)
    assert "did you mean 'strip_greeting_mapper'?" in found["clean.process[0].strip_greetings_mapper"]
    assert "'many'" in found["clean.process[2].question_marks_filter.max_count"]


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def (", "SyntaxError: invalid syntax"),
        ("import nothing_of_that_name", "registers no operator"),
        ("x = 1", "registers no operator"),
        (
            OWN.replace("question_marks_filter", "text_length_filter"),
            "another operator has the name text_length_filter",
        ),
        (OWN.replace("max_count: int", "max_count"), "parameter max_count of question_marks_filter has no type"),
    ],
)
def test_files_that_cannot_be_used_are_named(folder: Path, source: str, said: str) -> None:
    (folder / "my_ops.py").write_text(source, encoding="utf-8")
    assert said in problems_of(folder)["clean.custom_operators[0]"]


def test_a_file_that_is_not_there_is_named(folder: Path) -> None:
    (folder / "my_ops.py").unlink()
    assert "FileNotFoundError" in problems_of(folder)["clean.custom_operators[0]"]


def test_a_check_reads_the_file_and_does_not_run_it(folder: Path) -> None:
    (folder / "my_ops.py").write_text(f"open({str(folder / 'was-run')!r}, 'w')\n{OWN}", encoding="utf-8")
    checked = CliRunner().invoke(app, ["check", str(folder / "own.yaml"), "--workspace", str(folder / "run")])
    assert checked.exit_code == 0
    assert "strip_greeting_mapper → text_length_filter → question_marks_filter" in checked.output
    assert not (folder / "was-run").exists()
    recipe = pipeline.load(str(folder / "own.yaml"))
    assert recipe.clean and plan_of(recipe.clean).steps[0].parameters == {"greetings": ["谢邀", "泻药"]}
    assert (folder / "was-run").exists()


@pytest.mark.parametrize(
    ("first_line", "said"),
    [
        ("import nothing_of_that_name", "ModuleNotFoundError: No module named 'nothing_of_that_name'"),
        ("1 / 0", "ZeroDivisionError"),
    ],
)
def test_a_file_that_raises_stops_a_run_before_its_first_stage(folder: Path, first_line: str, said: str) -> None:
    (folder / "my_ops.py").write_text(f"{first_line}\n{OWN}", encoding="utf-8")
    recipe = pipeline.load(str(folder / "own.yaml"))
    with pytest.raises(RecipeError) as caught:
        pipeline.run(recipe, Workspace(str(folder / "run")), Cluster())
    assert [p.key for p in caught.value.problems] == ["clean.custom_operators[0]"] and said in str(caught.value)
    assert not (folder / "run" / "ingest").exists()


def test_types_that_only_running_tells_are_not_guessed(folder: Path) -> None:
    text = OWN.replace("max_count: int = 1", "max_count: type(1) = min(1, 2), more: Literal['a', 'b'] | None = None")
    (folder / "my_ops.py").write_text(f"from typing import Literal\n{text}", encoding="utf-8")
    recipe = (folder / "own.yaml").read_text(encoding="utf-8")
    (folder / "own.yaml").write_text(recipe.replace("max_count: 2", "max_count: many, more: c"), encoding="utf-8")
    assert list(problems_of(folder)) == ["clean.process[2].question_marks_filter.more"]


PACKAGE = {
    "words/__init__.py": "from .greetings import GREETINGS\n",
    "words/greetings.py": "from . import more\nGREETINGS = ['谢邀', *more.MORE]\n",
    "words/more.py": "import plain\nMORE = plain.MORE\n",
    "plain.py": "from bare.folder import WORD\nMORE = [WORD]\n",
    "bare/folder.py": "WORD = '泻药'\n",
    "unused.py": "1 / 0\n",
}


def test_packages_beside_the_file_reach_a_worker_that_does_not_have_them(folder: Path, tmp_path: Path) -> None:
    for name, text in PACKAGE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    lazily = OWN.replace("    import numpy as np\n", "    import numpy as np\n    import words\n")
    own = lazily.replace('GREETINGS = ("谢邀", "泻药")', "from words import GREETINGS")
    (folder / "my_ops.py").write_text(own, encoding="utf-8")
    assert [name for name, _ in source_of(str(folder / "my_ops.py")).helpers] == sorted(PACKAGE.keys() - {"unused.py"})
    operators, problems = load_operators([str(folder / "my_ops.py")])
    assert problems == []
    sent = tmp_path / "sent.pickle"
    sent.write_bytes(pickle.dumps(operators["strip_greeting_mapper"].function))
    (folder / "my_ops.py").rename(folder / "gone.py")
    (folder / "words").rename(folder / "gone")
    (folder / "bare").rename(folder / "gone2")
    (folder / "plain.py").unlink()
    program = (
        "import pickle, sys; import pyarrow as pa; from pipelines.clean.column import Column; "
        "function = pickle.load(open(sys.argv[1], 'rb')); "
        "print(function(Column(pa.array(['泻药，好'])), greetings=['泻药']).to_pylist())"
    )
    done = subprocess.run([sys.executable, "-c", program, str(sent)], capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.returncode) == ("['好']", 0), done.stderr
