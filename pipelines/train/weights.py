"""From a checkpoint's ZeRO shards to what other programs load: a PEFT folder, or a Hugging Face folder."""

import contextlib
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipelines.artifacts.workspace import sync_tree
from pipelines.errors import DataError, StageError
from pipelines.models.resolve import weight_shapes
from pipelines.models.tokenizer import load_tokenizer
from pipelines.train.checkpoint import replace_text
from pipelines.train.checkpoint_universal import shard_count

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def export_adapter(checkpoint: Path, target: Path, base: Path) -> None:
    """Write the adapter of a checkpoint to `target`: float32 from the ZeRO shards, with tokenizer and chat template.

    The shards must agree with the copy that rank 0 saved beside them; StageError where they do not.
    """
    from safetensors.torch import load_file, save_file

    saved = load_file(checkpoint / WEIGHTS)
    weights = _from_zero_shards(checkpoint, trained_only=True) if shard_count(checkpoint) else saved
    weights = {_name_in_file(name): value for name, value in weights.items()}
    _check_equal(weights, saved, checkpoint)
    with _replaced(target) as scratch:
        save_file(weights, scratch / WEIGHTS, metadata={"format": "pt"})
        config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = str(base)
        replace_text(scratch / CONFIG, json.dumps(config, indent=2, sort_keys=True))
        load_tokenizer(base)[0].save_pretrained(scratch)


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
        load_tokenizer(base)[0].save_pretrained(scratch)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter, not a whole model."""
    return (folder / CONFIG).is_file()


def check_base(adapter: Path, base: Path) -> None:
    """DataError where an adapter's modules are not those of a base model, by name and shape; nothing is loaded.

    A base without safetensors is not checked.
    """
    own, there = weight_shapes(adapter), weight_shapes(base)
    turned = json.loads((adapter / CONFIG).read_text(encoding="utf-8")).get("fan_in_fan_out", False)
    for name, shape in own.items() if there else ():
        module, _, side = name.removeprefix("base_model.model.").rpartition(".lora_")
        if side not in ("A.weight", "B.weight"):  # embeddings and magnitudes have shapes of their own
            continue
        found = there.get(f"{module}.weight")
        axis = int((side[0] == "A") != turned)
        if found is None or found[axis] != shape[axis]:
            said = "has no such module" if found is None else f"is {found[axis]} wide there, the adapter {shape[axis]}"
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
