"""The work of a training step, by what PyTorch's own counter sees the model do."""

from pathlib import Path

import pytest

from pipelines.train.flops import flops_of
from tests.pipelines.train.conftest import train_recipe

LAYERS, TOKENS = 8, 5


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_step_takes_what_the_model_is_seen_to_do(method: str, tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=500,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=False,
        )
    )
    model.save_pretrained(tmp_path)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = torch.arange(TOKENS)[None]
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    section = train_recipe(tmp_path, method=method).train
    assert section
    flops = flops_of(section, tmp_path, "NVIDIA H100 80GB HBM3", 2)
    assert flops and flops.peak == 2 * 989e12
    # in front of the first layer nothing is trained, so that an adapter needs no gradient of what goes in there
    assert flops.share(TOKENS, TOKENS, 1) * flops.peak == pytest.approx(counter.get_total_flops(), rel=0.05)


def test_an_unknown_device_has_no_peak(tiny_model: Path) -> None:
    section = train_recipe(tiny_model).train
    assert section
    assert flops_of(section, tiny_model, "Some Other GPU", 1) is None
    h20, h200 = (flops_of(section, tiny_model, f"NVIDIA {name}", 1) for name in ("H20", "H200"))
    assert h20 and h200 and h20.peak == 148e12 and h200.peak == 989e12
