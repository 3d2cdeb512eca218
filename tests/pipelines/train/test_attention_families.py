"""Attention of families: what trains computes what the model's own eager attention computes, the rest is refused."""

import re
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import StageError
from pipelines.train.attention import NAME, per_sample_attention, register
from pipelines.train.attention_check import attention_problems
from tests.pipelines.train.conftest import train_recipe

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32}
TRAINED: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 8, "query_pre_attn_scalar": 8},
    "glm": {"partial_rotary_factor": 0.5},
    "cohere2": {"sliding_window": 8},
    "mistral": {"sliding_window": 8},
    "phi3": {"partial_rotary_factor": 1.0},
    "vaultgemma": {"sliding_window": 8, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0},
    "gpt_oss": {"sliding_window": 8, **EXPERTS},
    "qwen3_moe": EXPERTS,
}


def config_of(name: str, **options: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**SIZES, **options})


@pytest.mark.parametrize("name", TRAINED)
def test_packed_samples_have_the_logits_of_the_models_own_eager_attention_alone(name: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    register()
    config = config_of(name, **TRAINED[name])
    config.save_pretrained(tmp_path)
    section = train_recipe(tmp_path, packing=True, max_length=64).train
    assert section and not attention_problems(section, tmp_path)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for part in model.parameters():  # scores that reach caps and sinks
            part.normal_(0, 0.3)
    lengths = (11, 1, 23)
    ids = torch.randint(3, 64, (1, sum(lengths)))
    bounds = torch.tensor([0, 11, 12, 35], dtype=torch.int32)
    places = torch.cat([torch.arange(length) for length in lengths])[None]
    with torch.no_grad():
        alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(lengths, dim=1)], dim=1)
        model.set_attn_implementation(NAME)
        packed = model(
            input_ids=ids,
            position_ids=places,
            cu_seq_lens_q=bounds,
            cu_seq_lens_k=bounds,
            max_length_q=23,
            max_length_k=23,
            use_cache=False,
        ).logits
    assert float((packed - alone).abs().max() / alone.abs().max()) < 1e-5


@pytest.mark.parametrize("name", ["bloom", "xglm", "codegen", "mpt", "gptj"])
def test_models_outside_the_attention_interface_are_refused(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.for_model(name).save_pretrained(tmp_path)
    section = train_recipe(tmp_path).train
    assert section
    (problem,) = attention_problems(section, tmp_path)
    assert problem.key == "train.model" and f"{name} computes attention outside" in problem.message


@pytest.mark.parametrize(
    "name", ["mamba2", "lfm2", "bamba", "qwen3_next", "falcon_h1", "recurrent_gemma", "nemotron_h"]
)
def test_recurrent_and_convolutional_layers_train_one_sample_at_a_time(name: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    layers = {"num_hidden_layers": 2, "layer_types": ["conv", "full_attention"]} if name == "lfm2" else {}
    AutoConfig.for_model(name, **layers).save_pretrained(tmp_path)
    plain = train_recipe(tmp_path, per_device_train_batch_size=1).train
    joined = train_recipe(tmp_path, packing=True, per_device_train_batch_size=2).train
    assert plain and joined
    found = attention_problems(joined, tmp_path)
    assert [problem.key for problem in found] == ["train.packing", "train.per_device_train_batch_size"]
    assert "go from one sample to the next; give false" in found[0].message
    assert not attention_problems(plain, tmp_path)


@pytest.mark.parametrize(("name", "asked"), [("bert", "is_causal=False"), ("doge", "attention_mask")])
def test_attention_that_is_not_plainly_causal_is_refused(name: str, asked: str, tmp_path: Path) -> None:
    config_of(name).save_pretrained(tmp_path)
    section = train_recipe(tmp_path).train
    assert section
    (problem,) = attention_problems(section, tmp_path)
    assert problem.key == "train.model" and f"asks for attention with {asked}" in problem.message


@pytest.mark.parametrize("name", ["stablelm", "nemotron", "bart"])
def test_a_model_that_does_not_tell_where_samples_begin_trains_one_at_a_time(name: str, tmp_path: Path) -> None:
    config_of(name).save_pretrained(tmp_path)
    plain = train_recipe(tmp_path).train
    joined = train_recipe(tmp_path, packing=True).train
    assert plain and joined and not attention_problems(plain, tmp_path)
    (problem,) = attention_problems(joined, tmp_path)
    assert problem.key == "train.packing" and "does not tell its layers where samples begin" in problem.message


def test_places_that_follow_the_whole_row_train_one_sample_at_a_time(tmp_path: Path) -> None:
    long = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    long |= {"original_max_position_embeddings": 32}
    config_of("phi3", original_max_position_embeddings=32, rope_parameters=long).save_pretrained(tmp_path / "phi3")
    scaled = {"attn_temperature_tuning": True, "floor_scale": 64, "attention_chunk_size": 64}
    config_of("llama4_text", **scaled, **EXPERTS).save_pretrained(tmp_path / "llama4")
    for name, told in (("phi3", "other rotary frequencies .longrope. .*more than 32 tokens"), ("llama4", "whole row")):
        joined = train_recipe(tmp_path, packing=True, max_length=64).train
        single = train_recipe(tmp_path, max_length=64).train
        short = train_recipe(tmp_path, packing=True, max_length=32).train
        assert joined and single and short
        (problem,) = attention_problems(joined, tmp_path / name)
        assert problem.key == "train.packing" and re.search(told, problem.message)
        assert not attention_problems(single, tmp_path / name) and not attention_problems(short, tmp_path / name)


def test_chunks_and_arguments_that_are_not_computed_are_refused_by_name(tmp_path: Path) -> None:
    config_of("llama4_text", attention_chunk_size=32, **EXPERTS).save_pretrained(tmp_path / "llama4")
    section = train_recipe(tmp_path, max_length=64).train
    assert section
    told = attention_problems(section, tmp_path / "llama4")
    assert any(p.key == "train.max_length" and "chunks of 32 tokens" in p.message for p in told)
    from transformers import AutoConfig

    AutoConfig.for_model("deepseek_v32").save_pretrained(tmp_path / "sparse")
    (problem,) = attention_problems(section, tmp_path / "sparse")
    assert "computes attention with" in problem.message and "indices" in problem.message


@pytest.mark.parametrize("others", [{"position_bias": 1}, {"indices": 1}, {"is_causal": False}, {"use_cache": True}])
def test_no_argument_is_passed_over(others: dict[str, Any]) -> None:
    import torch

    heads = torch.randn(1, 2, 5, 8)
    bounds = torch.tensor([0, 5], dtype=torch.int32)
    module = torch.nn.Linear(1, 1)
    attend = per_sample_attention
    known: dict[str, Any] = {
        "cu_seq_lens_q": bounds,
        "max_length_q": 5,
        "position_ids": bounds,
        "past_key_values": None,
    }
    assert attend(module, heads, heads, heads, None, **known)[0].shape == (1, 5, 2, 8)
    with pytest.raises(StageError, match=f"Linear asks for attention with {next(iter(others))}"):
        attend(module, heads, heads, heads, None, **known, **others)
    with pytest.raises(StageError, match="attention_mask"):
        attend(module, heads, heads, heads, heads, **known)
