"""Checkpoints whose own code no longer runs, as models of transformers' own classes, exactly.

InternLM2 becomes Llama, ChatGLM3 becomes Glm. Weights are renamed and cut, never computed with, so every logit stays
what it was; tokenizer and chat template come from convert_tokenizer.py.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.errors import Problem, RecipeError, StageError
from pipelines.models.convert_tokenizer import chatglm3_tokenizer, internlm2_tokenizer
from pipelines.models.save_tokenizer import save_tokenizer
from pipelines.models.weight_files import weight_files

Config = dict[str, Any]
Tensors = dict[str, Any]

VERSION = "1"
"""Part of the name of a converted folder; raise it when the conversion gives something else."""

BUFFERS = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq")
"""Stored by some checkpoints, computed by transformers' classes."""


@dataclass(frozen=True)
class Family:
    """How one architecture is mapped: configuration, one tensor's new names, tokenizer, tokens that end an answer."""

    config: Callable[[Config, Config], Any]
    weights: Callable[[Config, str, Any], Tensors]
    tokenizer: Callable[[Path], Any]
    stops: tuple[str, ...]


def family_of(folder: Path) -> Family | None:
    """The family of a model folder that has to be converted; None where transformers has a class for it."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return FAMILIES.get(config.get("model_type", ""))


def convert(folder: Path, target: Path) -> None:
    """Write `folder` to `target` with transformers' names: shard by shard, so that one shard is in memory at a time.

    RecipeError where the configuration has what transformers' class has not; StageError where weights are missing.
    """
    from safetensors.torch import save_file
    from transformers import GenerationConfig

    family = family_of(folder)
    assert family
    theirs = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    tokenizer = family.tokenizer(folder)
    ends = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids(list(family.stops)),
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = family.config(theirs, ends)
    shapes: dict[str, tuple[int, ...]] = {}
    index: dict[str, str] = {}
    for number, shard in enumerate(_shards(folder), 1):
        tensors: Tensors = {}
        for name, value in shard.items():
            if not name.endswith(BUFFERS):
                tensors |= family.weights(theirs, name, value)
        file = f"model-{number:05}.safetensors"
        save_file({name: value.clone() for name, value in tensors.items()}, target / file, metadata={"format": "pt"})
        shapes |= {name: tuple(value.shape) for name, value in tensors.items()}
        index |= dict.fromkeys(tensors, file)
    config.architectures = [_check_complete(config, shapes, folder)]
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": index}, indent=1)
    (target / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    config.save_pretrained(target)
    save_tokenizer(tokenizer, target)
    generation: Any = GenerationConfig
    generation(**ends).save_pretrained(target)


def llama_config(theirs: Config, ends: Config) -> Any:
    """InternLM2's configuration as Llama's, with the numbers of the tokens that begin and end texts."""
    from transformers import LlamaConfig

    scaling = dict(theirs.get("rope_scaling") or {})
    rope = {"rope_type": scaling.pop("type", "default"), "rope_theta": theirs.get("rope_theta", 10000.0), **scaling}
    return LlamaConfig(
        **{name: theirs[name] for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")},
        num_attention_heads=theirs["num_attention_heads"],
        num_key_value_heads=theirs.get("num_key_value_heads", theirs["num_attention_heads"]),
        max_position_embeddings=theirs["max_position_embeddings"],
        hidden_act=theirs.get("hidden_act", "silu"),
        rms_norm_eps=theirs["rms_norm_eps"],
        rope_parameters=rope,
        attention_bias=theirs.get("bias", False),
        tie_word_embeddings=theirs.get("tie_word_embeddings", False),
        dtype=theirs.get("torch_dtype"),
        **ends,
    )


_LLAMA_NAMES = {
    "model.tok_embeddings": "model.embed_tokens",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def llama_weights(theirs: Config, name: str, value: Any) -> Tensors:
    """One tensor of InternLM2 under Llama's names.

    `wqkv` is [kv_heads × (group + 2) × head_dim, hidden]: each key-value head's queries, then its key, its value.
    """
    if ".attention.wqkv." in name:
        kv_heads = theirs.get("num_key_value_heads", theirs["num_attention_heads"])
        head_dim = theirs["hidden_size"] // theirs["num_attention_heads"]
        heads = value.reshape(kv_heads, -1, head_dim, *value.shape[1:])
        before, after = name.split("attention.wqkv.")
        parts = {"q": heads[:, :-2], "k": heads[:, -2], "v": heads[:, -1]}
        return {
            f"{before}self_attn.{part}_proj.{after}": cut.reshape(-1, *value.shape[1:]) for part, cut in parts.items()
        }
    for old, new in _LLAMA_NAMES.items():
        name = name.replace(old, new)
    return {f"lm_head.{name.removeprefix('output.')}" if name.startswith("output.") else name: value}


_GLM_NAMES = {
    "transformer.encoder.layers": "model.layers",
    "transformer.encoder.final_layernorm": "model.norm",
    "transformer.embedding.word_embeddings": "model.embed_tokens",
    "transformer.output_layer": "lm_head",
    "self_attention.dense": "self_attn.o_proj",
    "mlp.dense_h_to_4h": "mlp.gate_up_proj",
    "mlp.dense_4h_to_h": "mlp.down_proj",
}
_GLM_FIXED = {
    "add_bias_linear": False,
    "apply_residual_connection_post_layernorm": False,
    "multi_query_attention": True,
    "original_rope": True,
    "post_layer_norm": True,
    "rmsnorm": True,
}
"""What ChatGLM3 has and the class Glm takes for granted."""


def glm_config(theirs: Config, ends: Config) -> Any:
    """ChatGLM3's configuration as Glm's; RecipeError where it is built in a way that Glm is not."""
    from transformers import GlmConfig

    wrong = [f"{name}: {theirs[name]}" for name, value in _GLM_FIXED.items() if theirs.get(name, value) != value]
    if wrong:
        message = f"its config.json has {', '.join(wrong)}, which no class of transformers has; use another model"
        raise RecipeError("the recipe", [Problem("train.model", message)])
    return GlmConfig(
        vocab_size=theirs["padded_vocab_size"],
        hidden_size=theirs["hidden_size"],
        intermediate_size=theirs["ffn_hidden_size"],
        num_hidden_layers=theirs["num_layers"],
        num_attention_heads=theirs["num_attention_heads"],
        num_key_value_heads=theirs["multi_query_group_num"],
        head_dim=theirs["kv_channels"],
        max_position_embeddings=theirs["seq_length"],
        rms_norm_eps=theirs["layernorm_epsilon"],
        attention_bias=theirs.get("add_qkv_bias", True),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0 * theirs.get("rope_ratio", 1),
            "partial_rotary_factor": 0.5,
        },
        tie_word_embeddings=False,
        dtype=theirs.get("torch_dtype"),
        **ends,
    )


def glm_weights(theirs: Config, name: str, value: Any) -> Tensors:
    """One tensor of ChatGLM3 under Glm's names; `query_key_value` holds all queries, then all keys, all values."""
    for old, new in _GLM_NAMES.items():
        name = name.replace(old, new)
    if "self_attention.query_key_value." not in name:
        return {name: value}
    width = theirs["kv_channels"]
    queries, keys = theirs["num_attention_heads"] * width, theirs["multi_query_group_num"] * width
    before, after = name.split("self_attention.query_key_value.")
    parts = zip("qkv", value.split([queries, keys, keys]), strict=True)
    return {f"{before}self_attn.{part}_proj.{after}": cut for part, cut in parts}


FAMILIES = {
    "internlm2": Family(llama_config, llama_weights, internlm2_tokenizer, ("</s>", "<|im_end|>")),
    "chatglm": Family(glm_config, glm_weights, chatglm3_tokenizer, ("</s>", "<|user|>", "<|observation|>")),
}
"""By `model_type` of config.json."""


def _shards(folder: Path) -> Iterator[Tensors]:
    """The weights, file by file; safetensors where there are both kinds."""
    import torch
    from safetensors.torch import load_file

    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            yield load_file(path)
        else:
            yield torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def _check_complete(config: Any, shapes: dict[str, tuple[int, ...]], folder: Path) -> str:
    """The name of the class; StageError unless the weights are those of it, neither more nor fewer, each its shape."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        raise StageError(
            f"{folder}: {len(wrong)} weights are missing, superfluous or of another shape, such as {wrong[0]}; "
            "is every weight file there, and is this the family its config.json says?"
        )
    return type(model).__name__
