"""Weights that would not arrive are refused by name before anything starts; what can be taken back is, exactly."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.errors import RecipeError
from pipelines.models.resolve import check_folder, max_positions
from pipelines.models.skeleton import check_weights, rewriting_of, write_plain
from pipelines.models.weight_files import weight_shapes
from tests import model_families as families

Weights = dict[str, torch.Tensor]
MLP = "model.layers.1.mlp.up_proj.weight"
TEXT = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model, to be broken."""
    return Path(shutil.copytree(tiny_model, tmp_path / "broken"))


def rewrite(folder: Path, change: Callable[[Weights], Weights], **config: Any) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"})
    said = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**said, **config}))


def without(*names: str) -> Callable[[Weights], Weights]:
    return lambda weights: {n: w for n, w in weights.items() if not any(name in n for name in names)}


def as_fp8(weights: Weights) -> Weights:
    """Projections as FP8 codes with a scale for each block of 128 by 128."""
    made: Weights = {}
    for name, value in weights.items():
        if not name.endswith("proj.weight"):
            made[name] = value
            continue
        scale = value.float().abs().max() / 448
        made[name] = (value.float() / scale).to(torch.float8_e4m3fn)
        blocks = [-(-size // 128) for size in value.shape]
        made[f"{name}_scale_inv"] = torch.full(blocks, float(scale))
    return made


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def test_a_whole_model_is_taken(folder: Path) -> None:
    skeleton = check_weights(folder)
    assert skeleton and type(skeleton.model).__name__ == "Qwen2ForCausalLM"
    assert {value.device.type for value in skeleton.model.parameters()} == {"meta"}
    shutil.copyfile(folder / "model.safetensors", folder / "consolidated.safetensors")  # a copy, as Mistral ships
    assert set(weight_shapes(folder)) == {name for name in load_file(folder / "model.safetensors")}


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (without("layers.1.mlp"), r"3 weights are not in its files and would be random: model.layers.1.mlp.down_proj"),
        (without("embed_tokens"), r"1 weights are not in its files .*embed_tokens.*fetch the model again"),
        (without("k_proj.bias"), r"2 weights are not in its files .*k_proj.bias"),
        (
            lambda w: {**w, "model.layers.0.extra.weight": w[MLP].clone()},
            r"1 weights in its files are not of its class",
        ),
        (lambda w: {**w, MLP: w[MLP][:60].clone()}, rf"1 weights have another shape than config.json says: {MLP}"),
        (as_fp8, r"14 weights are F8_E4M3 codes, such as .*quantization_config"),
        (lambda w: {**w, MLP: w[MLP].to(torch.int8)}, r"1 weights are I8 codes, such as model.layers.1.mlp.up_proj"),
        (
            lambda w: {n: v.to(torch.int64) if n.endswith("k_proj.bias") else v for n, v in w.items()},
            r"2 weights are I64, such as model.layers.0.self_attn.k_proj.bias, which are no numbers to train with",
        ),
    ],
)
def test_weights_that_would_not_arrive_are_named(folder: Path, change: Callable[[Weights], Weights], told: str) -> None:
    rewrite(folder, change)
    with pytest.raises(RecipeError, match=told) as refused:
        check_weights(folder)
    assert all(problem.on_every_machine for problem in refused.value.problems)


@pytest.mark.parametrize(
    "method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao", "hqq", "fbgemm_fp8"]
)
def test_a_foreign_quantization_is_refused_with_a_way_out(folder: Path, method: str) -> None:
    rewrite(folder, lambda weights: weights, quantization_config={"quant_method": method, "bits": 4})
    with pytest.raises(RecipeError, match=rf"quantized \({method}\).*give the unquantized model instead; train.method"):
        check_weights(folder)


@pytest.mark.parametrize("name", ["quantize_config.json", "hf_quant_config.json"])
def test_a_quantization_that_stands_in_a_file_of_its_own_is_refused_too(folder: Path, name: str) -> None:
    (folder / name).write_text('{"bits": 4}')
    with pytest.raises(RecipeError, match=f"quantized .see {name}."):
        check_weights(folder)


