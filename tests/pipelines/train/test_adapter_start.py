"""Going on from an adapter: what is read of it, what is refused, and that its training is what peft does by hand."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.stage import Output
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import ADAPTER_CONFIG, Train
from pipelines.train.samples import Samples, Schedule, collate
from tests.pipelines.train.conftest import problems_of, train_recipe, train_stage
from tests.pipelines.train.laboratory import Laboratory

LORA = {"r": 4, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter that peft wrote."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("adapter")
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, LoraConfig(**LORA, task_type="CAUSAL_LM")).save_pretrained(folder)
    return folder


def changed(adapter: Path, folder: Path, **config: Any) -> Path:
    """The adapter with other settings."""
    folder.mkdir()
    for file in adapter.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    own = json.loads((adapter / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps({**own, **config}))
    return folder


def section_of(**section: Any) -> Train:
    return Train.model_validate({"model": "x", **section})


def test_rank_scale_and_layers_are_the_adapters(adapter: Path, tiny_model: Path) -> None:
    section = section_of(adapter=str(adapter))
    assert (section.lora.r, section.lora.lora_alpha) == (4, 16)
    assert sorted(section.lora.target_modules) == ["q_proj", "v_proj"]
    assert section_of(adapter=str(adapter), lora={"lora_dropout": 0.1}).lora.lora_dropout == 0.1
    assert section_of(adapter=str(adapter), lora={"r": 4}) == section
    assert not problems_of(train_recipe(tiny_model, adapter=str(adapter)))


@pytest.mark.parametrize(
    ("lora", "told"),
    [({"r": 8}, "lora.r is 8, and the adapter's 4"), ({"use_dora": True}, "lora.use_dora is True, and the adapter's")],
)
def test_what_the_recipe_says_otherwise_is_refused(adapter: Path, lora: dict[str, Any], told: str) -> None:
    with pytest.raises(ValidationError, match=told):
        section_of(adapter=str(adapter), lora=lora)


def test_what_is_no_adapter_is_refused(adapter: Path, tmp_path: Path) -> None:
    for name in ("nowhere", "hf://somebody/adapter", str(tmp_path)):
        with pytest.raises(ValidationError, match=r"there is no adapter_config.json in .*; give the folder"):
            section_of(adapter=name)
    with pytest.raises(ValidationError, match="adapter goes with method lora or qlora"):
        section_of(adapter=str(adapter), method="full")
    for number, text in enumerate(("{", "[]", '{"peft_type": "IA3"}')):
        (tmp_path / f"{number}").mkdir()
        (tmp_path / f"{number}" / ADAPTER_CONFIG).write_text(text)
        with pytest.raises(ValidationError, match=r"is no JSON|describes no LoRA"):
            section_of(adapter=str(tmp_path / f"{number}"))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"bias": "all"}, "bias is all"),
        ({"init_lora_weights": "pissa"}, "its base model was changed"),
        ({"target_modules": ["q_proj"]}, "made for another base model|has no such module"),
        ({"target_modules": ["nothing"]}, "made for another base model"),
    ],
)
def test_an_adapter_that_is_not_trained_on_is_refused_before_anything_runs(
    adapter: Path, tiny_model: Path, tmp_path: Path, config: dict[str, Any], told: str
) -> None:
    folder = changed(adapter, tmp_path / "other", **config)
    problems = problems_of(train_recipe(tiny_model, adapter=str(folder)))
    assert problems.startswith("train.adapter: ")
    assert any(part in problems for part in told.split("|")), problems


def test_an_adapter_without_weights_or_for_another_base_is_refused(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    from tests.model_families import write_thinker

    bare = changed(adapter, tmp_path / "bare")
    (bare / "adapter_model.safetensors").unlink()
    assert "there is no adapter_model.safetensors" in problems_of(train_recipe(tiny_model, adapter=str(bare)))
    other = write_thinker(tmp_path / "thinker")
    assert "made for another base model" in problems_of(train_recipe(other, adapter=str(adapter)))


def test_where_the_recipe_names_layers_they_must_be_the_adapters(adapter: Path, tiny_model: Path) -> None:
    for targets in (["q_proj", "v_proj"], ["v_proj", "q_proj"]):
        assert not problems_of(train_recipe(tiny_model, adapter=str(adapter), lora={"target_modules": targets}))
    for targets in ("all-linear", ["q_proj"]):
        told = problems_of(train_recipe(tiny_model, adapter=str(adapter), lora={"target_modules": targets}))
        assert "train.lora.target_modules" in told and "the adapter has other layers" in told, told


def test_the_adapters_content_decides_the_output_and_not_its_place(
    adapter: Path, tiny_model: Path, tmp_path: Path
) -> None:
    def known(folder: Path) -> Any:
        return train_stage(train_recipe(tiny_model, adapter=str(folder))).fingerprint_inputs()

    copy = changed(adapter, tmp_path / "copy")
    assert known(adapter) == known(copy)
    weights = copy / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\0\0\0\1")
    assert known(adapter) != known(copy)
    assert "adapter" not in train_stage(train_recipe(tiny_model)).fingerprint_inputs()


@pytest.mark.slow
def test_three_steps_and_three_more_in_a_new_order_are_what_peft_does_by_hand(
    tmp_path: Path,
    tiny_model: Path,
    recipe_of: Callable[..., Recipe],
    split_in: Callable[[Path, int], Output[SplitReport]],
) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    laboratory = Laboratory(tmp_path / "runs", tiny_model, recipe_of, split_in(tmp_path, 30))
    plain = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0, "save_steps": 3, "max_steps": 3}
    first = replace(laboratory.run("first", **plain), steps=3)
    (first.trained / ADAPTER_CONFIG).parent.mkdir(parents=True)
    (first.trained / ADAPTER_CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 32}))
    again = laboratory.run("again", adapter=str(first.trained), **plain)
    second = replace(again, steps=3, seed=7)
    laboratory.train([first, second])

    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = PeftModel.from_pretrained(base, first.trained, is_trainable=True)
    started = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    weights = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.0)
    schedule = Schedule(Samples(laboratory.training), 7, 12, None)
    for step in range(3):
        batches = [collate([schedule[number]]) for number in range(step * 4, step * 4 + 4)]
        tokens = sum(batch["targets"].numel() for batch in batches)
        for batch in batches:
            logits = model(input_ids=batch["input_ids"]).logits[0, batch["logits_to_keep"]]
            torch.nn.functional.cross_entropy(logits, batch["targets"], reduction="sum").div(tokens).backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    trained = load_file(second.trained / "adapter_model.safetensors")
    by_hand = {name.replace(".default", ""): value for name, value in model.named_parameters() if value.requires_grad}
    assert trained.keys() == by_hand.keys()
    for name, value in by_hand.items():
        assert float((value - trained[name]).abs().max()) < 1e-4, name
    moved = max(float((model.get_parameter(name) - value).abs().max()) for name, value in started.items())
    assert moved > 1e-2
