"""Model card and data-set card, Chinese and English in one README, written from the manifests."""

from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import jinja2
import yaml

from pipelines.artifacts.reports.clean import ComparedSet, OperatorStats
from pipelines.artifacts.reports.evaluate import EvaluateReport
from pipelines.artifacts.reports.rows import Sides
from pipelines.artifacts.reports.train import TrainReport
from pipelines.models.served import BASE
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.publish import Publish
from pipelines.recipe.train import Merge, Train, parse_data

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


@dataclass(frozen=True)
class CardFacts:
    """What the cards tell: of the recipe, and of what its stages reported."""

    name: str
    """The recipe's."""
    publish: Publish
    train: Train
    merge: Merge | None
    ingest: Ingest | None
    is_synthesized: bool
    rows_read: int
    """Or synthesized."""
    operators: list[OperatorStats]
    evaluation_sets: list[ComparedSet]
    not_compared: list[str]
    sides: Sides
    trained: TrainReport
    evaluated: EvaluateReport | None


def model_card(facts: CardFacts) -> str:
    """README.md of the model: base, data, rows dropped by operator, hyper-parameters, losses, scores, licence."""
    publish, train = facts.publish, facts.train
    base = public_name(publish.base_model or train.model)
    front = {
        "license": publish.license or MISSING_LICENCE,
        "base_model": base,
        "tasks": ["text-generation"],
        "language": ["zh", "en"],
        "tags": [train.method, "danlu"],
    }
    section = train.model_dump()
    settings = {name: section[name] for name in HYPERPARAMETERS if section[name] is not None}
    settings |= {f"lora.{name}": value for name, value in train.lora.model_dump().items()}
    if publish.weights == "merged" and facts.merge:
        settings["merge.base"] = facts.merge.base
    return _render(
        "model.md.j2",
        front,
        name=_title(facts.name, publish.model_id),
        base=base,
        weights=publish.weights,
        data=_data(facts),
        trained=[_entry(train, item) for item in train.data],
        system=train.system,
        settings=settings,
        train=facts.trained,
        scores=_scores(facts.name, facts.evaluated),
        license=publish.license or MISSING_LICENCE,
    )


def dataset_card(facts: CardFacts) -> str:
    """README.md of the data set: source, rows dropped by operator, splits, licence."""
    publish = facts.publish
    files = [{"split": side, "path": f"{side}.jsonl"} for side in ("train", "test")]
    front = {
        "license": publish.data_license or MISSING_LICENCE,
        "tags": ["danlu"],
        "configs": [{"config_name": "default", "data_files": files}],
    }
    return _render(
        "dataset.md.j2",
        front,
        name=_title(facts.name, publish.dataset_id),
        data=_data(facts),
        rows=facts.sides,
        license=publish.data_license or MISSING_LICENCE,
    )


def public_name(source: str) -> str:
    """A data source or model without what only this machine knows: a local path gives its last part."""
    scheme, separator, rest = source.partition("://")
    if separator:
        return rest if scheme in ("modelscope", "hf", "pypi", "recipes") else PurePath(rest).name
    return PurePath(source).name


def _title(name: str, repository: str | None) -> str:
    return repository.rsplit("/", 1)[1] if repository else name


def _data(facts: CardFacts) -> dict[str, Any]:
    return {
        "source": ", ".join(_origins(facts)),
        "ingested": facts.rows_read,
        "operators": facts.operators,
        "evaluation_sets": facts.evaluation_sets,
        "not_compared": facts.not_compared,
        "split": facts.sides,
    }


def _origins(facts: CardFacts) -> list[str]:
    """Where the rows come from."""
    sources = [facts.ingest, *facts.ingest.sources.values()] if facts.ingest else []
    return [*(public_name(source.source) for source in sources), *(["synthesized"] if facts.is_synthesized else [])]


def _entry(train: Train, item: str) -> str:
    """An entry of `train.data` as it may be published, such as `train` or `owner/name, 2000`."""
    name, rows = parse_data(item)
    name = train.sources[name].source if name in train.sources else name
    return public_name(name) + (f", {rows}" if rows is not None else "")


def _scores(name: str, evaluated: EvaluateReport | None) -> list[dict[str, Any]]:
    """The main scores of base and tuned model on the held-out rows."""
    if evaluated is None or "test" not in evaluated.results:
        return []
    models = evaluated.results["test"].models
    base, tuned = models[BASE], models[name]
    metrics = ("rouge-1-f", "rouge-2-f", "rouge-l-f", "bleu-4")
    rows = [{"name": metric, "base": base.scores[metric], "tuned": tuned.scores[metric]} for metric in metrics]
    return [*rows, {"name": "loop", "base": base.style["loop"], "tuned": tuned.style["loop"]}]


def _render(template: str, front: dict[str, Any], **content: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=False,  # Markdown; every value is a name or a number of the recipe's own
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    head = yaml.safe_dump(front, allow_unicode=True, sort_keys=False)
    return f"---\n{head}---\n{environment.get_template(template).render(content)}\n"
