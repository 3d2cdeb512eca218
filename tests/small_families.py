"""A small model of random weights for each family in the table of docs/train.md, in the form it is published in."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.model_families import CHATML, byte_level_tokenizer

SIZES: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the narrowest that vLLM's attention takes on a CPU
    "max_position_embeddings": 512,
    "initializer_range": 0.1,  # at 0.02 samples that see each other would hardly show
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
FEW = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1}
FIRST_DENSE = {**ROUTED, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 512, "qk_nope_head_dim": 32, "qk_rope_head_dim": 64, "v_head_dim": 32}
CHOSEN = {"topk_method": "noaux_tc", "scoring_func": "sigmoid"}
LATENT |= {"num_key_value_heads": 4, "head_dim": None}
RECURRENT: dict[str, Any] = {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
RECURRENT |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
RECURRENT |= {"layer_types": ["linear_attention", "full_attention"]}
SHARED = {**RECURRENT, **FEW, "shared_expert_intermediate_size": 64}
SLIDING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
COMPRESSED = {"q_lora_rank": 32, "o_lora_rank": 32, "o_groups": 2, "index_n_heads": 2, "index_head_dim": 32}
COMPRESSED |= {"index_topk": 16, "num_key_value_heads": 1, "sliding_window": 16}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama 3": ("llama", {}),
    "Llama 4": (
        "llama4_text",
        {**LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 128, "attention_chunk_size": 256},
    ),
    "Qwen2.5": ("qwen2", {}),
    "Qwen3": ("qwen3", {}),
    "Qwen3 MoE": ("qwen3_moe", FEW),
    "Qwen3-Next": ("qwen3_next", SHARED),
    "Qwen3.5": ("qwen3_5_text", RECURRENT),
    "Qwen3.5 MoE": ("qwen3_5_moe_text", SHARED),
    "GLM-4": ("glm4", {"partial_rotary_factor": 0.5}),
    "GLM-4.5, GLM-4.7": ("glm4_moe", FIRST_DENSE),
    "GLM-4.7-Flash": ("glm4_moe_lite", {**FIRST_DENSE, **LATENT, **CHOSEN}),
    "gpt-oss": ("gpt_oss", {**LOCAL, "sliding_window": 16}),
    "Gemma 3": ("gemma3_text", {**SLIDING, "query_pre_attn_scalar": 32}),
    "Gemma 4": ("gemma4_text", {**SLIDING, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 300}),
    "Mistral": ("mistral", {"sliding_window": 16}),
    "Ministral 3": ("ministral3", {}),
    "Phi-4": ("phi3", {"partial_rotary_factor": 1.0}),
    "InternLM3": ("internlm3", {}),
    "DeepSeek-V3": ("deepseek_v3", {**FIRST_DENSE, **LATENT, **CHOSEN}),
    "DeepSeek-V4": ("deepseek_v4", {**ROUTED, **COMPRESSED}),
    "MiniCPM": ("minicpm", {}),
    "MiniCPM3": ("minicpm3", LATENT),
    "Hunyuan": ("hunyuan_v1_dense", {}),
    "Hunyuan MoE": ("hunyuan_v1_moe", {"num_experts": 4, "moe_topk": 2}),
    "ERNIE 4.5": ("ernie4_5", {}),
    "ERNIE 4.5 MoE": ("ernie4_5_moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64}),
    "Seed-OSS": ("seed_oss", {"attention_dropout": 0.0, "residual_dropout": 0.0}),
    "OLMo 3": ("olmo3", SLIDING),
}
"""transformers' `model_type` of each, and what its config.json has besides; transformers reads nothing of CHOSEN, nor
`first_k_dense_replace` of GLM-4.7-Flash, but vLLM does."""


def write_small(folder: Path, family: str) -> Path:
    """Write a family's small model; where transformers has no class for it, a Llama of its type. Returns the folder."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    kind, own = FAMILIES[family]
    options = {name: value for name, value in (SIZES | own).items() if value is not None}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind if kind in CONFIG_MAPPING else "llama", **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_type": kind}))
    byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", CHATML).save_pretrained(folder)
    return folder
