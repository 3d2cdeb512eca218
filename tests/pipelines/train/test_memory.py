"""The estimate against other counts: DeepSpeed's own, autograd's, and the numbers that people publish."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.stage import Output
from pipelines.errors import HardwareError, StageError
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import Train
from pipelines.train import memory
from pipelines.train.journal import read_journal
from pipelines.train.memory import (
    GIB,
    Shapes,
    chosen_stage,
    describe,
    describe_merge,
    estimate,
    free_memory,
    merge_bytes,
    shapes_of,
)
from pipelines.train.run import Run
from pipelines.train.tokenize import Tokenized
from tests import model_families as families
from tests.pipelines.train.conftest import train, train_recipe
from tests.pipelines.train.laboratory import Laboratory

# Qwen2-7B, from its configuration: 28 layers of width 3584, 28 heads of 128, 4 of them for keys and values
LAYER = {
    "self_attn.q_proj": (3584, 3584),
    "self_attn.k_proj": (512, 3584),
    "self_attn.v_proj": (512, 3584),
    "self_attn.o_proj": (3584, 3584),
    "mlp.gate_proj": (18944, 3584),
    "mlp.up_proj": (18944, 3584),
    "mlp.down_proj": (3584, 18944),
}
QWEN2_7B = Shapes(
    parameters=7_615_616_512,
    matrices={f"model.layers.{i}.{name}.weight": shape for i in range(28) for name, shape in LAYER.items()}
    | {"model.embed_tokens.weight": (152064, 3584), "lm_head.weight": (152064, 3584)},
    hidden=3584,
    intermediate=18944,
    layers=28,
    query=3584,
    key_value=512,
    vocabulary=152064,
)


def section(**changes: Any) -> Train:
    return Train.model_validate(
        {"model": "x", "resources_per_worker": {"GPU": 1}, "num_workers": 4, "global_batch_size": 16, **changes}
    )


@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_model_states_are_those_that_deepspeed_estimates(ranks: int) -> None:
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs

    full = section(method="full", num_workers=ranks)
    two, three = (estimate(full, QWEN2_7B, stage) for stage in (2, 3))
    count = QWEN2_7B.parameters
    _, theirs = estimate_zero2_model_states_mem_needs(count, ranks, cpu_offload=False)
    assert two.weights + two.gradients + two.optimizer == pytest.approx(theirs, rel=1e-6)
    _, theirs, _ = estimate_zero3_model_states_mem_needs(count, 0, ranks, cpu_offload=False, cpu_offload_params=False)
    assert three.weights + three.gradients + three.optimizer == pytest.approx(theirs, rel=1e-6)


def test_lora_trains_as_many_parameters_as_peft_says(tiny_model: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    shapes = shapes_of(tiny_model)
    assert shapes
    for dora, targets in ((False, "all-linear"), (True, "all-linear"), (False, ["q_proj", "mlp.up_proj"])):
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
        assert shapes.parameters == sum(p.numel() for p in model.parameters())
        config = LoraConfig(r=4, use_dora=dora, target_modules=targets, task_type="CAUSAL_LM")
        trained, _ = get_peft_model(model, config).get_nb_trainable_parameters()
        lora = section(dtype="float32", num_workers=1, lora={"r": 4, "use_dora": dora, "target_modules": targets})
        assert estimate(lora, shapes, 0).gradients == 4 * trained


def saved_by_autograd(model: Any, length: int) -> int:
    """Bytes that autograd keeps from a forward pass for the backward pass, without the weights, each storage once."""
    import torch

    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    ids = torch.from_numpy(np.arange(length) % 250)[None]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logits = model(input_ids=ids, use_cache=False).logits[0]
        loss = torch.nn.functional.cross_entropy(logits.float(), ids[0])
    assert loss.requires_grad
    return sum(kept.values())


@pytest.mark.parametrize(
    ("dtype", "method", "dropout"),
    [("float32", "full", 0.0), ("float32", "lora", 0.0), ("float32", "lora", 0.1), ("bfloat16", "lora", 0.0)],
)
def test_activations_are_about_what_autograd_keeps(dtype: str, method: str, dropout: float) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model: Any = Qwen2ForCausalLM(config)
    if method == "lora":
        lora = LoraConfig(target_modules="all-linear", lora_dropout=dropout, task_type="CAUSAL_LM")
        model = get_peft_model(model, lora)
    model = model.to(getattr(torch, dtype))  # adapters too, as DeepSpeed does
    shapes = Shapes(model.num_parameters(), {}, 256, 1024, 4, 256, 64, 1000)
    length = 200
    wanted = section(dtype=dtype, method=method, max_length=length, lora={"lora_dropout": dropout})
    told, seen = estimate(wanted, shapes, 0).activations, saved_by_autograd(model.train(), length)
    assert 0.9 < told / seen < 1.4, (told, seen)


def test_what_is_known_of_seven_billion_comes_out() -> None:
    """Full fine-tuning takes 16 to 20 bytes a parameter; LoRA of 7B fits 24 GB in 16 bits, and QLoRA 12 GB."""
    full = estimate(section(method="full", num_workers=1), QWEN2_7B, 0)
    assert 16 < (full.weights + full.gradients + full.optimizer) / QWEN2_7B.parameters <= 20
    small: dict[str, Any] = {"num_workers": 1, "max_length": 512, "gradient_checkpointing": True}
    assert 15 < estimate(section(**small), QWEN2_7B, 0).total / GIB < 22
    quantized = Train.model_construct(**{**section(**small).model_dump(), "method": "qlora"})
    quantized = quantized.model_copy(update={"lora": section().lora})
    assert 5 < estimate(quantized, QWEN2_7B, 0).total / GIB < 11


def test_auto_takes_the_lowest_stage_that_fits_or_says_what_to_lower() -> None:
    auto = section(method="full", zero_stage="auto", max_length=128, dtype="float32")
    needs = [estimate(auto, QWEN2_7B, stage).total for stage in range(4)]
    assert needs == sorted(needs, reverse=True)
    for stage, need in enumerate(needs):
        assert chosen_stage(auto, QWEN2_7B, int(need / 0.9) + 1) == stage
    with pytest.raises(HardwareError, match=r"no stage of ZeRO fits: ZeRO-3 needs .* GiB a worker.*gradient_checkp"):
        chosen_stage(auto, QWEN2_7B, int(needs[3] / 0.9) - GIB)
    assert chosen_stage(section(zero_stage="auto"), QWEN2_7B, 1 << 50) == 1  # in 16 bits
    assert chosen_stage(section(zero_stage=1), QWEN2_7B, 0) == 1


def test_an_optimizer_kept_apart_takes_no_room_on_the_gpu() -> None:
    full: dict[str, Any] = {"method": "full", "zero_stage": "auto"}
    apart = section(**full, offload_optimizer=True)
    assert estimate(apart, QWEN2_7B, 2).optimizer == 0 < estimate(section(**full), QWEN2_7B, 2).optimizer
    assert chosen_stage(apart, QWEN2_7B, 1 << 50) == 1
    with pytest.raises(ValidationError, match="needs zero_stage 1, 2 or 3"):
        section(offload_optimizer=True, zero_stage=0)


def test_check_compares_with_what_is_free(tiny_model: Path) -> None:
    text = describe(section(model=str(tiny_model), resources_per_worker={"CPU": 1}, zero_stage="auto"))
    assert text.startswith("memory: ZeRO-0 needs 0.") and text.endswith("GiB a worker: fits")
    many = describe(
        section(model=str(tiny_model), resources_per_worker={"CPU": 1}, num_workers=2000, global_batch_size=2000)
    )
    assert "does not fit; " in many and "lower train.num_workers" in many
    assert "estimated once hf://some/model" in describe(section(model="hf://some/model"))
    free = free_memory(2, gpu=False)
    assert free and GIB // 8 < free < 1 << 45


def test_check_says_what_merging_takes(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A 7B model takes 28.4 GiB in float32 and the libraries 0.875."""
    assert describe_merge(section(model="hf://some/model")) == ""
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(memory, "shapes_of", lambda folder: QWEN2_7B)
    for free, told in ((16, "free: 16.0 GiB: does not fit; remove the section merge"), (40, "free: 40.0 GiB: fits")):
        monkeypatch.setattr(memory, "free_memory", lambda workers, gpu, free=free: free * GIB)
        text = describe_merge(section(model=str(tmp_path)))
        assert text.startswith("memory: 29.2 GiB in one process, in float32; ") and told in text


