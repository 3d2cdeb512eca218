"""`danlu submit`, jobs, logs and stop, on a cluster that was started by `ray start --head`."""

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from pipelines.artifacts.workspace import Workspace
from pipelines.errors import InputError, RecipeError, StageError
from pipelines.recipe.load import load_recipe
from pipelines.sources.read import first_rows
from rayjobs import pipeline, submit
from rayjobs.submit import Job, Jobs, exit_code, pack
from tests.local_server import Handler, listening
from tests.rayjobs.conftest import BIN

RECIPE = """
name: travels
ingest: {source: data/rows.jsonl, shard_bytes: 2000}
clean: {process: [{text_length_filter: {min_len: 3}}], custom_operators: [mine/own.py]}
"""
OWN = """
import time

import beside
import numpy as np
from pipelines.clean.column import Column
from pipelines.clean.operators import operator


@operator("filter")
def own_filter(column: Column):
    time.sleep(beside.SECONDS)
    return np.ones(len(column.texts()), bool), {}
"""


def danlu(head: dict[str, str], folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "danlu"), *arguments], cwd=folder, env=head, capture_output=True, text=True, timeout=300
    )


def names_in(folder: Path) -> list[str]:
    """The files in a folder and below it, by their paths from there."""
    return sorted(
        str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".pyc" and path.is_file()
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A person's folder with a recipe and the rows that it names."""
    rows = [
        json.dumps({"query": f"第{n}个问题是什么？", "response": f"这是第{n}个回答，写得清楚。"}) for n in range(200)
    ]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "travels.yaml").write_text(RECIPE.replace(", custom_operators: [mine/own.py]", ""), encoding="utf-8")
    return tmp_path


def test_a_recipe_and_its_files_travel_and_the_log_and_the_exit_code_come_back(
    head: dict[str, str], folder: Path
) -> None:
    workspace = str(folder / "w")
    done = danlu(head, folder, "submit", "travels.yaml", "--workspace", workspace)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "200 of 200" in done.stdout and re.search(r"travels-\d{8}-\d{6} in .*: done", done.stderr)
    name = re.findall(r"travels-\d{8}-\d{6}", done.stderr)[0]
    time.sleep(1.1)  # a job's name has seconds
    again = danlu(head, folder, "submit", "travels.yaml", "--stage", "ingest", "--workspace", workspace, "--wait")
    assert again.returncode == 0 and again.stdout == "", again.stdout + again.stderr
    listed = danlu(head, folder, "jobs").stdout
    assert name in listed and "succeeded" in listed and "ingest" in listed
    assert "clean: up to date" not in danlu(head, folder, "logs", name).stdout
    assert "ingest: up to date" in danlu(head, folder, "logs", "travels").stdout
    unknown = danlu(head, folder, "logs", "nobody")
    assert unknown.returncode == 2 and "no job 'nobody'" in unknown.stderr and name in unknown.stderr


