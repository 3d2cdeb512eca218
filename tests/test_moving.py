"""A workspace that lies elsewhere before each stage: it goes on, is served and published from there."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.artifacts.staging import Staging
from pipelines.artifacts.workspace import Workspace
from rayjobs import pipeline
from rayjobs.cluster import Cluster
from rayjobs.deploy import finished_models
from serve.adapter_registry import versions
from tests.model_families import CHATML, write_internlm2
from tests.pipelines.evaluate.fake_endpoint import chat_server_running
from tests.pipelines.train.conftest import chats

pytestmark = pytest.mark.timeout(2400)  # several commands that each start a Ray

STAGES = ("ingest", "clean", "split", "train", "merge", "evaluate", "publish")
MOVED_AFTER = ("split", "train", "merge", "publish")


def danlu(*arguments: str) -> str:
    """What the command says; it has to end well."""
    command = [str(Path(sys.executable).with_name("danlu")), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout + done.stderr


def write_recipe(folder: Path, endpoint: str) -> Path:
    """A recipe of all the stages, whose model is converted into the workspace, and has a chat template of its own."""
    write_internlm2(folder / "internlm2")
    rows = [{"query": row["query"], "response": row["response"]} for row in chats(40)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    train: dict[str, Any] = {
        "model": str(folder / "internlm2"),
        "chat_template": CHATML,
        "resources_per_worker": {"CPU": 1},
        "dtype": "float32",
        "max_length": 256,
        "global_batch_size": 4,
        "max_steps": 3,
        "eval_rows": 4,
    }
    tree = {
        "name": "tiny",
        "ingest": {"source": str(folder / "rows.jsonl")},
        "clean": {"process": [{"text_length_filter": {"min_len": 1}}]},
        "split": {"test_ratio": 0.2},
        "train": train,
        "merge": {},
        "evaluate": {"endpoint": endpoint, "limit": 2, "generation": {"max_tokens": 16}},
        "publish": {"weights": "merged"},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")
    return folder / "tiny.yaml"


@pytest.mark.slow
def test_a_workspace_moved_to_a_bucket_goes_on_there(bucket: str, tmp_path: Path) -> None:
    with chat_server_running() as server:
        recipe = str(write_recipe(tmp_path, server.url))
        at, there = tmp_path / "w", Workspace(f"{bucket}/run")
        danlu("run", recipe, "--to", "train", "--workspace", str(at))
        for path in filter(Path.is_file, at.rglob("*")):
            there.store(path, there.path(str(path.relative_to(at))))
        shutil.rmtree(at)
        said = danlu("run", recipe, "--workspace", there.root)
    assert said.count("up to date") == 4, said
    (model,) = (path for path in there.files(there.path("publish")) if path.endswith("/model/model.safetensors"))
    (merged,) = (path for path in there.files(there.path("merge")) if path.endswith(".safetensors"))
    assert there.read(model) == there.read(merged)


@pytest.mark.slow
def test_all_stages_run_on_a_bucket_which_is_served_and_moved_to_a_folder(bucket: str, tmp_path: Path) -> None:
    there, at = Workspace(f"{bucket}/run"), tmp_path / "w"
    with chat_server_running() as server:
        recipe = str(write_recipe(tmp_path, server.url))
        danlu("run", recipe, "--workspace", there.root)
        names = [path.removeprefix(there.path("")) for path in there.files(there.root)]
        assert not [name for name in names if ".tmp" in name or ".part" in name]
        with Staging(there) as staging:
            base, merged = finished_models(pipeline.load(recipe), staging, Cluster())
            folder = Path(staging.here.root)
            for model in (base, merged):
                assert Path(model.path).is_relative_to(folder) and Path(model.path, "chat_template.jinja").is_file()
            assert base.registry == str(folder / "adapters") and versions(folder / "adapters") == ["tiny@1"]
        assert "⟦loss⟧" in danlu("template", recipe, "--workspace", there.root)
        for name in names:
            there.fetch(there.path(name), at / name)
        said = danlu("run", recipe, "--workspace", str(at))
    assert said.count("up to date") == len(STAGES), said


@pytest.mark.slow
def test_every_stage_goes_on_where_the_workspace_lies_now(tmp_path: Path) -> None:
    with chat_server_running() as server:
        recipe = str(write_recipe(tmp_path, server.url))
        at, done = tmp_path / "first", 0
        for stage in MOVED_AFTER:
            said = danlu("run", recipe, "--to", stage, "--workspace", str(at))
            assert said.count("up to date") == done, said
            done = STAGES.index(stage) + 1
            at = at.rename(tmp_path / f"after-{stage}")
    config = tmp_path / "serve.yaml"
    said = danlu("serve", recipe, "--workspace", str(at), "--write-config", str(config))
    assert said.count("up to date") == 5, said
    assert_served_from(at, config)


def assert_served_from(workspace: Path, config: Path) -> None:
    """That base, adapter and merged model are served from the workspace, and all of their files are there."""
    applications = yaml.safe_load(config.read_text(encoding="utf-8"))["applications"]
    base, merged = next(one["args"]["models"] for one in applications if "models" in one["args"])
    assert base["registry"] == str(workspace / "adapters")
    adapter = json.loads((workspace / "adapters" / "tiny@1" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == base["path"]
    for model in (base, merged):
        folder = Path(model["path"])
        assert folder.is_relative_to(workspace)
        files = list(folder.iterdir())
        assert {"config.json", "chat_template.jinja"} <= {file.name for file in files if file.is_file()}
        assert all(file.exists() for file in files), files