@pytest.mark.slow
def test_merging_takes_what_is_said(small_model: Path, tmp_path: Path) -> None:
    """The peak of a process of its own that merges an adapter on all linear layers into 135M parameters.

    Memory is given back at once there, as that of matrices above 32 MiB, which large models have, always is.
    """
    import os
    import subprocess
    import sys

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(small_model)
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    get_peft_model(model, lora).save_pretrained(tmp_path / "adapter")
    code = """
import resource, sys
from pathlib import Path
from pipelines.train.merge import write_merged
from pipelines.recipe.train import Merge
write_merged(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), Merge())
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""
    folders = [str(small_model), str(tmp_path / "adapter"), str(tmp_path / "merged")]
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code, *folders]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    shapes = shapes_of(small_model)
    assert shapes
    seen = int(done.stdout.split()[-1])
    assert 0.8 < merge_bytes(shapes) / seen < 1.25, seen / GIB


def run_of(model: Path, folder: Path, **changes: Any) -> Run:
    return Run(section(model=str(model), **changes), 1, 1, model, folder, Tokenized([], "", 0, {}), None)


def test_an_allocation_that_fails_is_explained(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    from pipelines.train.oom import MemoryMeter, explained

    run = run_of(tiny_model, tmp_path)
    meter = MemoryMeter()
    told = r"out of memory: weights took at least \d{6}.* GiB, estimated 0\.00; "
    with pytest.raises(StageError, match=told), explained(run, meter):
        torch.empty(1 << 50, dtype=torch.uint8)
    meter.mark()
    told = r"gradients, optimizer and activations took.*gradient_checkpointing: true"
    with pytest.raises(StageError, match=told), explained(run, meter):
        torch.empty(1 << 50, dtype=torch.uint8)
    with pytest.raises(RuntimeError, match="shape"), explained(run, meter):
        torch.zeros(2) @ torch.zeros(3, 3)


def test_an_estimate_that_held_is_not_blamed(tiny_model: Path, tmp_path: Path) -> None:
    from pipelines.train.oom import MemoryMeter, explanation

    run = run_of(tiny_model, tmp_path, max_length=500, method="full")
    meter = MemoryMeter()
    meter.mark()
    assert meter.made
    assert "was not exceeded, but so much was not free" in explanation(run, meter, meter.made + 1000)


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M's configuration with random weights in bfloat16, and the tests' tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("small")
    families.byte_level_tokenizer(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", families.CHATML
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("LoRA", {"zero_stage": 0, "num_workers": 1}),
        ("LoRA in 16 bits", {"zero_stage": 2, "num_workers": 1, "dtype": "bfloat16"}),
        ("all weights on two workers", {"zero_stage": 2, "num_workers": 2, "method": "full"}),
    ],
)
def test_the_estimate_is_the_measured_peak_within_15_percent(
    small_model: Path,
    split_in: Callable[[Path, int], Output[SplitReport]],
    tmp_path: Path,
    name: str,
    wanted: dict[str, Any],
) -> None:
    """Rows packed to the full length, as the estimate takes them; the peak is the process's resident memory."""
    laboratory = Laboratory(tmp_path, small_model, partial(train_recipe, small_model), split_in(tmp_path, 80))
    rows: dict[str, Any] = {"packing": True, "max_length": 1024, "global_batch_size": 2, "eval_steps": 100}
    run = replace(laboratory.run(name, **rows, **wanted), steps=2)
    laboratory.train([run])
    assert [entry["tokens"] > 1400 for entry in read_journal(run.journal) if "loss" in entry] == [True, True]
    shapes = shapes_of(small_model)
    assert shapes
    seen = json.loads((run.folder / "facts.json").read_text())["peak_memory_bytes"]
    told = estimate(run.section, shapes, run.zero_stage)
    assert 0.85 < told.total / seen < 1.15, (str(told), seen / GIB)


@pytest.mark.slow
def test_a_run_keeps_the_stage_that_auto_chose(
    ray_cluster: None,
    recipe_of: Callable[..., Recipe],
    split_in: Callable[[Path, int], Output[SplitReport]],
    tmp_path: Path,
) -> None:
    split = split_in(tmp_path, 8)
    trained = train(recipe_of(zero_stage="auto", num_workers=1, max_steps=1), split)
    record = trained.folder.local("zero_stage.json")
    assert trained.report.zero_stage == json.loads(record.read_text()) == 0
    record.write_text("2")
    trained.folder.local("adapter", "adapter_model.safetensors").unlink()
    assert train(recipe_of(zero_stage="auto", num_workers=1, max_steps=1), split).report.zero_stage == 2
