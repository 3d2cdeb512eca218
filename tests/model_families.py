"""Tiny models of each family with random weights; InternLM2 and ChatGLM3 as published, with a plain model of each.

The plain models are written from the published architecture, with nothing from transformers: they say what the logits
are.
"""

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import torch
from safetensors.torch import save_file
from torch.nn.functional import embedding, rms_norm, scaled_dot_product_attention, silu

from pipelines.train.loss_mask import Encoded

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SMOLLM2 = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

THINKER = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool['function']['name'] }}{% endfor %}<|im_end|>\n"
    "{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m['role'] == 'tool' else m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n{{ m['reasoning_content'] }}\n</think>\n\n{% endif %}"
    "{{ m['content'] }}"
    "{% for call in m['tool_calls'] or [] %}<tool_call>\n"
    '{"name": "{{ call["function"]["name"] }}", "arguments": {{ call["function"]["arguments"] | tojson }}}'
    "\n</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
"""A chat format like Qwen3's, of which the last answer alone has a thought."""

TEXTS = [
    "你是谁？我是一位老师，祝姐姐生日快乐！祝你一二三。",
    "people like soprano singers  and two  spaces; a<b|c>d",
    "system user assistant red green blue What is 1 and 2? 0123456789",
]
HIDDEN, INNER, HEADS, GROUPS, WIDTH = 128, 256, 4, 2, 32
"""Sizes of InternLM2 and ChatGLM3; heads of 32 channels are the narrowest that vLLM's attention takes on a CPU."""

INTERNLM2 = {
    "model_type": "internlm2",
    "architectures": ["InternLM2ForCausalLM"],
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"},
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": GROUPS,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000,
    "rope_scaling": None,
    "bias": False,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
CHATGLM3 = {
    "model_type": "chatglm",
    "architectures": ["ChatGLMModel"],
    "auto_map": {"AutoModelForCausalLM": "modeling_chatglm.ChatGLMForConditionalGeneration"},
    "add_bias_linear": False,
    "add_qkv_bias": True,
    "apply_residual_connection_post_layernorm": False,
    "ffn_hidden_size": INNER,
    "hidden_size": HIDDEN,
    "kv_channels": WIDTH,
    "layernorm_epsilon": 1e-5,
    "multi_query_attention": True,
    "multi_query_group_num": GROUPS,
    "num_attention_heads": HEADS,
    "num_layers": 2,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
    "seq_length": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}


def byte_level_tokenizer(special: list[str], eos: str, template: str) -> Any:
    """A byte-level tokenizer of 300 tokens, the special ones first; the first of them pads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["system user assistant"] * 10, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=special[0], eos_token=eos, pad_token=special[0]
    )
    fast.chat_template = template
    return fast


def write_qwen2(folder: Path) -> Path:
    """A Qwen2 of two layers in bfloat16, as a Hugging Face folder; returns the folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", CHATML).save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the smallest model, for the tests of those packages whose conftest.py imports this."""
    return write_qwen2(tmp_path_factory.mktemp("model"))


def write_thinker(folder: Path) -> Path:
    """A Qwen3 with a template that writes a thought, perhaps an empty one, into the last answer; returns the folder."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = byte_level_tokenizer(special, "<|im_end|>", THINKER)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=1024,
        initializer_range=0.1,  # at 0.02 no hidden state could make one token likely
        eos_token_id=2,
        pad_token_id=0,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    return folder


def fit(model: Any, samples: list[Encoded], epochs: int, rate: float) -> None:
    """Train all weights on the labels of samples, four a step."""
    torch.set_num_threads(1)  # the matrices are too small to share
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    draw = random.Random(0)
    for _ in range(epochs):
        order = draw.sample(samples, len(samples))
        for start in range(0, len(order), 4):
            batch = order[start : start + 4]
            longest = max(len(sample.tokens) for sample in batch)
            ids = torch.tensor([sample.tokens + [0] * (longest - len(sample.tokens)) for sample in batch])
            labels = torch.tensor([sample.labels + [-100] * (longest - len(sample.labels)) for sample in batch])
            model(input_ids=ids, labels=labels).loss.backward()
            optimizer.step()
            optimizer.zero_grad()


def write_llama(folder: Path) -> None:
    """A Llama with the tokens and the chat format of Llama 3, its vocabulary's ends not tied."""
    special = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    byte_level_tokenizer(special, "<|eot_id|>", LLAMA3).save_pretrained(folder)
    _write_llama(folder, eos_token_id=3, tie_word_embeddings=False)


def write_smollm2(folder: Path) -> None:
    """A Llama with the chat format of SmolLM2, its vocabulary's ends tied."""
    byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", SMOLLM2).save_pretrained(folder)
    _write_llama(folder, eos_token_id=2, tie_word_embeddings=True)


def write_qwen3_5(folder: Path) -> None:
    """The text part of a Qwen3.5: a recurrent layer, and one of attention."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", CHATML).save_pretrained(folder)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}
    sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16}
    ends = {"linear_value_head_dim": 16, "pad_token_id": 0, "eos_token_id": 2}
    torch.manual_seed(0)
    layers = ["linear_attention", "full_attention"]
    Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes, **ends, layer_types=layers)).save_pretrained(folder)


def _write_llama(folder: Path, **options: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=0,
        **options,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def sentencepiece_model(path: Path, size: int, **options: Any) -> sentencepiece.SentencePieceProcessor:
    """Train a byte-pair model of SentencePiece with byte fallback, write it, and open it."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        model_type="bpe",
        vocab_size=size,
        byte_fallback=True,
        minloglevel=2,
        **{"remove_extra_whitespaces": False, "normalization_rule_name": "identity", **options},
    )
    path.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def _random(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        name: 1 + 0.1 * torch.randn(shape, generator=draw)
        if "norm" in name
        else 0.1 * torch.randn(shape, generator=draw)
        for name, shape in shapes.items()
    }