def test_fp8_codes_are_taken_back_with_their_scales(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    rewrite(folder, as_fp8, quantization_config=FP8)
    assert str(rewriting_of(folder)) == "dequantizing"
    assert check_weights(folder)
    (tmp_path / "plain").mkdir()
    write_plain(folder, tmp_path / "plain")
    assert rewriting_of(tmp_path / "plain") is None
    plain, whole = load_file(tmp_path / "plain" / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert plain.keys() == whole.keys()
    for name, value in whole.items():  # E4M3 has three bits after the point
        assert torch.allclose(plain[name].float(), value.float(), rtol=2**-4, atol=1e-3), name
    rewrite(folder, without(f"{MLP}_scale_inv"))
    with pytest.raises(RecipeError, match=rf"1 quantized weights lack a part, such as {MLP}_scale_inv"):
        check_weights(folder)


@pytest.mark.parametrize("written", ["one scale", "activations", "other name", "bin"])
def test_fp8_codes_are_taken_back_however_they_are_written(
    folder: Path, tiny_model: Path, tmp_path: Path, written: str
) -> None:
    said = dict(FP8)
    codes = as_fp8(load_file(folder / "model.safetensors"))
    if written in ("one scale", "activations"):  # for a whole matrix
        codes = {n: w.reshape(()) if n.endswith("_scale_inv") else w for n, w in codes.items()}
        said["weight_block_size"] = None
    if written == "activations":
        scales = [n.replace("weight_scale_inv", "activation_scale") for n in codes if n.endswith("_scale_inv")]
        codes |= {name: torch.tensor(1.0) for name in scales}
        said["activation_scheme"] = "static"
    if written == "other name":
        codes = {n.replace(".weight_scale_inv", ".scale"): w for n, w in codes.items()}
    rewrite(folder, lambda _: codes, quantization_config=said)
    if written == "bin":
        (folder / "model.safetensors").unlink()
        torch.save(codes, folder / "pytorch_model.bin")
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0], "top_p": 0.8}')
    check_weights(folder)
    (tmp_path / "plain").mkdir()
    write_plain(folder, tmp_path / "plain")
    plain, whole = load_file(tmp_path / "plain" / "model.safetensors"), load_file(tiny_model / "model.safetensors")
    assert plain.keys() == whole.keys()
    assert all(torch.allclose(plain[n].float(), w.float(), rtol=2**-4, atol=1e-3) for n, w in whole.items())
    assert json.loads((tmp_path / "plain" / "generation_config.json").read_text())["top_p"] == 0.8


