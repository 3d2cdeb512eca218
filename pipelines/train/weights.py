"""From a checkpoint's ZeRO shards to what other programs load: a PEFT folder, or a Hugging Face folder."""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pipelines.artifacts.workspace import sync_tree
from pipelines.errors import DataError, StageError
from pipelines.models.save_tokenizer import copy_tokenizer
from pipelines.models.skeleton import check_weights
from pipelines.models.weight_files import weight_shapes
from pipelines.train.checkpoint import replace_text
from pipelines.train.checkpoint_universal import shard_count
from pipelines.train.peft_warnings import peft_warnings_off

WEIGHTS, CONFIG, GENERATION = "adapter_model.safetensors", "adapter_config.json", "generation_config.json"


def export_adapter(checkpoint: Path, target: Path, base: Path) -> None:
    """Write the adapter of a checkpoint to `target`: float32 from the ZeRO shards, with tokenizer and chat template.

    The shards must agree with the copy that rank 0 saved beside them; StageError where they do not.
    """
    from safetensors.torch import load_file, save_file

    saved = load_file(checkpoint / WEIGHTS)
    weights = _from_zero_shards(checkpoint, trained_only=True) if shard_count(checkpoint) else saved
    # DeepSpeed adds the base model's buffers, such as the bias of GLM-4.5's and DeepSeek-V3's routers
    weights = {_name_in_file(name): value for name, value in weights.items() if ".lora_" in name}
    _check_equal(weights, saved, checkpoint)
    with _replaced(target) as scratch:
        save_file(weights, scratch / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = str(base)
        replace_text(scratch / CONFIG, json.dumps(config, indent=2, sort_keys=True))
        copy_tokenizer(base, scratch)
        if (base / GENERATION).is_file():
            shutil.copyfile(base / GENERATION, scratch / GENERATION)


def export_model(checkpoint: Path, target: Path, base: Path) -> None:
    """Write the fully trained model of a checkpoint to `target`: float32 from the ZeRO shards, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM

    sharded = bool(shard_count(checkpoint))
    model: Any = AutoModelForCausalLM.from_pretrained(base if sharded else checkpoint, dtype=torch.float32)
    if sharded:
        model.load_state_dict(_from_zero_shards(checkpoint, trained_only=False))
    with _replaced(target) as scratch:
        model.save_pretrained(scratch)
        copy_tokenizer(base, scratch)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, not a whole model."""
    return (folder / CONFIG).is_file()


def check_base(adapter: Path, base: Path) -> None:
    """DataError where an adapter's weights are not those that its configuration gives on a base; nothing is loaded.

    Names and shapes are compared in memory, where transformers may call modules otherwise than the files do.
    """
    import copy

    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict

    skeleton = check_weights(base)
    own = weight_shapes(adapter)
    try:
        config = PeftConfig.from_pretrained(str(adapter))
        with peft_warnings_off():
            adapted: Any = get_peft_model(copy.deepcopy(skeleton.model), config, low_cpu_mem_usage=True)
    except ValueError as error:  # as peft says that it finds none of the modules
        raise DataError(f"{adapter}: made for another base model than {base}: {error}") from None
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    there = {name: list(value.shape) for name, value in expected.items()}
    for name in sorted(own.keys() | there.keys()):
        if own.get(name) == there.get(name):
            continue
        if name not in there:
            said = "has no such module"
        elif name not in own:
            said = "has a module that the adapter has no weights for"
        else:
            sides = zip_longest(there[name], own[name], fillvalue=1)
            wide, own_wide = next((one, other) for one, other in sides if one != other)
            said = f"is {wide} wide there, the adapter {own_wide}"
        module = name.removeprefix("base_model.model.").partition(".lora_")[0]
        raise DataError(
            f"{adapter}: made for another base model than {base}, which {said}: {module}; "
            "give the base it was trained on"
        )


def digest_weights(folder: Path) -> str:
    """A digest of the weights in a folder, by content."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _name_in_file(name: str) -> str:
    """How peft's files call an adapter's parameter; DoRA's magnitudes lose more than the adapter's name."""
    return name.replace("_vector.default.weight", "_vector").replace(".default.", ".")


@contextmanager
def _replaced(target: Path) -> Iterator[Path]:
    """A folder to fill, that takes the place of `target` once it is full."""
    scratch = target.with_name(target.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir()
    yield scratch
    shutil.rmtree(target, ignore_errors=True)
    sync_tree(str(scratch))
    scratch.rename(target)


def _from_zero_shards(checkpoint: Path, trained_only: bool) -> dict[str, Any]:
    """Weights in float32, by the names of the model's parameters."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # steps and bars
        state = get_fp32_state_dict_from_zero_checkpoint(str(checkpoint), exclude_frozen_parameters=trained_only)
    return {name: value.contiguous().clone() for name, value in state.items()}


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