def test_what_is_wrong_on_the_cluster_ends_with_the_job_s_exit_code(head: dict[str, str], folder: Path) -> None:
    missing = f"ingest.source={folder}/nowhere.jsonl"
    done = danlu(head, folder, "submit", "travels.yaml", missing, "--workspace", str(folder / "w"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert "nowhere.jsonl" in done.stdout and "ended with exit code 2" in done.stderr
    assert "must be there on every node" in done.stderr
    relative = danlu(head, folder, "submit", "travels.yaml")
    assert relative.returncode == 2 and "absolute folder that every node sees" in relative.stderr


@pytest.mark.slow
def test_a_stopped_job_says_how_to_go_on_and_is_not_started_twice(head: dict[str, str], folder: Path) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / "own.py").write_text(OWN, encoding="utf-8")
    (folder / "mine" / "beside.py").write_text("SECONDS = 2.0\n", encoding="utf-8")
    (folder / "travels.yaml").write_text(RECIPE.replace("[{text", "[own_filter, {text"), encoding="utf-8")
    submitted = [str(BIN / "danlu"), "submit", "travels.yaml", "--workspace", str(folder / "w")]
    process = subprocess.Popen(
        submitted, cwd=folder, env=head, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout
    read = []
    for line in process.stdout:
        read.append(line)
        if "clean …" in line:
            break
    assert "clean …" in "".join(read)[-200:], "".join(read)
    twice = danlu(head, folder, *submitted[1:])
    assert twice.returncode == 2 and "goes on already, as travels-" in twice.stderr
    stopped = danlu(head, folder, "stop", "travels")
    said = process.communicate(timeout=120)[0]
    assert process.returncode == 143, said
    assert "terminated; what is finished is kept" in said and "the same danlu submit goes on from there" in said
    assert stopped.returncode == 0 and ": stopped; what is finished is kept" in stopped.stderr


@pytest.mark.slow
def test_ctrl_c_leaves_the_job_running(head: dict[str, str], folder: Path) -> None:
    process = subprocess.Popen(
        [str(BIN / "danlu"), "submit", "travels.yaml", "--workspace", str(folder / "w")],
        cwd=folder,
        env=head,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr and "submitted to" in process.stderr.readline()
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "goes on without being followed" in said, said
    followed = danlu(head, folder, "logs", "travels", "--follow")
    assert followed.returncode == 0 and "200 of 200" in followed.stdout, followed.stderr


def test_where_no_cluster_is_it_says_so_soon(folder: Path) -> None:
    env = {**os.environ, "http_proxy": "http://127.0.0.1:9"}
    env.pop("RAY_API_SERVER_ADDRESS", None)
    found = danlu(env, folder, "jobs", "--address", "http://127.0.0.1:1")
    assert found.returncode == 1 and "no cluster takes jobs at" in found.stderr and "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "address", ["10.0.0.1:8265", "http://127.0.0.1:99999", "http://h:abc", "http://[::1", "http://", "ftp://h:1"]
)
def test_what_can_be_no_address_of_a_cluster_is_refused(address: str) -> None:
    with pytest.raises(InputError, match=r"a cluster takes jobs at http://HOST:8265") as caught:
        Jobs(address)
    assert address in str(caught.value)


class Foreign(Handler):
    """A server that is no Ray cluster; what it answers is its path's first part."""

    def do_GET(self) -> None:
        kind = self.path.split("/")[1]
        if kind == "silent":
            time.sleep(5)
        elif kind == "json":
            self.send_json(200, [1])
        elif kind == "page":
            self.send(200, b"<html>hello</html>")
        else:
            self.send_json(int(kind), {"error": "x"})


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("404", "no Ray dashboard of today answers there"),
        ("json", "no Ray dashboard of today answers there"),
        ("page", "no Ray dashboard of today answers there"),
        ("503", "503 Server Error"),
        ("silent", "Read timed out"),
    ],
)
def test_what_is_no_cluster_is_told(kind: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submit, "ANSWER_SECONDS", 1)
    for name in submit.ADDRESSES:  # those of another cluster, which Ray puts before the address that is given
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    with listening(Foreign) as url, pytest.raises(StageError, match=told) as caught:
        Jobs(f"{url}/{kind}")
    assert url in str(caught.value) and "\n" not in str(caught.value)


def test_a_token_that_no_header_can_carry_is_told(folder: Path) -> None:
    env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "令牌"}
    with listening(Foreign) as url:
        found = danlu(env, folder, "jobs", "--address", f"{url}/json")
    assert found.returncode == 2 and "no other characters than ASCII" in found.stderr, found.stderr


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ("ingest.source=data/other.jsonl", "ingest.source: data/other.jsonl: no such file"),
        ("ingest.source=../rows.jsonl", "ingest.source: ../rows.jsonl lies outside of this folder"),
        ("ingest.source=~/rows.jsonl", "ingest.source: ~/rows.jsonl lies outside of this folder"),
        ("export={path: out.jsonl}", "export.path: out.jsonl would be written to the job's own folder"),
        ("ingest.source=data", "with data more than 0 MiB would travel"),
    ],
)
def test_what_cannot_travel_is_refused_by_key(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, changed: str, told: str
) -> None:
    monkeypatch.chdir(folder)
    if "MiB" in told:
        monkeypatch.setattr(submit, "MAX_BYTES", 1000)
    with pytest.raises(RecipeError, match=re.escape(told)):
        pack(load_recipe("travels.yaml", [changed]), Path("travels.yaml"), tmp_path_factory.mktemp("job"))


