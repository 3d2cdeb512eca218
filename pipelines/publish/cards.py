"""Model card and data-set card, Chinese and English in one README, written from the manifests."""

from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

import jinja2
import yaml

from pipelines.evaluate.endpoint import BASE
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import Train
from pipelines.train.tokenize import parse_data

MISSING_LICENCE = "TODO: name the licence"
HYPERPARAMETERS = (
    "method",
    "max_length",
    "global_batch_size",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_ratio",
    "weight_decay",
    "num_train_epochs",
    "max_steps",
    "dtype",
    "zero_stage",
)

Reports = Mapping[str, Mapping[str, Any]]


def model_card(recipe: Recipe, reports: Reports) -> str:
    """README.md of the model: base, data, rows dropped by operator, hyper-parameters, losses, scores, licence."""
    publish, train = recipe.publish, recipe.train
    assert publish and train
    base = public_name(publish.base_model or train.model)
    front = {
        "license": publish.license or MISSING_LICENCE,
        "base_model": base,
        "tasks": ["text-generation"],
        "language": ["zh", "en"],
        "tags": [train.method, "danlu"],
    }
    settings = {name: value for name in HYPERPARAMETERS if (value := getattr(train, name)) is not None}
    settings |= {f"lora.{name}": value for name, value in train.lora.model_dump().items()}
    if publish.weights == "merged" and recipe.merge:
        settings["merge.base"] = recipe.merge.base
    return _render(
        "model.md.j2",
        front,
        name=_title(recipe, publish.model_id),
        base=base,
        weights=publish.weights,
        data=_data(recipe, reports),
        trained=[_entry(train, item) for item in train.data],
        system=train.system,
        settings=settings,
        train=reports["train"],
        scores=_scores(recipe, reports),
        license=publish.license or MISSING_LICENCE,
    )


def dataset_card(recipe: Recipe, reports: Reports) -> str:
    """README.md of the data set: source, rows dropped by operator, splits, licence."""
    publish = recipe.publish
    assert publish
    files = [{"split": side, "path": f"{side}.jsonl"} for side in reports["split"]["rows"]]
    front = {
        "license": publish.data_license or MISSING_LICENCE,
        "tags": ["danlu"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    return _render(
        "dataset.md.j2",
        front,
        name=_title(recipe, publish.dataset_id),
        data=_data(recipe, reports),
        rows=reports["split"]["rows"],
        license=publish.data_license or MISSING_LICENCE,
    )


def public_name(source: str) -> str:
    """A data source or model without what only this machine knows: a local path gives its last part."""
    scheme, separator, rest = source.partition("://")
    if separator:
        return rest if scheme in ("modelscope", "hf", "pypi", "recipes") else PurePath(rest).name
    return PurePath(source).name


def _title(recipe: Recipe, repository: str | None) -> str:
    return repository.rsplit("/", 1)[1] if repository else recipe.name


def _data(recipe: Recipe, reports: Reports) -> dict[str, Any]:
    return {
        "source": public_name(recipe.ingest.source) if recipe.ingest else "synthesized",
        "ingested": reports["ingest" if "ingest" in reports else "synthesize"]["rows"],
        "operators": reports.get("clean", {}).get("operators", []),
        "split": reports["split"]["rows"],
    }


def _entry(train: Train, item: str) -> str:
    """An entry of `train.data` as it may be published, such as `train` or `owner/name, 2000`."""
    name, rows = parse_data(item)
    name = train.sources[name].source if name in train.sources else name
    return public_name(name) + (f", {rows}" if rows is not None else "")


def _scores(recipe: Recipe, reports: Reports) -> list[dict[str, Any]]:
    """The main scores of base and tuned model on the held-out rows."""
    result = reports.get("evaluate", {}).get("results", {}).get("test")
    if result is None:
        return []
    base, tuned = result["models"][BASE], result["models"][recipe.name]
    names = ("rouge-1-f", "rouge-2-f", "rouge-l-f", "bleu-4")
    rows = [{"name": name, "base": base["scores"][name], "tuned": tuned["scores"][name]} for name in names]
    return [*rows, {"name": "loop", "base": base["style"]["loop"], "tuned": tuned["style"]["loop"]}]


def _render(template: str, front: dict[str, Any], **content: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown; every value is a name or a number of the recipe's own
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    head = yaml.safe_dump(front, allow_unicode=True, sort_keys=False)
    return f"---\n{head}---\n{environment.get_template(template).render(content)}\n"
