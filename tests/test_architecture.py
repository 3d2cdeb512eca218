"""docs/architecture.md, the import contract and the code agree with each other."""

import ast
import graphlib
import itertools
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import grimp
import pytest

PROJECT = Path(__file__).parents[1]
PACKAGES = ("rayjobs", "pipelines", "serve")
PAGE = (PROJECT / "docs" / "architecture.md").read_text(encoding="utf-8")
CONTRACTS = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]["contracts"]
SLOW = {"torch", "ray", "vllm", "streamlit", "matplotlib", "transformers"}
"""What takes seconds to import, so that a function may put off what imports it."""
EXTRAS = {"openai", "evalscope"}
"""Clients of optional extras: what needs none of them must run where they are not installed."""


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    linter = Path(sys.executable).parent / "lint-imports"
    return subprocess.run(
        [linter, "--no-logo", "--no-cache"], cwd=folder, capture_output=True, text=True, timeout=120, check=False
    )


def test_no_import_goes_up() -> None:
    result = lint_imports(PROJECT)
    assert result.returncode == 0, result.stdout


REVERSE = [
    ("pipelines/artifacts/shards.py", "import pipelines.ingest.stage", "pipelines.artifacts", "pipelines.ingest"),
    ("pipelines/recipe/load.py", "def planted() -> None:\n    from pipelines.clean import plan", "pipelines.recipe",
     "pipelines.clean"),
    ("pipelines/split.py", "from pipelines.publish.cards import *", "pipelines.split", "pipelines.publish"),
    ("pipelines/train/loop.py", "import pipelines.report.page", "pipelines.train", "pipelines.report"),
    ("serve/gateway/app.py", "from pipelines.llm import client", "serve", "pipelines.llm"),
    ("pipelines/report/page.py", "import rayjobs.pipeline", "pipelines.report", "rayjobs"),
    ("serve/discovery.py", "import serve.app", "serve.discovery", "serve.app"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "line", "importer", "imported"), REVERSE, ids=[case[0] for case in REVERSE])
def test_a_planted_reverse_import_is_found(tmp_path: Path, file: str, line: str, importer: str, imported: str) -> None:
    plant(tmp_path, file, line)
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert f"{importer} is not allowed to import {imported}:" in result.stdout


def test_a_planted_circle_of_files_is_found(tmp_path: Path) -> None:
    plant(tmp_path, "pipelines/clean/column.py", "import pipelines.clean.fused")
    result = lint_imports(tmp_path)
    assert result.returncode == 1
    assert "No cycles are allowed in pipelines.clean." in result.stdout


