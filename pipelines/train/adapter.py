"""From a checkpoint's ZeRO shards to a PEFT folder that peft and vLLM load."""

import json
import shutil
from pathlib import Path
from typing import Any

from pipelines.errors import StageError
from pipelines.train.checkpoint import replace_text
from pipelines.train.tokenize import load_tokenizer

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def export_adapter(checkpoint: Path, target: Path, base: Path) -> None:
    """Write the adapter of a checkpoint to `target`: float32 from the ZeRO shards, with tokenizer and chat template.

    The shards must agree with the copy that rank 0 saved beside them; StageError where they do not.
    """
    from safetensors.torch import load_file, save_file

    saved = load_file(checkpoint / WEIGHTS)
    weights = _from_zero_shards(checkpoint) if list(checkpoint.glob("global_step*/*optim_states.pt")) else saved
    _check_equal(weights, saved, checkpoint)
    scratch = target.with_name(target.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    save_file(weights, scratch / WEIGHTS, metadata={"format": "pt"})
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = str(base)
    replace_text(scratch / CONFIG, json.dumps(config, indent=2, sort_keys=True))
    load_tokenizer(base)[0].save_pretrained(scratch)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)


def _from_zero_shards(checkpoint: Path) -> dict[str, Any]:
    """The trained weights in float32, by the names peft's files use."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), exclude_frozen_parameters=True)
    return {name.replace(".default.", "."): value.contiguous().clone() for name, value in state.items()}


def _check_equal(weights: dict[str, Any], saved: dict[str, Any], checkpoint: Path) -> None:
    import torch

    different = [
        name
        for name in weights.keys() | saved.keys()
        if name not in weights or name not in saved or not torch.equal(weights[name].to(saved[name].dtype), saved[name])
    ]
    if different:
        raise StageError(
            f"{checkpoint}: the ZeRO shards and the saved adapter differ in {len(different)} tensors, such as "
            f"{min(different)}; delete this checkpoint and run again"
        )
