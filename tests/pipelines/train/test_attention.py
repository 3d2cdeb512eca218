from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.train.attention import NAME, register
from pipelines.train.loss_mask import IGNORE_INDEX
from pipelines.train.samples import collate


def losses_one_by_one(model: Any, samples: list[Any]) -> Any:
    """The summed loss of each sample alone, by the model's own loss function."""
    import torch

    total = torch.tensor(0.0)
    for tokens, labels in samples:
        ids, targets = torch.tensor(tokens)[None].long(), torch.tensor(labels)[None].long()
        with torch.no_grad():
            loss = model(input_ids=ids, labels=targets).loss
        total += loss * int((targets[:, 1:] != IGNORE_INDEX).sum())
    return total


@pytest.mark.parametrize("window", [None, 4])
def test_samples_in_one_row_have_the_loss_they_have_alone(tiny_model: Path, window: int | None) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    register()
    config = AutoConfig.from_pretrained(tiny_model)
    if window:
        config.use_sliding_window, config.sliding_window, config.max_window_layers = True, window, 0
        config.layer_types = ["sliding_attention"] * config.num_hidden_layers
    draw = np.random.default_rng(0)
    samples = []
    for length in (11, 7, 1, 23):
        tokens = draw.integers(3, 300, length).astype(np.int32)
        labels = np.where(draw.random(length) < 0.5, tokens, IGNORE_INDEX).astype(np.int32)
        labels[-1:] = tokens[-1:]
        samples.append((tokens, labels))
    models = [
        AutoModelForCausalLM.from_pretrained(tiny_model, config=config, dtype=torch.float32, attn_implementation=name)
        for name in (NAME, "eager")
    ]
    batch = collate([samples])
    targets, _ = batch.pop("targets"), batch.pop("owners")
    with torch.no_grad():
        logits = models[0](**batch, use_cache=False).logits[0]
    ours = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    alone = losses_one_by_one(models[1], [sample for sample in samples if len(sample[0]) > 1])
    assert abs(float(ours - alone)) / len(targets) < 1e-5
