"""Positions as transformers computes them, where vLLM reads a model's config.json in another way.

vLLM scales attention under YaRN by the factor alone; transformers goes by `attention_factor`, or `mscale` and
`mscale_all_dim`. It finds the scale of Llama 4's attention only under Mistral's own name. Its classes of latent
attention (DeepSeek-V3) read these keys themselves.
Source: transformers' `modeling_rope_utils`; Peng et al., YaRN (2023).
"""

import json
import math
from pathlib import Path
from typing import Any


def config_overrides(folder: str) -> dict[str, Any]:
    """vLLM's `hf_overrides` for a model folder; empty where vLLM reads its positions as transformers does."""
    file = Path(folder) / "config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    key = "rope_parameters" if config.get("rope_parameters") else "rope_scaling"
    rope = config.get(key) or {}
    if config.get("kv_lora_rank"):
        return {}
    by_layer = all(isinstance(part, dict) for part in rope.values())  # parameters of their own for each type of layer
    told = {kind: _scaled(part) for kind, part in rope.items()} if by_layer else _scaled(rope)
    overrides = {key: told} if told != rope else {}
    if rope.get("llama_4_scaling_beta") and "llama_4_scaling" not in config:
        overrides["llama_4_scaling"] = {
            "beta": rope["llama_4_scaling_beta"],
            "original_max_position_embeddings": rope["original_max_position_embeddings"],
        }
    return overrides


def _scaled(rope: dict[str, Any]) -> dict[str, Any]:
    """The parameters, with what vLLM multiplies its own scale by where transformers has another."""
    if rope.get("rope_type", rope.get("type")) != "yarn":
        return rope
    right, own = _attention_factor(rope), _scale(rope["factor"], 1)
    return rope if math.isclose(right, own) else {**rope, "attn_factor": right / own}


def _attention_factor(rope: dict[str, Any]) -> float:
    """What transformers multiplies sines and cosines by."""
    if (given := rope.get("attention_factor")) is not None:
        return float(given)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return _scale(rope["factor"], rope["mscale"]) / _scale(rope["factor"], rope["mscale_all_dim"])
    return _scale(rope["factor"], 1)


def _scale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1 if factor > 1 else 1.0
