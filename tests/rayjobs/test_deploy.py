"""What training hands to serving."""

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import yaml

pytest.importorskip("ray.serve")

from pipelines.artifacts.files import Destination
from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Output
from pipelines.artifacts.staging import Staging
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import InputError, RecipeError, StageError
from pipelines.models.lineup import Lineup, lineup_of
from pipelines.models.served import ServedModel
from pipelines.recipe.schema import Recipe
from rayjobs import deploy
from rayjobs.cluster import Cluster
from rayjobs.pipeline import load, publish_adapter
from serve.adapter_registry import aliases, versions
from serve.app import claim_port
from serve.engine.command import adapter_room
from tests.outputs import finished, merge_report, train_report
from tests.rayjobs.conftest import free_ports
from tests.small_adapter import write_adapter, write_model


def trained(folder: Path, **report: Any) -> Output[TrainReport]:
    """A finished training stage whose adapter is a few bytes."""
    place = Place(Workspace(str(folder)), "train", "f" * 8)
    write_adapter(place.local("adapter"), "elsewhere")
    write_model(folder / "base")
    return finished(place, train_report(model=str(folder / "base"), **report))


def lineup(recipe: Recipe) -> Lineup:
    """The models of a recipe that trains one."""
    found = lineup_of(recipe)
    assert found is not None
    return found


def test_what_was_trained_is_published_for_endpoints_that_run(tmp_path: Path) -> None:
    recipe, output = load("tiny"), trained(tmp_path)
    published = [publish_adapter(recipe, output.folder, output.report) for _ in range(2)]
    assert published == ["tiny@1", "tiny@1"]
    write_adapter(output.folder.local("adapter"), "elsewhere", seed=1)
    assert publish_adapter(recipe, output.folder, output.report) == "tiny@2"
    registry = tmp_path / "adapters"
    assert (versions(registry), aliases(registry)) == (["tiny@1", "tiny@2"], {"tiny": "tiny@2"})
    config = json.loads((registry / "tiny@2" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tmp_path / "base")
    assert deploy.trained_models(lineup(recipe), {"train": output}, registry) == [
        ServedModel("base", str(tmp_path / "base"), registry=str(registry))
    ]


def test_a_model_that_was_trained_whole_is_served_beside_its_base(tmp_path: Path) -> None:
    recipe, output = load("tiny"), trained(tmp_path, adapter=None, trained="trained")
    assert publish_adapter(recipe, output.folder, output.report) is None
    assert deploy.trained_models(lineup(recipe), {"train": output}, tmp_path / "adapters") == [
        ServedModel("base", str(tmp_path / "base")),
        ServedModel("tiny", str(output.folder.local("trained"))),
    ]


def test_an_adapter_of_the_registry_is_served_beside_the_merged_model(tmp_path: Path) -> None:
    recipe, output = load("tiny"), trained(tmp_path)
    merged = finished(Place(Workspace(str(tmp_path)), "merge", "e" * 8), merge_report())
    assert deploy.trained_models(lineup(recipe), {"train": output, "merge": merged}, tmp_path / "adapters") == [
        ServedModel("base", str(tmp_path / "base"), registry=str(tmp_path / "adapters")),
        ServedModel("tiny-merged", str(merged.folder.local("model"))),
    ]


def test_engines_have_room_for_the_adapter_that_is_trained() -> None:
    recipe = load("tiny", ["train.lora.r=32"])
    assert recipe.serve.engine.max_lora_rank == 16
    section = deploy.served_section(recipe)
    base = ServedModel("base", "/m", registry="/adapters")
    assert adapter_room(base, section.engine) == (section.engine.max_loras, 32)
    assert deploy.served_section(load("tiny")) == load("tiny").serve


def test_a_dora_adapter_is_neither_published_nor_served(tmp_path: Path) -> None:
    recipe, output = load("tiny", ["train.lora.use_dora=true", "merge={}"]), trained(tmp_path)
    assert publish_adapter(recipe, output.folder, output.report) is None
    merged = finished(Place(Workspace(str(tmp_path)), "merge", "e" * 8), merge_report())
    assert deploy.trained_models(lineup(recipe), {"train": output, "merge": merged}, tmp_path / "adapters") == [
        ServedModel("base", str(tmp_path / "base")),
        ServedModel("tiny", str(merged.folder.local("model"))),
    ]
    alone = load("tiny", ["train.lora.use_dora=true", "merge=null", "evaluate=null", "compare=null"])
    with pytest.raises(RecipeError, match=r"merge: train\.lora\.use_dora: vLLM loads no DoRA adapters"):
        deploy.finished_models(alone, Staging(Workspace(str(tmp_path))), Cluster())


def test_on_a_cluster_nothing_is_trained_for_a_bucket_that_is_served(bucket: str) -> None:
    there, (port,) = Workspace(f"{bucket}/run"), free_ports(1)
    with pytest.raises(StageError, match=r"/run: merge is not done; run the recipe there before it is served"):
        deploy.serve_forever(load("tiny"), there, Cluster("127.0.0.1:6379"), port=port)


def test_an_open_address_without_keys_is_refused_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DANLU_API_KEYS", raising=False)
    with pytest.raises(RecipeError, match=r"serve\.host: others reach 0\.0\.0\.0"):
        deploy.serve_forever(load("tiny"), Workspace(str(tmp_path)), Cluster(), host="0.0.0.0")


def test_a_port_that_is_taken_is_told_before_anything_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deploy, "finished_models", lambda *_: pytest.fail("it trains"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StageError, match=rf"cannot listen on 127\.0\.0\.1:{port}: .* choose another serve\.port"):
            deploy.serve_forever(load("tiny"), Workspace(str(tmp_path)), Cluster(), port=port)


def test_a_port_that_is_free_is_none_that_a_connection_gets_until_it_is_listened_on() -> None:
    ports = {claim_port("127.0.0.1", None) for _ in range(10)}
    lowest, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    assert len(ports) > 1 and max(ports) < lowest


def test_configuration_is_written_for_clusters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models = [ServedModel("base", "/shared/base", registry="/shared/adapters")]
    monkeypatch.setattr(deploy, "finished_models", lambda *_: models)
    files = tmp_path / "serve" / "config.yaml", tmp_path / "service.yaml"

    def write(**said: bool) -> None:
        targets = (Destination("--write-config", str(file), "--overwrite", **said) for file in files)
        deploy.write_config(load("tiny"), Workspace(str(tmp_path)), Cluster(), *targets)

    write()
    config, service = (yaml.safe_load(file.read_text()) for file in files)
    assert config["applications"][0]["args"]["model"]["path"] == "/shared/base"
    inner = yaml.safe_load(service["spec"]["serveConfigV2"])
    hosts = [text["applications"][-1]["args"]["serve"]["host"] for text in (config, inner)]
    assert hosts == ["127.0.0.1", "0.0.0.0"]
    write()  # as it was written, so it is not somebody's
    files[1].write_text("by hand", encoding="utf-8")
    with pytest.raises(InputError, match=r"--write-config: .*service\.yaml was changed .* --overwrite"):
        write()
    assert files[1].read_text(encoding="utf-8") == "by hand"
    write(overwrite=True)
    assert yaml.safe_load(files[1].read_text())["kind"] == "RayService"
