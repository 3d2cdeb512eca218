"""CONTRIBUTING.md does what it says: its commands run, its operator works."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
PAGE = (PROJECT / "CONTRIBUTING.md").read_text(encoding="utf-8")
BIN = Path(sys.executable).parent


def commands() -> list[str]:
    """The lines of blocks without a language."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    return [line for language, block in blocks if not language for line in block.splitlines()]


def run(*command: str | Path, cwd: Path = PROJECT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("command", [line for line in commands() if line.startswith(("python", "ruff"))])
def test_commands_of_the_venv_run(command: str) -> None:
    program, *arguments = command.split()
    result = run(BIN / program, *arguments)
    assert result.returncode == 0, result.stdout + result.stderr


def test_danlu_commands_run_one_after_the_other(tmp_path: Path) -> None:
    for command in commands():
        if command.startswith("danlu "):
            result = run(BIN / "danlu", *command.split()[1:], cwd=tmp_path)
            assert result.returncode == 0, result.stderr


def test_the_other_commands_are_there() -> None:
    """They take too long here, change the machine, or are run by another test."""
    others = [line for line in commands() if not line.startswith(("python", "ruff", "danlu "))]
    targets = [line.removeprefix("make ") for line in others if line.startswith("make ")]
    assert targets == ["install", "check", "test", "test-slow"]
    for target in targets:
        assert run("make", "--dry-run", target).returncode == 0, target
    assert [line for line in others if not line.startswith("make ")] == [
        "source .venv/bin/activate",
        "pre-commit install",
        "lint-imports",
    ]
    assert (BIN / "lint-imports").exists()


def test_every_file_it_names_exists() -> None:
    text = re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL)
    named = [*re.findall(r"\]\(([^)#]+)\)", text), *re.findall(r"`((?:pipelines|rayjobs|tests|docs)/[\w/.-]+)`", text)]
    assert len(named) > 15
    for path in named:
        assert (PROJECT / path).exists() or path == "rayjobs/NAME.py", path


def test_its_operator_and_the_operators_test_work_as_they_stand(tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "pipelines", tmp_path / "pipelines", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    written = re.findall(r"```python\n# (\S+)\n(.*?)```", PAGE, re.DOTALL)
    operator, test = (tmp_path / path for path, _ in written)
    test.parent.mkdir(parents=True)
    for path, source in written:
        (tmp_path / path).write_text(source, encoding="utf-8")
    listed = operator.parent / "__init__.py"
    text = listed.read_text(encoding="utf-8")
    listed.write_text(text.replace("    length,\n", f"    length,\n    {operator.stem},\n"), encoding="utf-8")

    result = run(sys.executable, "-m", "pytest", "-q", test, cwd=tmp_path)
    assert result.returncode == 0 and "1 passed" in result.stdout, result.stdout + result.stderr
    for check in (["check"], ["format", "--check"]):
        result = run(BIN / "ruff", *check, operator, test, listed, cwd=tmp_path)
        assert result.returncode == 0, result.stdout
