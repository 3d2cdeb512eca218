"""Every causal language model of transformers trains as its own eager attention computes, or `check` refuses it."""

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from pipelines.errors import RecipeError
from pipelines.models.skeleton import causal_config
from pipelines.train.attention import NAME, ONE_SAMPLE, register
from pipelines.train.attention_check import attention_problems
from tests.pipelines.train.conftest import train_recipe

pytestmark = pytest.mark.slow

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
SIZES |= {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 32}
EXPERTS |= {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "moe_topk": 2}
EXPERTS |= {"shared_expert_intermediate_size": 32, "first_k_dense_replace": 1, "num_shared_experts": 1}
EXPERTS |= {"moe_num_experts": 4, "moe_k": 2}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
STATE = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16}
STATE |= {"linear_value_head_dim": 16, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8}
STATE |= {"mamba_n_groups": 1, "state_size": 8, "num_heads": 4, "n_groups": 1}
BOTH = ["linear_attention", "full_attention"]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
PART = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
OWN: dict[str, dict[str, Any]] = {
    "qwen3_next": {"layer_types": BOTH},
    "qwen3_5_text": {"layer_types": BOTH},
    "qwen3_5_moe_text": {"layer_types": BOTH},
    "olmo_hybrid": {"layer_types": BOTH},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "intermediate_size": [64, 64],
        "activation_sparsity_pattern": [0.0, 0.0],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 64,
        "laurel_rank": 4,
    },
    "gemma4_text": {"num_kv_shared_layers": 0, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {"full_attention": ROPE, "sliding_attention": ROPE},
    },
    "plbart": {"encoder_attention_heads": 4, "decoder_attention_heads": 4},
    "whisper": {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2},
    "zamba": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "n_mamba_heads": 2},
    "zamba2": {"num_hidden_layers": 4, "layer_types": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    "phi4_multimodal": {
        "vision_config": {**PART, "num_hidden_layers": 1},
        "audio_config": {**PART, "num_blocks": 1, "ext_pw_out_channel": 32, "nemo_conv_channels": 32},
    },
}
"""What a small model of a family needs besides, or has layers of both kinds by."""
REFUSED = frozenset(
    {
        *("axk2", "bert", "bert-generation", "big_bird", "bigbird_pegasus", "bloom", "camembert", "codegen"),
        *("cpmant", "data2vec-text", "dbrx", "deepseek_v32", "doge", "dots3_note_text", "electra", "emu3"),
        *("ernie", "falcon", "git", "glm_moe_dsa", "gpt_neo", "gpt_neox_japanese", "gptj", "hy_v4"),
        *("inkling2_text", "inkling_text", "megatron-bert", "minimax_m3_vl_text", "mllama", "mpt", "musicgen"),
        *("musicgen_melody", "mvp", "openai-gpt", "reformer", "rembert", "roberta", "roberta-prelayernorm"),
        *("roc_bert", "roformer", "rwkv", "trocr", "xglm", "xlm", "xlm-roberta", "xlm-roberta-xl", "xlnet"),
        "xmod",
    }
)
"""Attention outside the interface, not causal, or with arguments and masks that are not computed."""
NEVER_SMALL = {"blt", "gemma4_assistant"}
"""Whose configuration does not say all sizes of its parts, or is refused by itself as it stands by default."""
LARGEST = 60_000_000
LENGTHS = (11, 1, 23)


def small(name: str) -> Any:
    """A small model of a family with its own eager attention; the reason where none can be made."""
    reason: Any = None
    kinds = (STATE | EXPERTS | LATENT, EXPERTS | LATENT, EXPERTS, {}, {**EXPERTS, **LATENT, "num_key_value_heads": 4})
    for extra in (*kinds, {"head_dim": None}, {"head_dim": None, "num_key_value_heads": None}):
        options = {**SIZES, **extra, **OWN.get(name, {})}
        options = {key: value for key, value in options.items() if value is not None}
        try:
            config = AutoConfig.for_model(name, **options)
            with torch.device("meta"):
                empty = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
            if sum(value.numel() for value in empty.parameters()) > LARGEST:
                reason = "too large"
                continue
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
            with torch.no_grad():
                model(input_ids=torch.arange(3, 30)[None], use_cache=False)
                for value in model.parameters():
                    value.normal_(0, 0.2) if value.ndim > 1 else value.add_(torch.randn_like(value) / 10)
            return model
        except Exception as error:  # a field of another family's
            reason = error
    return reason


def farthest(ours: Any, theirs: Any) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def refusal(folder: Path) -> str:
    """Why transformers has no causal language model for a folder; empty where it has one."""
    try:
        causal_config(folder)
    except RecipeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_a_family_has_the_logits_of_its_own_attention_or_is_refused(name: str, tmp_path: Path) -> None:
    register()
    if name in NEVER_SMALL:
        pytest.skip("no small model of it can be made")
    model = small(name)
    config = model.config if isinstance(model, torch.nn.Module) else CONFIG_MAPPING[name]()
    if (text := config.get_text_config(decoder=True)) is not config and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        pytest.skip("its text part is taken out, which is a family of its own")
    config.save_pretrained(tmp_path)
    if refusal(tmp_path):
        assert name in REFUSED
        return
    packed = train_recipe(tmp_path, packing=True, per_device_train_batch_size=2, max_length=64).train
    single = train_recipe(tmp_path, packing=False, per_device_train_batch_size=1, max_length=64).train
    assert packed and single
    refused = attention_problems(single, tmp_path)
    assert bool(refused) == (name in REFUSED), refused
    if refused:
        assert attention_problems(packed, tmp_path) and {problem.key for problem in refused} == {"train.model"}
        return
    assert isinstance(model, torch.nn.Module), f"{name} is taken, and no small one can be made: {model}"
    ids = torch.randint(3, 64, (1, sum(LENGTHS)))
    parts = ids.split(LENGTHS, dim=1)
    with torch.no_grad():
        alone = [model(input_ids=part, use_cache=False).logits for part in parts]
        shorter = model(input_ids=parts[-1][:, :12], use_cache=False).logits
        assert farthest(shorter, alone[-1][:, :12]) < 1e-5, "a token sees what follows"
        model.set_attn_implementation(ONE_SAMPLE)
        for part, expected in zip(parts, alone, strict=True):
            places = torch.arange(part.shape[1])[None]
            assert farthest(model(input_ids=part, position_ids=places, use_cache=False).logits, expected) < 1e-5
        if attention_problems(packed, tmp_path):
            return
        model.set_attn_implementation(NAME)
        bounds = torch.tensor([0, *accumulate(LENGTHS)], dtype=torch.int32)
        batch = {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 23, "max_length_k": 23}
        places = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        batch |= {"input_ids": ids, "position_ids": places, "logits_to_keep": torch.arange(sum(LENGTHS))}
        assert farthest(model(**batch, use_cache=False).logits, torch.cat(alone, dim=1)) < 1e-5
