"""Going on from an adapter: whether the section's can be trained further on its model."""

import json
from pathlib import Path

from pipelines.errors import DataError, Problem
from pipelines.models.adapter import PLAIN_STARTS, beyond_pairs
from pipelines.recipe.train import ADAPTER_CONFIG, Train
from pipelines.train.weights import WEIGHTS, check_base

KEY = "train.adapter"


def adapter_problems(section: Train, model: Path) -> list[Problem]:
    """Why the section's adapter cannot be gone on from on the model in a folder; nothing where it names none.

    Of its weights only the head of the file is read.
    """
    if section.adapter is None:
        return []
    folder = Path(section.adapter).expanduser()
    config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    wrong = [setting for setting in beyond_pairs(config) if not setting.startswith("target_parameters ")]
    if config.get("bias", "none") != "none":
        wrong.append(f"bias is {config['bias']}")
    start = config.get("init_lora_weights", True)
    if start is not None and start not in PLAIN_STARTS:
        wrong.append(f"init_lora_weights is {start}, for which its base model was changed")
    if wrong:
        return [_problem(f"{folder}: {', '.join(wrong)}, which is not trained on here; merge it and train the result")]
    if not (folder / WEIGHTS).is_file():
        return [_problem(f"{folder}: there is no {WEIGHTS}; save the adapter as safetensors")]
    try:
        check_base(folder, model)
    except DataError as error:
        return [_problem(str(error))]
    return []


def _problem(message: str) -> Problem:
    return Problem(KEY, message, on_every_machine=True)