def write_internlm2(folder: Path) -> dict[str, torch.Tensor]:
    """An InternLM2 checkpoint in two `.bin` files; returns its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    unused = [f"[UNUSED_TOKEN_{number}]" for number in range(141, 147)]
    pieces = sentencepiece_model(
        folder / "tokenizer.model", 440, add_dummy_prefix=False, user_defined_symbols=unused
    ).get_piece_size()
    layers = {
        f"model.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "attention.wqkv.weight": ((HEADS + 2 * GROUPS) * WIDTH, HIDDEN),
            "attention.wo.weight": (HIDDEN, HIDDEN),
            "feed_forward.w1.weight": (INNER, HIDDEN),
            "feed_forward.w3.weight": (INNER, HIDDEN),
            "feed_forward.w2.weight": (HIDDEN, INNER),
            "attention_norm.weight": (HIDDEN,),
            "ffn_norm.weight": (HIDDEN,),
        }.items()
    }
    ends = {
        "model.tok_embeddings.weight": (pieces, HIDDEN),
        "model.norm.weight": (HIDDEN,),
        "output.weight": (pieces, HIDDEN),
    }
    weights = _random({**layers, **ends})
    (folder / "config.json").write_text(json.dumps({**INTERNLM2, "vocab_size": pieces}))
    halves = [{name: weights[name] for name in part} for part in (layers, ends)]
    for number, half in enumerate(halves, 1):
        torch.save(half, folder / f"pytorch_model-0000{number}-of-00002.bin")
    return weights


def write_chatglm3(folder: Path) -> dict[str, torch.Tensor]:
    """A ChatGLM3 checkpoint in one safetensors file; returns its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    pieces = sentencepiece_model(folder / "tokenizer.model", 440).get_piece_size()
    padded = pieces + 9 + 11
    fused = (HEADS + 2 * GROUPS) * WIDTH
    layers = {
        f"transformer.encoder.layers.{layer}.{name}": shape
        for layer in range(2)
        for name, shape in {
            "input_layernorm.weight": (HIDDEN,),
            "self_attention.query_key_value.weight": (fused, HIDDEN),
            "self_attention.query_key_value.bias": (fused,),
            "self_attention.dense.weight": (HIDDEN, HIDDEN),
            "post_attention_layernorm.weight": (HIDDEN,),
            "mlp.dense_h_to_4h.weight": (2 * INNER, HIDDEN),
            "mlp.dense_4h_to_h.weight": (HIDDEN, INNER),
        }.items()
    }
    ends: dict[str, tuple[int, ...]] = {
        "transformer.embedding.word_embeddings.weight": (padded, HIDDEN),
        "transformer.encoder.final_layernorm.weight": (HIDDEN,),
        "transformer.output_layer.weight": (padded, HIDDEN),
    }
    weights = _random({**layers, **ends})
    (folder / "config.json").write_text(json.dumps({**CHATGLM3, "padded_vocab_size": padded}))
    save_file({**weights, "transformer.rotary_pos_emb.inv_freq": torch.ones(WIDTH // 4)}, folder / "model.safetensors")
    return weights


def _attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention over [tokens, heads, width]; a key-value head serves the query heads that follow one another."""
    repeat = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(repeat, dim=1) for part in (key, value))
    heads = (part.transpose(0, 1)[None] for part in (query, key, value))
    return scaled_dot_product_attention(*heads, is_causal=True)[0].transpose(0, 1).flatten(1)


def internlm2_logits(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] of an InternLM2 with the sizes above."""
    angles = torch.outer(torch.arange(len(ids)).float(), 1000000.0 ** (-torch.arange(0, WIDTH, 2) / WIDTH))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:  # the first half of a head's channels pairs with the second
        turned = torch.complex(*x.chunk(2, dim=-1)) * turn
        return torch.cat([turned.real, turned.imag], dim=-1)

    x = embedding(ids, weights["model.tok_embeddings.weight"])
    for layer in range(2):
        w = {name.split(f"layers.{layer}.")[1]: v for name, v in weights.items() if f"layers.{layer}." in name}
        h = rms_norm(x, (HIDDEN,), w["attention_norm.weight"], 1e-5)
        grouped = (h @ w["attention.wqkv.weight"].T).view(
            len(ids), GROUPS, -1, WIDTH
        )  # per key-value head: two q, k, v
        q, k, v = grouped[:, :, :2].reshape(len(ids), HEADS, WIDTH), grouped[:, :, 2], grouped[:, :, 3]
        x = x + _attention(rotate(q), rotate(k), v) @ w["attention.wo.weight"].T
        h = rms_norm(x, (HIDDEN,), w["ffn_norm.weight"], 1e-5)
        gated = silu(h @ w["feed_forward.w1.weight"].T) * (h @ w["feed_forward.w3.weight"].T)
        x = x + gated @ w["feed_forward.w2.weight"].T
    return rms_norm(x, (HIDDEN,), weights["model.norm.weight"], 1e-5) @ weights["output.weight"].T


def chatglm3_logits(weights: dict[str, torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Logits [tokens, vocabulary] of a ChatGLM3 with the sizes above."""
    angles = torch.outer(torch.arange(len(ids)).float(), 10000.0 ** (-torch.arange(0, WIDTH // 2, 2) / (WIDTH // 2)))
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]

    def rotate(x: torch.Tensor) -> torch.Tensor:  # half of a head's channels, each pair side by side
        pairs = torch.view_as_complex(x[..., : WIDTH // 2].reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.cat([torch.view_as_real(pairs * turn).flatten(-2), x[..., WIDTH // 2 :]], dim=-1)

    x = embedding(ids, weights["transformer.embedding.word_embeddings.weight"])
    for layer in range(2):
        w = {name.split(f"layers.{layer}.")[1]: v for name, v in weights.items() if f"layers.{layer}." in name}
        h = rms_norm(x, (HIDDEN,), w["input_layernorm.weight"], 1e-5)
        mixed = h @ w["self_attention.query_key_value.weight"].T + w["self_attention.query_key_value.bias"]
        q, k, v = (
            part.view(len(ids), -1, WIDTH) for part in mixed.split([HIDDEN, GROUPS * WIDTH, GROUPS * WIDTH], dim=-1)
        )
        x = x + _attention(rotate(q), rotate(k), v) @ w["self_attention.dense.weight"].T
        h = rms_norm(x, (HIDDEN,), w["post_attention_layernorm.weight"], 1e-5)
        gate, up = (h @ w["mlp.dense_h_to_4h.weight"].T).chunk(2, dim=-1)
        x = x + (silu(gate) * up) @ w["mlp.dense_4h_to_h.weight"].T
    last = rms_norm(x, (HIDDEN,), weights["transformer.encoder.final_layernorm.weight"], 1e-5)
    return last @ weights["transformer.output_layer.weight"].T


EXPERT_FAMILIES = (
    *("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "glm4_moe", "deepseek_v2", "deepseek_v3"),
    *("granitemoe", "phimoe", "jetmoe", "hunyuan_v1_moe", "gpt_oss"),
)
"""Mixtures of experts, each with routers and experts of its own kind; the last five join and name them otherwise."""


def write_experts(folder: Path, kind: str) -> Path:
    """A mixture of four experts a layer, in the form it is published in; returns the folder."""
    import transformers as t

    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    few = {"num_experts": 4, "num_experts_per_tok": 2}
    local = {"num_local_experts": 4, "num_experts_per_tok": 2}
    shared = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_shared_experts": 1}
    shared |= {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
    latent = {"kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    options: dict[str, tuple[Any, dict[str, Any]]] = {
        "qwen3_moe": (t.Qwen3MoeConfig, {**few, "moe_intermediate_size": 32, "head_dim": 16}),
        "qwen2_moe": (
            t.Qwen2MoeConfig,
            {**few, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32},
        ),
        "mixtral": (t.MixtralConfig, local),
        "olmoe": (t.OlmoeConfig, few),
        "glm4_moe": (t.Glm4MoeConfig, {**shared, "head_dim": 16}),
        "deepseek_v2": (t.DeepseekV2Config, {**shared, **latent, "topk_method": "greedy"}),
        "deepseek_v3": (t.DeepseekV3Config, {**shared, **latent, "num_key_value_heads": 4}),
        "granitemoe": (t.GraniteMoeConfig, local),
        "phimoe": (t.PhimoeConfig, local),
        "jetmoe": (t.JetMoeConfig, {**local, "kv_channels": 16}),
        "gpt_oss": (t.GptOssConfig, {**local, "head_dim": 16, "sliding_window": 8}),
        "hunyuan_v1_moe": (t.HunYuanMoEV1Config, {"num_experts": 4, "moe_topk": 2, "head_dim": 16}),
    }
    torch.manual_seed(0)
    config, own = options[kind]
    t.AutoModelForCausalLM.from_config(config(**{**sizes, **own})).save_pretrained(folder)
    byte_level_tokenizer(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", CHATML).save_pretrained(folder)
    return folder
