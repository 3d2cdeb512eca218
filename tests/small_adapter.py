"""A model of a few numbers and adapters for it, written as transformers and PEFT write theirs."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

WIDTH, INNER = 16, 32
LAYERS = {
    "model.layers.0.self_attn.q_proj": (WIDTH, WIDTH),
    "model.layers.0.mlp.down_proj": (WIDTH, INNER),
    "model.layers.1.mlp.down_proj": (WIDTH, INNER),
}


def write_model(folder: Path, prefix: str = "") -> Path:
    """A base model's folder, its weights in two files; `prefix` stands before every name, as in multimodal folders."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text("{}")
    weights = {f"{prefix}{name}.weight": np.zeros(shape, np.float32) for name, shape in LAYERS.items()}
    weights["lm_head.weight"] = np.zeros((40, WIDTH), np.float32)
    names = sorted(weights)
    save_file({name: weights[name] for name in names[:2]}, folder / "model-00001-of-00002.safetensors")
    save_file({name: weights[name] for name in names[2:]}, folder / "model-00002-of-00002.safetensors")
    return folder


def matrices(rank: int = 4, seed: int = 0) -> dict[str, Any]:
    """The matrices of an adapter for every layer."""
    random = np.random.default_rng(seed)
    pairs = {}
    for name, (outputs, inputs) in LAYERS.items():
        pairs[f"base_model.model.{name}.lora_A.weight"] = random.random((rank, inputs), np.float32)
        pairs[f"base_model.model.{name}.lora_B.weight"] = random.random((outputs, rank), np.float32)
    return pairs


def write_adapter(folder: Path, base: str | Path, rank: int = 4, seed: int = 0, **config: Any) -> Path:
    """An adapter's folder; `config` are settings beside those that PEFT writes always."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}
    named = {"base_model_name_or_path": str(base), "bias": "none", "init_lora_weights": True, "rank_pattern": {}}
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **named, **config}))
    save_file(matrices(rank, seed), folder / "adapter_model.safetensors")
    return folder