def test_fp8_experts_are_taken_back_under_the_names_they_are_published_with(tmp_path: Path) -> None:
    published = families.write_experts(tmp_path / "published", "qwen3_moe")
    whole = load_file(published / "model.safetensors")
    rewrite(published, as_fp8, quantization_config=FP8)
    assert any(".experts.3." in name for name in weight_shapes(published))
    check_weights(published)
    (tmp_path / "plain").mkdir()
    write_plain(published, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == whole.keys()
    assert all(torch.allclose(plain[n].float(), w.float(), rtol=2**-4, atol=2e-3) for n, w in whole.items())


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
"""The numbers that a code of four bits stands for (OCP Microscaling Formats 1.0, E2M1)."""


def as_mxfp4(weights: Weights) -> tuple[Weights, Weights]:
    """Experts as pairs of codes with a power of two for each 32, and what they stand for."""
    made, meant = dict(weights), {}
    for name in [name for name in weights if name.endswith(("gate_up_proj", "down_proj"))]:
        value = made.pop(name).float().transpose(1, 2)
        groups = value.reshape(*value.shape[:2], -1, 32)
        power = torch.floor(torch.log2(groups.abs().amax(dim=-1))) - 2
        codes = (groups[..., None] / 2 ** power[..., None, None] - FP4).abs().argmin(dim=-1)
        made[f"{name}_blocks"] = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
        made[f"{name}_scales"] = (power + 127).to(torch.uint8)
        meant[name] = (FP4[codes] * 2 ** power[..., None]).reshape(value.shape).transpose(1, 2)
    return made, meant


def test_mxfp4_codes_are_taken_back_exactly(tmp_path: Path) -> None:
    published = families.write_experts(tmp_path / "published", "gpt_oss")
    whole = load_file(published / "model.safetensors")
    codes, meant = as_mxfp4(whole)
    assert len(meant) == 4
    rewrite(published, lambda _: codes, dtype="bfloat16", quantization_config={"quant_method": "mxfp4"})
    check_weights(published)
    (tmp_path / "plain").mkdir()
    write_plain(published, tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    assert plain.keys() == whole.keys() and rewriting_of(tmp_path / "plain") is None
    for name, value in plain.items():
        assert torch.equal(value, meant.get(name, whole[name]).to(torch.bfloat16)), name
    for part in ("layers.1.mlp.experts.down_proj_blocks", "layers.1.mlp.experts.down_proj_scales"):
        rewrite(published, lambda _, part=part: without(part)(codes))
        with pytest.raises(RecipeError, match=f"1 quantized weights lack a part, such as model.{part}"):
            check_weights(published)
    said = json.loads((published / "config.json").read_text())
    (published / "config.json").write_text(json.dumps({**said, "quantization_config": None}))
    rewrite(published, lambda _: codes)
    with pytest.raises(RecipeError, match=r"8 weights are U8 codes, such as .*quantization_config"):
        check_weights(published)


def test_weights_in_files_of_pytorch_are_looked_at_too(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    file = folder / "pytorch_model.bin"
    torch.save(weights, file)
    check_weights(folder)
    torch.save(weights, file, _use_new_zipfile_serialization=False)
    assert weight_shapes(folder) == {name: list(value.shape) for name, value in weights.items()}
    torch.save(without("layers.1.mlp")(weights), file)
    with pytest.raises(RecipeError, match="3 weights are not in its files and would be random"):
        check_weights(folder)
    for wrong in ({"state_dict": weights}, {MLP: print}):
        torch.save(wrong, file)
        with pytest.raises(RecipeError, match=r"pytorch_model.bin is no file of weights alone"):
            check_weights(folder)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(RecipeError, match=r"pytorch_model.bin is no file of weights alone .*fetch it again"):
        check_weights(folder)


def test_two_matrices_that_the_configuration_says_are_one_are_refused(folder: Path) -> None:
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(folder, lambda w: {**w, "lm_head.weight": embedding.clone()}, tie_word_embeddings=True)
    check_weights(folder)
    rewrite(folder, lambda w: {**w, "lm_head.weight": embedding + 1})
    with pytest.raises(RecipeError, match=r"a lm_head.weight that is not model.embed_tokens.weight.*: false there"):
        check_weights(folder)
    rewrite(folder, lambda w: w, tie_word_embeddings=False)
    check_weights(folder)


def test_an_adapter_is_no_model(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"holds an adapter.*merge it, or give the base model"):
        check_folder(folder)


def test_files_that_are_cut_off_or_lacking_are_named(folder: Path) -> None:
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1000])
    with pytest.raises(RecipeError, match=r"model.safetensors ends after \d+ of \d+ bytes; fetch it again"):
        check_weights(folder)
    weights.write_bytes(whole + b"0" * 10)  # which safetensors refuses when training begins
    with pytest.raises(RecipeError, match=r"model.safetensors has \d+ bytes, and its header speaks of \d+"):
        check_weights(folder)
    for header in (b"[]", b'{"a": {"dtype": "F32"}}', b'{"a": 1}'):
        weights.write_bytes(len(header).to_bytes(8, "little") + header)
        with pytest.raises(RecipeError, match="is no safetensors file; fetch it again"):
            check_weights(folder)
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4000\n")
    with pytest.raises(RecipeError, match="is no safetensors file; fetch it again, with Git LFS if by git"):
        check_weights(folder)
    weights.rename(folder / "model-00001-of-00002.safetensors")
    with pytest.raises(RecipeError, match=r"neither model.safetensors nor model.safetensors.index.json"):
        check_weights(folder)
    for wrong in ("{}", "[", '{"weight_map": {"a": "../model.safetensors"}}'):
        (folder / "model.safetensors.index.json").write_text(wrong)
        with pytest.raises(RecipeError, match=r"index.json is no index of weight files; fetch it again"):
            check_weights(folder)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(RecipeError, match=r"lacks model-00002-of-00002.safetensors, which model.*index.json names"):
        check_weights(folder)
    (folder / "config.json").write_text('{"model_type": ')
    with pytest.raises(RecipeError, match=r"config.json is no JSON"):
        check_folder(folder)


def test_a_weight_that_stands_in_two_files_is_refused(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    shards = {"model-1.safetensors": weights, "model-2.safetensors": {MLP: weights[MLP] + 1}}
    for name, part in shards.items():
        save_file(part, folder / name, metadata={"format": "pt"})
    placed = {**dict.fromkeys(weights, "model-1.safetensors"), MLP: "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": placed}))
    with pytest.raises(RecipeError, match=rf"model-1.safetensors and model-2.safetensors both hold {MLP}"):
        check_weights(folder)


