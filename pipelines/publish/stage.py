"""Publish: a folder for a model hub, with a card written from the manifests, and, if wanted, its upload to ModelScope.

<place>/model/      weights, tokenizer, configuration.json, README.md
<place>/dataset/    train.jsonl, test.jsonl, README.md
<place>/upload/     what has been uploaded, so that a broken upload goes on where it stopped
"""

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from pipelines.artifacts.shards import read_tables
from pipelines.artifacts.workspace import Place, to_json
from pipelines.errors import Problem, RecipeError
from pipelines.progress import say
from pipelines.publish.cards import dataset_card, model_card, public_name
from pipelines.publish.upload import TOKEN, Kind, upload
from pipelines.recipe.schema import Recipe

VERSION = 1
CONFIGURATION = {"framework": "pytorch", "task": "text-generation"}
"""ModelScope's configuration.json, without which it takes a folder for no model."""


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section, and what the cards say of other sections."""
    assert recipe.publish and recipe.train
    source = recipe.ingest.source if recipe.ingest else None
    return {"section": recipe.publish.model_dump(), "train": recipe.train.model_dump(), "source": source}


def preflight(recipe: Recipe) -> None:
    """RecipeError where an upload is wanted and there is no token for it."""
    assert recipe.publish
    if recipe.publish.upload and not os.environ.get(TOKEN):
        raise RecipeError(recipe.name, [Problem("publish.upload", f"needs the environment variable {TOKEN}")])


def publish(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Write the folders of model and data set with their cards, and upload those that have a repository."""
    section = recipe.publish
    assert section
    reports = {name: source.report() for name, source in place.inputs.items()}
    folders = {"model": place.local("model"), "dataset": place.local("dataset")}
    _write_model(recipe, place, folders["model"])
    _write_dataset(place, folders["dataset"])
    (folders["model"] / "README.md").write_text(model_card(recipe, reports), encoding="utf-8")
    (folders["dataset"] / "README.md").write_text(dataset_card(recipe, reports), encoding="utf-8")
    uploaded = {}
    repositories: dict[Kind, str | None] = {"model": section.model_id, "dataset": section.dataset_id}
    for kind, repository in repositories.items():
        if repository and section.upload:
            memory = place.local("upload", f"{kind}.json")
            uploaded[kind] = upload(section, kind, repository, folders[kind], memory)
        elif repository:
            say(f"  {kind}: would be uploaded to {repository}; publish.upload=true does it")
    done = "; ".join(f"{kind} at {address}" for kind, address in uploaded.items()) or "nothing uploaded"
    return {
        "summary": f"model and data set with their cards; {done}",
        "digest": hashlib.sha256(to_json(_sizes(folders))).hexdigest(),
        "uploaded": uploaded,
        "files": {kind: kind for kind in folders},
    }


def _write_model(recipe: Recipe, place: Place, folder: Path) -> None:
    """The weights that are published, without what names this machine."""
    section, train = recipe.publish, recipe.train
    assert section and train
    stage, key = ("train", "adapter") if section.weights == "adapter" else ("merge", "model")
    source = place.inputs[stage].local(place.inputs[stage].report()[key])
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source, folder, copy_function=_link)
    (folder / "configuration.json").write_bytes(to_json(CONFIGURATION))
    config = folder / "adapter_config.json"
    if config.exists():
        adapter = json.loads(config.read_text(encoding="utf-8"))
        adapter["base_model_name_or_path"] = public_name(section.base_model or train.model)
        config.unlink()  # a link to the workspace's own copy, which keeps its path
        config.write_bytes(to_json(adapter))


def _link(source: str, target: str) -> None:
    """A second name for the same bytes where the file system has that, else a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)  # with its time, by which the client knows what it has uploaded


def _write_dataset(place: Place, folder: Path) -> None:
    """Both sides of the split as JSONL, without columns that are empty throughout a row."""
    folder.mkdir(parents=True, exist_ok=True)
    for side in ("train", "test"):
        with open(folder / f"{side}.jsonl", "w", encoding="utf-8") as sink:
            for table in read_tables(place.workspace, place.inputs["split"].outputs(side)):
                for row in table.drop_columns(["pos"]).to_pylist():
                    kept = {name: value for name, value in row.items() if value is not None}
                    sink.write(json.dumps(kept, ensure_ascii=False, default=str) + "\n")


def _sizes(folders: dict[str, Path]) -> dict[str, int]:
    files = [file for folder in folders.values() for file in sorted(folder.rglob("*")) if file.is_file()]
    return {f"{file.parent.name}/{file.name}": file.stat().st_size for file in files}
