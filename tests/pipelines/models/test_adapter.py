"""Adapters that vLLM could not serve are told from those that it can, before they are published."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipelines.errors import DataError
from pipelines.models.adapter import check_adapter, tensors_of
from tests.small_adapter import matrices, write_adapter, write_model

FIRST = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_model(tmp_path / "base")


def with_matrices(tmp_path: Path, base: Path, changed: dict[str, Any], rank: int = 4) -> Path:
    """An adapter some of whose matrices are others; None takes one out."""
    folder = write_adapter(tmp_path / "adapter", base, rank)
    all_of_them = {**matrices(rank), **changed}
    save_file({name: m for name, m in all_of_them.items() if m is not None}, folder / "adapter_model.safetensors")
    return folder


@pytest.mark.parametrize("prefix", ["", "model.language_model.", "language_model."])
def test_what_was_trained_on_the_model_passes_wherever_and_by_whatever_name(tmp_path: Path, prefix: str) -> None:
    base = write_model(tmp_path / "base", prefix)
    config = {"use_rslora": True, "lora_dropout": 0.1, "peft_version": "0.21.2", "init_lora_weights": "gaussian"}
    check_adapter(write_adapter(tmp_path / "adapter", "HuggingFaceTB/SmolLM2-135M", **config), base)


def test_what_peft_writes_passes(tiny_model: Path, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    config: Any = LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model), config).save_pretrained(str(tmp_path))
    check_adapter(tmp_path, tiny_model)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"use_dora": True}, "use_dora: vLLM loads no DoRA adapters"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern is"),
        ({"alpha_pattern": {"q_proj": 99}}, "alpha_pattern is"),
        ({"lora_bias": True}, "lora_bias is true"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is true"),
        ({"layer_replication": [[0, 2]]}, "layer_replication is"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices is"),
        ({"alora_invocation_tokens": [1, 2]}, "alora_invocation_tokens is"),
        ({"use_something_new": {"x": 1}}, "use_something_new is"),
        ({"init_lora_weights": "pissa_niter_4"}, "its base model was changed before training"),
        ({"r": 8}, "matrices of rank 4 and 4, and r is 8"),
        ({"r": "4"}, "r is '4', not a whole number"),
        ({"r": 0}, "r is 0, not a whole number"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"r": 128}, "r is 128, and the engine has room for 64"),
    ],
)
def test_settings_that_vllm_refuses_or_passes_over_are_refused(
    tmp_path: Path, base: Path, config: dict[str, Any], reason: str
) -> None:
    with pytest.raises(DataError, match=f"adapter: cannot be served: .*{reason}"):
        check_adapter(write_adapter(tmp_path / "adapter", base, **config), base, max_lora_rank=64)


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        (
            {f"{FIRST}.lora_A.weight": np.zeros((4, 8), np.float32)},
            "a layer of 16×8, the base model's is 16×16",
        ),
        (
            {f"{FIRST}.lora_B.weight": np.zeros((8, 4), np.float32)},
            "a layer of 8×16, the base model's is 16×16",
        ),
        ({f"{FIRST}.lora_A.weight": np.zeros((2, 16), np.float32)}, "matrices of rank 2 and 4, and r is 4"),
        ({f"{FIRST}.lora_B.weight": None}, "lora_A without its other half"),
        ({f"{FIRST}.lora_A.weight": np.zeros((4, 16), np.int8)}, "not a matrix of numbers"),
        ({f"{FIRST}.lora_A.weight": np.zeros((64,), np.float32)}, "not a matrix of numbers"),
        ({f"{FIRST}.lora_magnitude_vector": np.zeros((16,), np.float32)}, "not a matrix of a linear layer's adapter"),
        ({"base_model.model.lm_head.weight": np.zeros((40, 16), np.float32)}, "not a matrix of a linear layer"),
    ],
)
def test_matrices_that_do_not_fit_are_refused(tmp_path: Path, base: Path, changed: dict[str, Any], reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        check_adapter(with_matrices(tmp_path, base, changed), base)


@pytest.mark.parametrize("layer", ["model.layers.2.mlp.down_proj", "transformer.h.0.attn.c_attn"])
def test_a_layer_that_the_model_does_not_have_is_refused(tmp_path: Path, base: Path, layer: str) -> None:
    pair = {"lora_A": np.zeros((4, 32), np.float32), "lora_B": np.zeros((16, 4), np.float32)}
    changed = {f"base_model.model.{layer}.{side}.weight": matrix for side, matrix in pair.items()}
    with pytest.raises(DataError, match="the base model has no such layer"):
        check_adapter(with_matrices(tmp_path, base, changed), base)


def test_layers_of_a_quantised_model_are_not_compared_by_shape(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base")
    packed = {f"{name}.qweight": np.zeros((2, 16), np.int32) for name in ("model.layers.0.self_attn.q_proj",)}
    packed |= {f"model.layers.{n}.mlp.down_proj.weight": np.zeros((256, 1), np.uint8) for n in (0, 1)}
    for file in base.glob("*.safetensors"):
        file.unlink()
    save_file(packed, base / "model.safetensors")
    check_adapter(write_adapter(tmp_path / "adapter", base), base)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:20],
        lambda content: b"",
        lambda content: b"weights",
        lambda content: struct.pack("<Q", 1 << 60) + content[8:],
        lambda content: struct.pack("<Q", 2) + b"[]",
        lambda content: struct.pack("<Q", 9) + b'{"a": 1} ',
    ],
)
def test_a_file_that_is_cut_off_or_something_else_is_refused(tmp_path: Path, base: Path, damage: Any) -> None:
    folder = write_adapter(tmp_path / "adapter", base)
    file = folder / "adapter_model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(DataError, match=r"adapter_model\.safetensors: "):
        check_adapter(folder, base)


@pytest.mark.parametrize("content", ["[]", "{", '"LORA"'])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, base: Path, content: str) -> None:
    folder = write_adapter(tmp_path / "adapter", base)
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(DataError, match=r"adapter_config\.json: not (JSON|a JSON object)"):
        check_adapter(folder, base)


def test_a_folder_that_is_no_model_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(DataError, match=r"no base model at .*elsewhere: no config\.json there"):
        check_adapter(write_adapter(tmp_path / "adapter", base), tmp_path / "elsewhere")


def test_an_empty_adapter_is_refused(tmp_path: Path, base: Path) -> None:
    folder = write_adapter(tmp_path / "adapter", base)
    save_file({}, folder / "adapter_model.safetensors")
    with pytest.raises(DataError, match="holds no tensors"):
        check_adapter(folder, base)


def test_heads_are_read_as_safetensors_writes_them(tmp_path: Path) -> None:
    file = tmp_path / "one.safetensors"
    save_file({"a": np.zeros((2, 3), np.float16)}, file, {"format": "pt"})
    assert {name: (t.dtype, t.shape) for name, t in tensors_of(file).items()} == {"a": ("F16", (2, 3))}