@pytest.mark.parametrize("kind", ["no_such_model", "t5", "clip"])
def test_what_is_no_causal_language_model_is_refused_by_its_type(folder: Path, kind: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": kind}))
    with pytest.raises(RecipeError, match=rf"model_type {kind}.*use .*model"):
        check_weights(folder)


def vision_models() -> dict[str, Callable[[], Any]]:
    """Models of text and pictures with random weights, by their type."""
    import transformers as t

    linear = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 16}
    linear |= {"linear_value_head_dim": 16}
    hybrid = {**TEXT, **linear, "head_dim": 16, "layer_types": ["linear_attention", "full_attention"]}
    tower = {"depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64}
    ends = {"image_token_id": 299, "video_token_id": 298, "vision_start_token_id": 297, "vision_end_token_id": 296}
    marks = {"image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297, "mm_tokens_per_image": 4}
    gemma: Any = t.Gemma3Config
    llava: Any = t.LlavaConfig
    qwen: Any = t.Qwen3_5Config
    mistral: Any = t.Mistral3Config
    pixtral = {**VISION, "model_type": "pixtral", "head_dim": 16}
    return {
        "gemma3": lambda: t.Gemma3ForConditionalGeneration(
            gemma(text_config={**TEXT, "head_dim": 16}, vision_config=VISION, **marks)
        ),
        "llava": lambda: t.LlavaForConditionalGeneration(
            llava(text_config=t.Qwen2Config(**TEXT), vision_config=t.CLIPVisionConfig(**VISION), image_token_index=299)
        ),
        "mistral3": lambda: t.Mistral3ForConditionalGeneration(
            mistral(text_config=t.MistralConfig(**TEXT, head_dim=16), vision_config=pixtral, image_token_index=299)
        ),
        "qwen3_5": lambda: t.Qwen3_5ForConditionalGeneration(
            qwen(text_config=hybrid, vision_config={**tower, "num_position_embeddings": 16}, **ends)
        ),
    }


@pytest.mark.parametrize("kind", ["gemma3", "llava", "mistral3", "qwen3_5"])
def test_the_text_part_of_a_model_of_pictures_is_taken_exactly(kind: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    whole = vision_models()[kind]().eval()
    published, plain = tmp_path / "published", tmp_path / "plain"
    whole.save_pretrained(published)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    families.byte_level_tokenizer(special, "<|im_end|>", families.CHATML).save_pretrained(published)
    assert check_weights(published)
    assert max_positions(published) == 256
    plain.mkdir()
    write_plain(published, plain)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        expected = whole(input_ids=ids).logits
        text = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32)(input_ids=ids).logits
    assert float((text - expected).abs().max()) < 1e-5
    cut = {name: w for name, w in load_file(published / "model.safetensors").items() if "layers.1.mlp" not in name}
    save_file(cut, published / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RecipeError, match=r"3 weights are not in its files .*layers.1.mlp"):
        check_weights(published)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vocab_size": "many"}, r"cannot read its config.json \(model_type qwen2; .*'vocab_size'"),
        ({"model_type": ["qwen2"]}, r"cannot read its config.json"),
        ({"hidden_act": "none such"}, r"cannot make the model that its config.json and weights say .*none such"),
        ({"quantization_config": []}, r"quantized \(unknown method\)"),
        ({"quantization_config": "fp8"}, r"quantized \(unknown method\)"),
        ({"text_config": "x"}, r"no causal language model"),
        ({"num_attention_heads": 8}, r"weights have another shape than config.json says"),
        ({"model_type": "llama"}, r"6 weights in its files are not of its class and would be left out: .*bias"),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(folder: Path, change: dict[str, Any], told: str) -> None:
    rewrite(folder, lambda weights: weights, **change)
    with pytest.raises(RecipeError, match=told):
        check_weights(folder)
