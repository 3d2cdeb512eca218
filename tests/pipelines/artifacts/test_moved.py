"""A workspace that was moved goes on where it is now, and nothing of it reads where it was."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.shards import HERE, Attempt, Shard, run_shards
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import DataError, StageError
from pipelines.models.lineup import Lineup, base_model, served_models
from pipelines.models.tokenizer import with_chat_template
from serve.adapter_registry import AdapterEngine, describe_engine, engine_of, publish
from tests.outputs import finished, train_report
from tests.small_adapter import write_adapter, write_model

MODEL = "models/small-1a2b3c4d"


def moved(old: Path, new: Path) -> Path:
    old.rename(new)  # links stay what they are
    return new


def trained(workspace: Path, model: str) -> Any:
    place = Place(Workspace(str(workspace)), "train", "f" * 8)
    return finished(place, train_report(model=model))


def base_named_by(folder: Path) -> str:
    return str(json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"])


@pytest.mark.parametrize("named", ["here", "elsewhere"])
def test_the_base_model_is_that_of_the_workspace_as_it_lies_now(tmp_path: Path, named: str) -> None:
    old = tmp_path / "old"
    write_model(old / MODEL if named == "here" else tmp_path / "own")
    model = str(old / MODEL if named == "here" else tmp_path / "own")
    new = tmp_path / "new"
    old.mkdir(exist_ok=True)
    shutil.copytree(old, new)  # the old one is still there, and may go at any time
    base = base_model(trained(new, model))
    assert base == (new / MODEL if named == "here" else Path(model))
    lineup = Lineup("tiny", serves_adapter=True, merged=False, checkpoints=False)
    (first,) = served_models(lineup, trained(new, model), None)
    assert (first.path, first.adapters["tiny"]) == (str(base), f"{new}/train/ffffffff/adapter")
    shutil.rmtree(base)
    shutil.rmtree(old)
    with pytest.raises(DataError, match=r"small-1a2b3c4d: the model that was trained on is not there|own: the model"):
        base_model(trained(new, model))


def test_a_model_with_the_recipe_s_own_template_moves_with_the_model_that_it_links_to(tmp_path: Path) -> None:
    write_model(tmp_path / "own")
    write_model(tmp_path / "old" / MODEL)
    cache = tmp_path / "old" / "models"
    inside, outside = (
        with_chat_template(model, "{{ x }}", cache) for model in (cache / "small-1a2b3c4d", tmp_path / "own")
    )
    new = moved(tmp_path / "old", tmp_path / "new")
    for linked in (inside, outside):
        found = base_model(trained(new, str(linked)))
        assert found == new / "models" / linked.name
        assert sorted(path.suffix for path in found.iterdir() if path.is_file()) == [
            ".jinja",
            ".json",
            *[".safetensors"] * 2,
        ]
        again = with_chat_template(new / MODEL if linked == inside else tmp_path / "own", "{{ x }}", new / "models")
        assert again == found
    shutil.rmtree(tmp_path / "own")
    with pytest.raises(DataError, match="the model that was trained on is not there"):
        base_model(trained(new, str(outside)))


def test_a_model_that_a_hub_s_client_put_into_the_workspace_is_found_where_that_is_now(tmp_path: Path) -> None:
    place = "models/huggingface/models--owner--small/snapshots/0123456789abcdef"
    write_model(tmp_path / "new" / place)
    assert base_model(trained(tmp_path / "new", f"/srv/models/old/{place}")) == tmp_path / "new" / place


def test_published_adapters_are_served_by_the_engine_of_the_moved_model(tmp_path: Path) -> None:
    old = tmp_path / "old"
    write_model(old / MODEL)
    write_model(tmp_path / "other")
    write_adapter(old / "train" / "adapter", str(old / MODEL))
    publish(old / "train" / "adapter", old / "adapters", "wishes", base=old / MODEL)
    publish(old / "train" / "adapter", old / "adapters", "other", base=tmp_path / "other")
    new = moved(old, tmp_path / "new")
    describe_engine(new / "adapters", AdapterEngine(str(new / MODEL)))
    assert base_named_by(new / "adapters" / "wishes@1") == str(new / MODEL)
    assert base_named_by(new / "adapters" / "other@1") == str(tmp_path / "other")
    assert sorted(os.listdir(new / "adapters" / "wishes@1")) == ["adapter_config.json", "adapter_model.safetensors"]
    assert oct((new / "adapters" / "wishes@1" / "adapter_config.json").stat().st_mode)[-3:] == "644"
    engine = engine_of(new / "adapters")
    assert engine and engine.base == str(new / MODEL)
    assert publish(new / "train" / "adapter", new / "second", "wishes") == "wishes@1"  # by what the adapter names
    assert base_named_by(new / "second" / "wishes@1") == str(new / MODEL)


def test_a_pass_that_was_half_done_goes_on_in_the_moved_workspace(tmp_path: Path, ray_cluster: None) -> None:
    workspace = Workspace(str(tmp_path / "old"))
    texts = [workspace.path("in", f"{number}.txt") for number in range(3)]
    for number, path in enumerate(texts):
        workspace.write(path, str(number).encode())

    def plan() -> list[Shard]:
        return [{"index": number, "path": path, "kept": "/elsewhere/x"} for number, path in enumerate(texts)]

    def work(shard: Shard, attempt: Attempt) -> dict[str, Any]:
        path = Path(shard["path"])
        if path.name == "2.txt" and "old" in shard["path"]:
            raise StageError("killed")
        return {"read": path.read_text(encoding="utf-8"), "path": shard["path"], "kept": shard["kept"]}

    with pytest.raises(StageError, match="killed"):
        run_shards(Place(workspace, "clean", "0"), "rows", plan, work, title="reading", concurrency=1)
    new = moved(tmp_path / "old", tmp_path / "new")
    stored = json.loads((new / "clean" / "0" / "rows" / "plan.json").read_text(encoding="utf-8"))
    assert stored[0]["path"] == f"{HERE}in/0.txt" and str(tmp_path) not in json.dumps(stored)
    place = Place(Workspace(str(new)), "clean", "0")
    commits = run_shards(place, "rows", plan, work, title="reading", concurrency=1)
    assert [commit["result"]["read"] for commit in commits] == ["0", "1", "2"]
    assert commits[2]["result"]["path"] == str(new / "in" / "2.txt")
    assert commits[2]["result"]["kept"] == "/elsewhere/x"