def test_patterns_folders_and_helpers_travel(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    (folder / "mine").mkdir()
    for name, text in {"own.py": "import beside", "beside.py": "", "not_imported.py": "", "notes.txt": ""}.items():
        (folder / "mine" / name).write_text(text, encoding="utf-8")
    (folder / "data" / "more").mkdir()
    (folder / "data" / "more" / "rows.jsonl").write_text("{}", encoding="utf-8")
    (folder / "travels.yaml").write_text(RECIPE.replace("data/rows.jsonl", '"data/**/*.jsonl"'), encoding="utf-8")
    job = tmp_path_factory.mktemp("job")
    pack(load_recipe("travels.yaml", ["clean.process=[text_length_filter]"]), Path("travels.yaml"), job)
    assert names_in(job) == ["data/more/rows.jsonl", "data/rows.jsonl", "mine/beside.py", "mine/own.py", "travels.yaml"]


def test_packages_that_an_operator_s_file_imports_travel(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    for name in (
        "rules/__init__.py",
        "rules/words/__init__.py",
        "rules/words/bad.py",
        "rules/notes.txt",
        "plain/more.py",
        "no/other.py",
    ):
        (folder / "mine" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "mine" / name).write_text("", encoding="utf-8")
    (folder / "mine" / "rules" / "words" / "bad.py").write_text("SECONDS = 0\n", encoding="utf-8")
    own = OWN.replace("import beside", "from rules.words import bad as beside\nimport plain.more")
    (folder / "mine" / "own.py").write_text(own, encoding="utf-8")
    (folder / "travels.yaml").write_text(RECIPE.replace("[{text", "[own_filter, {text"), encoding="utf-8")
    job = tmp_path_factory.mktemp("job")
    pack(pipeline.load("travels.yaml"), Path("travels.yaml"), job)
    packages = [
        "mine/own.py",
        "mine/plain/more.py",
        "mine/rules/__init__.py",
        "mine/rules/words/__init__.py",
        "mine/rules/words/bad.py",
    ]
    assert names_in(job) == ["data/rows.jsonl", *packages, "travels.yaml"]
    monkeypatch.chdir(job)
    assert pipeline.load("travels.yaml").clean


@pytest.mark.parametrize("inside", ["", "lists/"])
def test_an_entry_of_a_list_of_data_sets_travels_with_its_file(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch, inside: str
) -> None:
    monkeypatch.chdir(folder)
    (folder / inside).mkdir(exist_ok=True)
    row = {"问": "一", "答": "二"}
    for name in ("mine.jsonl", "more.jsonl", "other.jsonl"):
        (folder / inside / name).write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    columns = {"prompt": "问", "response": "答"}
    entries = {name: {"file_name": f"{name}.jsonl", "columns": columns} for name in ("mine", "more", "other", "gone")}
    (folder / inside / "dataset_info.json").write_text(json.dumps(entries, ensure_ascii=False), encoding="utf-8")
    source = f"ingest.source={inside}dataset_info.json#"
    changed = [f"{source}mine", "clean=null", f"split={{test_source: {inside}dataset_info.json#more}}"]
    job = tmp_path_factory.mktemp("job")
    pack(load_recipe("travels.yaml", changed), Path("travels.yaml"), job)
    there = sorted([f"{inside}dataset_info.json", f"{inside}mine.jsonl", f"{inside}more.jsonl", "travels.yaml"])
    assert names_in(job) == there
    monkeypatch.chdir(job)
    recipe = load_recipe("travels.yaml", changed)
    assert recipe.ingest and [row["response"] for row in first_rows(recipe.ingest, 5)] == ["二"]
    assert pipeline.problems_of(pipeline.stages_of(recipe), Workspace(str(folder / "w"))) == []
    monkeypatch.chdir(folder)
    with pytest.raises(RecipeError, match=rf"ingest\.source\.file_name: {inside}gone\.jsonl: no such file"):
        pack(load_recipe("travels.yaml", [f"{source}gone"]), Path("travels.yaml"), tmp_path_factory.mktemp("job"))


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [("SUCCEEDED", 0, 0), ("FAILED", 3, 3), ("FAILED", -9, 137), ("FAILED", None, 1), ("STOPPED", -15, 143)],
)
def test_exit_codes_follow_the_job(state: str, code: int | None, expected: int) -> None:
    assert exit_code(Job("j", "r", "", "w", state, 0.0, 1.0, code, "")) == expected
