"""The documentation agrees with the code."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]


def test_the_recipe_page_follows_from_the_schema() -> None:
    spec = importlib.util.spec_from_file_location("make_recipes", PROJECT / "docs" / "make_recipes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (PROJECT / "docs" / "recipes.md").read_text(encoding="utf-8") == module.page()


def test_every_file_of_the_readme_exists() -> None:
    readme = (PROJECT / "README.md").read_text(encoding="utf-8")
    for path in re.findall(r"\]\(([^)#]+)\)", readme):
        assert (PROJECT / path).is_file(), path
    tree = readme.rsplit("```", 2)[1]
    folder = PROJECT
    for line in tree.strip().splitlines():
        name = line.split()[0]
        parent = folder if line.startswith(" ") else PROJECT
        assert (parent / name).exists(), name
        if not line.startswith(" "):
            folder = PROJECT / name


def test_every_file_that_a_docstring_or_comment_names_exists() -> None:
    folders = ("rayjobs", "pipelines", "serve", "benchmarks", "docs")
    sources = [path for folder in folders for path in (PROJECT / folder).rglob("*.py")]
    names = {path.name for path in sources}
    for path in sources:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"(?<![\w./{])(?:(?:rayjobs|pipelines|serve|tests|docs)/[\w/]+|\w+)\.py\b", text):
            assert (PROJECT / name).is_file() or name in names, f"{path.relative_to(PROJECT)}: {name}"


def commands() -> list[str]:
    """The `danlu` commands of README and guides that need nothing but the installation."""
    texts = [
        path.read_text(encoding="utf-8") for path in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md")))
    ]
    lines = re.findall(r"^danlu (.+?)(?:  +#.*)?$", "\n".join(texts), re.MULTILINE)
    return sorted({line.strip() for line in lines if line.split()[0] in {"recipes", "init", "check", "status"}})


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text('{"query": "问", "response": "答"}\n', encoding="utf-8")
    danlu = Path(sys.executable).parent / "danlu"
    subprocess.run([danlu, "init", "tiny", "mine.yaml"], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path


@pytest.mark.parametrize("command", commands())
def test_documented_commands_run(prepared: Path, command: str) -> None:
    if command.startswith("init"):
        (prepared / "mine.yaml").unlink()
    danlu = Path(sys.executable).parent / "danlu"
    result = subprocess.run([danlu, *command.split()], cwd=prepared, capture_output=True, text=True, timeout=120)
    if command.startswith("check"):  # some recipes are for machines with GPUs
        lacking = [line for line in result.stdout.splitlines() if "not ready on this machine" in line]
        assert all("GPUs asked for" in line for line in lacking), result.stdout
        assert result.returncode == (4 if lacking else 0), result.stderr
    else:
        assert result.returncode == 0, result.stderr


def test_the_table_of_data_juicers_recipes_is_made_from_a_folder(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("table", PROJECT / "docs" / "make_data_juicer_recipes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    recipes = {
        "a.yaml": "dataset_path: x.jsonl\nprocess: [text_length_filter: {min_len: 3}, perplexity_filter: {lang: fr}]\n",
        "b.yaml": "dataset_path: x.jsonl\nprocess: [suffix_filter: {suffixes: .py}]\n",
        "c.yaml": "dataset_path: x.jsonl\nprocess: [image_shape_filter: {}]\n",
        "tests/d.yaml": "dataset_path: x.jsonl\nprocess: [text_length_filter: {min_len: 3}]\n",
    }
    for name, text in recipes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    page = module.page({"theirs": tmp_path})
    assert "**1 of 2 are valid.**" in page
    assert "| a.yaml | 2 | valid |" in page
    assert "| b.yaml | 1 | no `suffix_filter` |" in page
    assert "c.yaml" not in page
