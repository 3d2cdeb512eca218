"""The models that come of a recipe: which there are, what they are called, and how they are served."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.artifacts.reports.train import MergeReport, TrainReport
from pipelines.artifacts.stage import Output
from pipelines.errors import DataError
from pipelines.models.served import BASE, MODELS, ServedModel, folder_of_base
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import not_servable


@dataclass(frozen=True)
class Lineup:
    """The models that come of a recipe: which there are, and what they are called."""

    name: str
    """The recipe's; what was trained is asked for by it."""
    serves_adapter: bool
    """Whether `name` stands for an adapter; else it stands for a model of its own, trained or merged."""
    merged: bool
    """Whether the adapter merged into its base is asked too, beside the adapter."""
    checkpoints: bool
    """Whether the kept checkpoints are asked too."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template of each of them is given."""

    def names(self) -> list[str]:
        """The names of the models that are compared: base, what was trained, and its adapter merged, if it is."""
        return [BASE, self.name, *([self.merged_name] if self.merged else [])]

    def fingerprint(self) -> dict[str, Any]:
        """What answers follow from beside the models and their names."""
        return {"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}

    @property
    def merged_name(self) -> str:
        """The name of the adapter's merged model."""
        return f"{self.name}-merged"


def lineup_of(recipe: Recipe) -> Lineup | None:
    """The models that the recipe leaves; None where it trains nothing."""
    if recipe.train is None:
        return None
    serves_adapter = recipe.train.method != "full" and not_servable(recipe.train) is None
    checkpoints = recipe.compare is not None and recipe.compare.checkpoints is not None
    merged = serves_adapter and recipe.merge is not None
    return Lineup(recipe.name, serves_adapter, merged, checkpoints, dict(recipe.chat_template_kwargs))


def served_models(lineup: Lineup, train: Output[TrainReport], merge: Output[MergeReport] | None) -> list[ServedModel]:
    """What an endpoint serves: the base with its adapters in one engine, the merged model in another.

    Where all weights were trained there is no adapter, and there are those that vLLM cannot load: the model that was
    trained, or merged, has the second engine.
    """
    report, base, given = train.report, str(base_model(train)), lineup.chat_template_kwargs
    if report.adapter is None or not lineup.serves_adapter:
        own = str(trained_whole(train, merge))
        return [
            ServedModel(BASE, base, chat_template_kwargs=given),
            ServedModel(lineup.name, own, chat_template_kwargs=given),
        ]
    adapters = {lineup.name: str(train.folder.local(report.adapter))}
    adapters |= dict(checkpoint_adapters(lineup, train).values())
    models = [ServedModel(BASE, base, adapters, chat_template_kwargs=given)]
    if merge is not None:
        folder = str(merge.folder.local(merge.report.model))
        models.append(ServedModel(lineup.merged_name, folder, chat_template_kwargs=given))
    return models


def base_model(train: Output[TrainReport]) -> Path:
    """The folder of the model that was trained on, also where the workspace was moved since; DataError without it."""
    named = Path(train.report.model)
    found = folder_of_base(named, Path(train.folder.workspace.local()))
    if found is None:
        raise DataError(
            f"{named}: the model that was trained on is not there, nor in {train.folder.workspace.path(MODELS)}; copy "
            "that folder too where the workspace was moved, or delete the folder of the stage train and run again"
        )
    return found


def trained_whole(train: Output[TrainReport], merge: Output[MergeReport] | None) -> Path:
    """The folder of a model that stands for itself: as merging wrote it, else as training all weights left it."""
    if merge is not None:
        return merge.folder.local(merge.report.model)
    return train.folder.local(train.report.weights)


def checkpoint_adapters(lineup: Lineup, train: Output[TrainReport]) -> dict[int, tuple[str, str]]:
    """The name and folder under which each kept checkpoint's adapter is served, by optimizer step."""
    if not lineup.checkpoints:
        return {}
    folders = [str(train.folder.local(name)) for name in train.report.checkpoints]
    steps = {int(folder.rsplit("-", 1)[1]): folder for folder in folders}
    return {step: (f"{lineup.name}-step{step}", folder) for step, folder in sorted(steps.items())}