def plant(folder: Path, file: str, line: str) -> None:
    """Copy the packages and the contract to `folder`, and add a line to one file."""
    for package in PACKAGES:
        shutil.copytree(PROJECT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__", "shipped"))
    shutil.copy(PROJECT / "pyproject.toml", folder)
    path = folder / file
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{line}\n", encoding="utf-8")


def test_files_import_each_other_in_no_circle() -> None:
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert list(graphlib.TopologicalSorter(imports).static_order())


# What the linter does not see.


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((PROJECT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    parts = path.relative_to(PROJECT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def file_of(module: str) -> Path | None:
    path = PROJECT / module.replace(".", "/")
    found = (path / "__init__.py", path.with_suffix(".py"))
    return next((candidate for candidate in found if candidate.is_file()), None)


def modules_in(statement: ast.stmt) -> list[str]:
    """The modules that an import statement executes; our code has no relative imports."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom) and statement.module:
        named = [f"{statement.module}.{alias.name}" for alias in statement.names]
        return [statement.module, *(name for name in named if file_of(name))]
    return []


def imported_at_once(body: list[ast.stmt]) -> Iterator[str]:
    """Modules imported when a file is: not in its functions, nor for type checkers alone."""
    for statement in body:
        yield from modules_in(statement)
        if isinstance(statement, ast.If) and ast.unparse(statement.test) != "TYPE_CHECKING":
            yield from imported_at_once([*statement.body, *statement.orelse])
        elif isinstance(statement, ast.Try):
            yield from imported_at_once([*statement.body, *(s for h in statement.handlers for s in h.body)])


@cache
def loaded_by(module: str) -> frozenset[str]:
    """The packages of other projects that importing one of our modules imports, by what it and its imports say."""
    waiting, seen, foreign = [module], set(), set()
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if name.partition(".")[0] not in PACKAGES:
            foreign.add(name.partition(".")[0])
        elif path := file_of(name):
            waiting += imported_at_once(ast.parse(path.read_text(encoding="utf-8")).body)
            waiting.append(name.rpartition(".")[0] or name)
    return frozenset(foreign)


def put_off(tree: ast.Module) -> Iterator[ast.stmt]:
    """Import statements in functions, each once."""
    found = {}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            found |= {node.lineno: node for node in ast.walk(function) if isinstance(node, ast.Import | ast.ImportFrom)}
    yield from found.values()


def has_reason(lines: list[str], above: int) -> bool:
    """Whether a comment stands above a block of imports; `above` is the index of the line before one of them."""
    while lines[above].lstrip().startswith(("from ", "import ")):
        above -= 1
    return lines[above].lstrip().startswith("# ")


def test_an_import_of_ours_in_a_function_has_a_slow_library_behind_it_and_says_so() -> None:
    wrong = []
    for path, tree in sources():
        lines = path.read_text(encoding="utf-8").splitlines()
        for statement in put_off(tree):
            ours = [name for name in modules_in(statement) if name.partition(".")[0] in PACKAGES]
            if not ours:
                continue
            place = f"{path.relative_to(PROJECT)}:{statement.lineno} {ours[-1]}"
            if "#" not in "".join(lines[statement.lineno - 1 : statement.end_lineno]) and not has_reason(
                lines, statement.lineno - 2
            ):
                wrong.append(f"{place}: no comment says why")
            if not any(loaded_by(name) & (SLOW | EXTRAS) for name in ours):
                wrong.append(f"{place}: nothing slow behind it; import it at the head of the file")
    assert not wrong, "\n".join(wrong)


def test_stages_are_found_by_import_and_sections_by_type() -> None:
    wrong = []
    for path, tree in sources():
        for node in ast.walk(tree):
            text = ""
            if isinstance(node, ast.Assert):
                text = ast.unparse(node) if re.search(r"\b(section|recipe)\b", ast.unparse(node.test)) else ""
            elif isinstance(node, ast.Call):
                called = ast.unparse(node)
                text = called if re.match(r"(importlib\.)?import_module\(|getattr\((\w+\.)*recipe\b", called) else ""
            elif isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
                whole = ast.unparse(node)
                is_report = re.search(r"(^|[._])report\[", whole) and isinstance(node.slice.value, str)
                text = whole if is_report and path.parent.name != "evalscope" else ""  # which has reports of its own
            if text:
                wrong.append(f"{path.relative_to(PROJECT)}:{node.lineno} {text}")
    assert not wrong, "\n".join(wrong)


def stage_classes() -> dict[str, tuple[Path, ast.ClassDef, str]]:
    """Classes that implement `Stage[Inputs, Report]`, with the report's name."""
    found = {}
    for path, tree in sources():
        for node in ast.walk(tree):
            for base in node.bases if isinstance(node, ast.ClassDef) else []:
                if match := re.fullmatch(r"Stage\[\w+, (\w+)\]", ast.unparse(base)):
                    assert isinstance(node, ast.ClassDef)
                    found[node.name] = (path, node, match[1])
    return found


def test_every_stage_returns_the_report_class_it_names() -> None:
    reports = {
        node.name
        for path in (PROJECT / "pipelines" / "artifacts" / "reports").glob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.ClassDef)
    }
    for path, stage, report in stage_classes().values():
        [run] = [item for item in stage.body if isinstance(item, ast.FunctionDef) and item.name == "run"]
        assert run.returns and ast.unparse(run.returns) == report, path
        assert report in reports, path


def test_the_pipeline_is_the_list_of_all_stages() -> None:
    tree = ast.parse((PROJECT / "rayjobs" / "pipeline.py").read_text(encoding="utf-8"))
    [walk] = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "walk"]
    built = {ast.unparse(node.func) for node in ast.walk(walk) if isinstance(node, ast.Call)}
    assert len(stage_classes()) == 14
    assert set(stage_classes()) <= built


# The page.


def rooms() -> set[str]:
    """Every package, and every module that stands beside packages rather than in one of their own."""
    packages = {path.parent for package in PACKAGES for path in (PROJECT / package).rglob("__init__.py")}
    modules = {path for package in ("pipelines", "serve") for path in (PROJECT / package).glob("*.py")}
    named = {f"{path.relative_to(PROJECT)}/" for path in packages} - {"pipelines/", "serve/"}
    return named | {str(path.relative_to(PROJECT)) for path in modules if path.name != "__init__.py"}


def test_the_page_lists_every_room_and_no_other() -> None:
    listed = re.findall(r"^\| `([^`]+)` \|", section("Rooms"), re.MULTILINE)
    assert len(listed) == len(set(listed))
    assert set(listed) == rooms()


def test_the_picture_of_the_floors_is_the_contract() -> None:
    picture = re.search(r"```mermaid\n(.*?)```", section("Floors"), re.DOTALL)
    assert picture
    floors = [
        set(re.findall(r"(\w+)\[", body)) for body in re.findall(r"subgraph[^\n]*\n(.*?)end", picture[1], re.DOTALL)
    ]
    layers = [
        {name.strip().removeprefix("pipelines.") for name in layer.split("|")} for layer in CONTRACTS[0]["layers"]
    ]
    assert floors == layers


def test_every_room_stands_on_a_floor() -> None:
    layered = {name.strip() for layer in CONTRACTS[0]["layers"] for name in layer.split("|")}
    packages = {path.parent for path in (PROJECT / "pipelines").glob("*/__init__.py")}
    modules = {path.with_suffix("") for path in (PROJECT / "pipelines").glob("*.py") if path.name != "__init__.py"}
    assert {f"pipelines.{path.name}" for path in packages | modules} | {"rayjobs", "serve"} == layered


@pytest.mark.parametrize("heading", ["From `danlu train` to the training loop", "From a row to its drop"])
def test_a_newcomers_way_is_three_files_that_import_each_other(heading: str) -> None:
    way = re.findall(r"^\d\. `([^`]+\.py)`", section(heading), re.MULTILINE)
    assert len(way) == 3
    for file, following in itertools.pairwise(way):
        graph = grimp.build_graph(*PACKAGES, cache_dir=None)
        assert graph.direct_import_exists(
            importer=module_of(PROJECT / file), imported=module_of(PROJECT / following)
        ), (file, following)


def test_every_file_and_name_of_the_page_exists() -> None:
    for path in re.findall(r"`((?:pipelines|serve|rayjobs|tests|docs)/[\w/.]*)`", PAGE):
        assert (PROJECT / path).exists(), path


def section(heading: str) -> str:
    """The text under a heading of the page, up to the next heading."""
    found = re.search(rf"^#+ {re.escape(heading)}\n(.*?)(?=^#+ |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]
