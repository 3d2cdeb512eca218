"""What is served: models, and the names clients call them by.

Every gateway and engine replica imports this, so it stands on little: what a recipe leaves to serve is in lineup.py.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import Problem, RecipeError

BASE = "base"
"""The name under which the model before training is asked."""

MODELS = "models"
"""The folder of a workspace for models that were fetched or converted."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,127}")
"""Names reach vLLM's adapter resolver, which joins them to a folder: no separators, no leading dot, no colon."""


@dataclass(frozen=True)
class ServedModel:
    """A model folder with the adapters that one engine serves beside it.

    `adapters` maps names to adapter folders. `registry` is a folder in which adapters are published later.
    """

    name: str
    path: str
    adapters: dict[str, str] = field(default_factory=dict)
    registry: str | None = None
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What its chat template is given where a request says nothing else."""

    @property
    def has_adapters(self) -> bool:
        """Whether the engine needs LoRA."""
        return bool(self.adapters) or self.registry is not None


def is_valid_name(name: str) -> bool:
    """Whether a model name can be served and asked for."""
    return NAME.fullmatch(name) is not None and ".." not in name


def folder_of_base(named: Path, workspace: Path) -> Path | None:
    """Where a model lies that was fetched or converted into a workspace's `models`, wherever the workspace is now.

    Its place there ends in a digest of its content, or is a hub's own, so that what lies there is the one. Any other
    model is where it is `named`. None where it is in neither place, or its files are links to what is no longer there.
    """
    places = [workspace / MODELS / named.relative_to(above) for above in named.parents if above.name == MODELS]
    return next((place for place in (*places, named) if (place / "config.json").is_file()), None)


def check_models(models: list[ServedModel]) -> None:
    """Refuse names that cannot be served or are given twice; raises RecipeError with all of them."""
    names = [name for model in models for name in (model.name, *model.adapters)]
    problems = [
        Problem(name, "not a servable name: letters, digits, '.', '_', '-' and '@' only, without '..'")
        for name in names
        if not is_valid_name(name)
    ]
    problems += [Problem(name, "two models have this name") for name, count in Counter(names).items() if count > 1]
    if not models:
        problems.append(Problem("serve", "no model to serve"))
    if problems:
        raise RecipeError("serve", problems)
