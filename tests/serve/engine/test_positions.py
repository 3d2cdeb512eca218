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


def test_they_are_those_of_transformers(tmp_path: Path) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folders = []
    for name, rope in STRETCHED.items():
        torch.manual_seed(0)
        folders.append(tmp_path / name.replace(" ", "-"))
        LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).save_pretrained(folders[-1])
    assert dict(zip(STRETCHED, served_cells(tmp_path, folders), strict=True)) == dict.fromkeys(STRETCHED, "yes")
