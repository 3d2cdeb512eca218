"""Whether vLLM can serve an adapter on a base model, and then computes what was trained.

vLLM finds out when the first request comes, answers with what fits, or passes over settings it does not know: an
adapter whose matrices are half as wide is answered with wrong text. So it is checked before it is published. Only the
heads of the weight files are read.
"""

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import DataError
from pipelines.recipe.serve import MAX_LORA_RANK

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"

READ = ("r", "lora_alpha", "target_modules", "use_rslora", "peft_type", "base_model_name_or_path")
WITHOUT_EFFECT = (
    *("task_type", "auto_mapping", "peft_version", "revision", "inference_mode", "exclude_modules", "lora_dropout"),
    *("layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "qalora_group_size"),
    *("eva_config", "ensure_weight_tying", "runtime_config"),
)
"""PEFT's settings that change nothing of what a finished adapter computes."""

PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal")
"""`init_lora_weights` that leave the base model as it is; others (pissa, olora, corda, loftq, lora_ga) change it."""

LARGEST_HEAD = 100 << 20
"""Bytes of a safetensors head; the format's own limit."""


@dataclass(frozen=True)
class Tensor:
    """A tensor in a weight file: its type by safetensors' name, such as BF16, and its shape."""

    dtype: str
    shape: tuple[int, ...]


def check_adapter(folder: Path, base: Path, max_lora_rank: int = MAX_LORA_RANK) -> None:
    """Raise DataError with everything for which vLLM could not serve the adapter in `folder` on the model in `base`."""
    config = _read_config(folder / CONFIG)
    problems = _config_problems(config, max_lora_rank)
    if not (base / "config.json").is_file():
        problems.append(f"no base model at {base}: no config.json there")
    tensors = tensors_of(folder / WEIGHTS)
    if not problems:
        problems = _tensor_problems(tensors, config["r"], base_tensors(base))
    if problems:
        shown = [*problems[:5], *([f"and {len(problems) - 5} more"] if len(problems) > 5 else [])]
        raise DataError(f"{folder}: cannot be served: " + "; ".join(shown))


def _read_config(file: Path) -> dict[str, Any]:
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise DataError(f"{file}: not a JSON object")
    return config


def _config_problems(config: dict[str, Any], max_lora_rank: int) -> list[str]:
    """What in an adapter's configuration vLLM does not load, or passes over though it changes the answer."""
    problems = []
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA":
        problems.append(f"peft_type is {config.get('peft_type')!r}; vLLM loads LORA alone")
    if type(rank) is not int or rank < 1:
        problems.append(f"r is {rank!r}, not a whole number above 0")
    elif rank > max_lora_rank:
        problems.append(f"r is {rank}, and the engine has room for {max_lora_rank} (serve.engine.max_lora_rank)")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        problems.append(f"lora_alpha is {alpha!r}, not a number")
    if config.get("use_dora"):
        problems.append("use_dora: vLLM loads no DoRA adapters; merge it and serve the merged model")
    if config.get("bias", "none") != "none":
        problems.append(f"bias is {config['bias']!r}: vLLM loads no biases; merge it")
    start = config.get("init_lora_weights", True)
    if start is not None and start not in PLAIN_STARTS:
        problems.append(f"init_lora_weights is {start!r}: its base model was changed before training; convert it")
    problems += [f"{setting}: vLLM passes over it; merge the adapter" for setting in beyond_pairs(config)]
    return problems


def beyond_pairs(config: Mapping[str, Any]) -> list[str]:
    """Settings, with their values, by which an adapter is more than a pair of matrices of rank `r` for each layer."""
    known = {*READ, *WITHOUT_EFFECT, "use_dora", "bias", "init_lora_weights"}
    return [
        f"{key} is {json.dumps(value)[:60]}"
        for key, value in config.items()
        if key not in known and value not in (None, False, "none") and value != {} and value != []
    ]


def _tensor_problems(tensors: dict[str, Tensor], rank: int, base: dict[str, Tensor]) -> list[str]:
    """What does not fit: pairs of matrices with each other, with the rank, and with the base model's weights."""
    problems = []
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        module, found, side = name.rpartition(".lora_")
        if not found or side not in ("A.weight", "B.weight"):
            problems.append(f"{name}: not a matrix of a linear layer's adapter")
        elif len(tensor.shape) != 2 or not tensor.dtype.startswith(("F", "BF")):
            problems.append(f"{name}: {tensor.dtype} {list(tensor.shape)}, not a matrix of numbers")
        else:
            pairs.setdefault(module, {})[side[0]] = tensor
    if not tensors:
        problems.append(f"{WEIGHTS} holds no tensors")
    weights = {_place(name): tensor for name, tensor in base.items()}
    for module, pair in pairs.items():
        if len(pair) < 2:
            problems.append(f"{module}: lora_{next(iter(pair))} without its other half")
            continue
        (rank_a, inputs), (outputs, rank_b) = pair["A"].shape, pair["B"].shape
        if rank_a != rank or rank_b != rank:
            problems.append(f"{module}: matrices of rank {rank_a} and {rank_b}, and r is {rank}")
            continue
        weight = weights.get(_place(f"{module}.weight"))
        if weight is None and module.endswith(".lm_head"):  # tied to the embedding
            weight = next((t for name, t in base.items() if name.endswith("embed_tokens.weight")), None)
        if weight is None:
            if base and not _is_repacked(module, weights):
                problems.append(f"{module}: the base model has no such layer")
        elif weight.dtype.startswith(("F", "BF")) and weight.shape != (outputs, inputs):
            theirs = "×".join(map(str, weight.shape))
            problems.append(f"{module}: made for a layer of {outputs}×{inputs}, the base model's is {theirs}")
    return problems


def _place(name: str) -> str:
    """A layer's name without what wraps the model: `layers.0.self_attn.q_proj.weight`.

    What stands before differs between PEFT, text models and those in multimodal folders.
    """
    _, found, rest = name.rpartition(".layers.")
    return f"layers.{rest}" if found else name.removeprefix("base_model.model.")


def _is_repacked(module: str, weights: dict[str, Tensor]) -> bool:
    """Whether a layer has another name or form in the base's files: quantised, or one of many experts."""
    place = _place(module)
    forms = (f"{place}.{form}" for form in ("qweight", "weight_packed", "base_layer.weight"))
    return ".experts" in place or any(form in weights for form in forms)


def base_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of a model folder, from the heads of its safetensors files; none where it has other files."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in tensors_of(file).items()}


def tensors_of(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file by name; raises DataError where the file is not one, or is cut off."""
    size = os.path.getsize(file)
    with file.open("rb") as opened:
        start = opened.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size - 8, LARGEST_HEAD):
            raise DataError(f"{file}: not a safetensors file, or cut off in its head")
        head = opened.read(length)
    try:
        entries = json.loads(head)
        entries.pop("__metadata__", None)
        tensors = {name: Tensor(entry["dtype"], tuple(entry["shape"])) for name, entry in entries.items()}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise DataError(f"{file}: not a safetensors file") from None
    if size != 8 + length + end:
        raise DataError(f"{file}: {size} bytes, and its head speaks of {8 + length + end}: cut off, or overwritten")
    return tensors
