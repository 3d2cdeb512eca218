"""What vLLM answers with models that stretch their positions, against transformers."""

from pathlib import Path
from typing import Any

import pytest

from tests.pipelines.train.test_model_table import served_cells
from tests.small_families import SIZES

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

THETA = {"rope_theta": 10000.0}
YARN = {**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
STRETCHED: dict[str, dict[str, Any]] = {
    "linear": {**THETA, "rope_type": "linear", "factor": 4.0},
    "llama3": {
        **THETA,
        "rope_type": "llama3",
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "yarn": YARN,
    "yarn with attention_factor": {**YARN, "attention_factor": 1.6},
    "yarn with mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5},
    "yarn with one mscale": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
}
BEYOND = {**STRETCHED["yarn with one mscale"], "original_max_position_embeddings": 16, "llama_4_scaling_beta": 0.5}
"""Ministral 3's attention beyond the length that it was first trained on, which the prompt is."""


def test_they_are_those_of_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    models = {name: ("llama", rope) for name, rope in STRETCHED.items()} | {"beyond": ("ministral3", BEYOND)}
    for name, (kind, rope) in models.items():
        torch.manual_seed(0)
        config = AutoConfig.for_model(kind, **SIZES, rope_parameters=rope)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / name.replace(" ", "-"))
    cells = served_cells(tmp_path, [tmp_path / name.replace(" ", "-") for name in models])
    assert dict(zip(models, cells, strict=True)) == dict.fromkeys(models, "yes")
