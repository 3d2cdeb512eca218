"""What an adapter sits on: never a router, experts by a key, and what is merged is what was trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.models.skeleton import check_weights
from pipelines.models.weight_files import weight_shapes
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import Merge, Train
from pipelines.train.memory import estimate, shapes_of, trained_parameters
from pipelines.train.merge import write_merged
from pipelines.train.targets import Trained, adapter_config, check_targets, routers_of
from pipelines.train.weights import check_base
from tests import model_families as families
from tests.pipelines.train.conftest import problems_of, train_recipe


@pytest.fixture(scope="module")
def expert_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a family, written once."""
    root = tmp_path_factory.mktemp("experts")

    def folder_of(kind: str) -> Path:
        return root / kind if (root / kind).exists() else families.write_experts(root / kind, kind)

    return folder_of


def checked(folder: Path, **lora: Any) -> tuple[Trained | None, str]:
    skeleton = check_weights(folder)
    assert skeleton
    section = Train(model=str(folder), lora=lora)  # type: ignore[arg-type]
    trained, problems = check_targets(section, skeleton.model, weight_shapes(folder))
    return trained, "\n".join(problem.message for problem in problems)


@pytest.mark.parametrize("kind", families.EXPERT_FAMILIES)
def test_all_linear_is_no_router_and_experts_come_by_the_key(kind: str, expert_models: Callable[[str], Path]) -> None:
    folder = expert_models(kind)
    plain, told = checked(folder)
    assert plain and not told
    skeleton = check_weights(folder)
    assert skeleton
    linear = {name for name, module in skeleton.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(plain.modules) == linear - {"lm_head"} - routers_of(skeleton.model)
    whole, told = checked(folder, target_experts=True)
    assert whole and not told and whole.parameters > plain.parameters
    assert not any(name.rpartition(".")[2] in ("gate", "router", "wg", "layer") for name in whole.modules)
    assert "of" in str(whole) and "%" in str(whole)
    section = Train(model=str(folder), lora={"target_experts": True})  # type: ignore[arg-type]
    shapes = shapes_of(folder)
    assert shapes and trained_parameters(section, shapes) == whole.parameters
    assert shapes.parameters == whole.of
    assert estimate(section, shapes, 0).total > estimate(Train(model=str(folder)), shapes, 0).total


@pytest.mark.parametrize(
    ("kind", "targets", "told"),
    [
        ("qwen3_moe", ["q_proj", "gate_proj"], r"'gate_proj' names experts, .*target_experts: true"),
        ("mixtral", ["w1"], r"'w1' names experts, .*target_experts: true"),
        ("deepseek_v3", ["up_proj", "down_proj"], r"'up_proj' names experts"),
        ("glm4_moe", r".*\.experts\.[01]\.up_proj", r"names experts"),
        ("olmoe", ["gate"], r"'gate' is a router .*never trained"),
        ("qwen2_moe", ["q_proj", "shared_expert_gate"], r"'shared_expert_gate' is a router"),
        ("granitemoe", ["router"], r"'router' is a router"),
        ("hunyuan_v1_moe", ["wg"], r"'wg' is a router"),
        ("qwen3_moe", "(q_proj", r"'\(q_proj' is no pattern"),
        ("qwen3_moe", ["qproj"], r"no layer outside the experts matches 'qproj'; did you mean 'q_proj'"),
    ],
)
def test_targets_that_take_a_part_of_the_experts_or_a_router_are_refused(
    kind: str, targets: Any, told: str, expert_models: Callable[[str], Path]
) -> None:
    import re

    trained, problems = checked(expert_models(kind), target_modules=targets)
    assert trained is None and re.search(told, problems)


SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "num_hidden_layers": 2}
STATE: dict[str, dict[str, Any]] = {
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False, "num_experts": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "zamba2": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
}


@pytest.mark.parametrize(
    ("name", "layer", "told"),
    [
        ("jamba", "dt_proj", "dt_proj, which is read by JambaMambaMixer past an adapter; leave it out"),
        ("mamba2", "out_proj", "out_proj, which is read by Mamba2Mixer past an adapter; leave it out"),
        ("zamba2", "q_proj", "q_proj, which shares its matrix with another layer; leave it out"),
    ],
)
def test_all_linear_is_no_layer_that_an_adapter_would_not_reach(name: str, layer: str, told: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**SIZES, **STATE[name]}))
    assert layer in {part.rpartition(".")[2] for part, _ in model.named_modules()}
    trained, problems = check_targets(Train(model="x"), model, [])
    assert trained and not problems and layer not in {part.rpartition(".")[2] for part in trained.modules}
    named = Train(model="x", lora={"target_modules": ["in_proj", layer]})  # type: ignore[arg-type]
    trained, problems = check_targets(named, model, [])
    (problem,) = problems
    assert trained is None and problem.message.endswith(told)


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_an_adapter_on_one_end_of_a_tied_vocabulary_is_refused(name: str, tmp_path: Path) -> None:
    families.write_smollm2(tmp_path / "tied")
    _, told = checked(tmp_path / "tied", target_modules=["q_proj", name])
    assert f"{name} shares its matrix with the other end of the vocabulary" in told
    families.write_llama(tmp_path / "apart")
    assert checked(tmp_path / "apart", target_modules=["q_proj", name])[1] == ""


def test_experts_are_asked_for_where_there_are_some_and_joined_with_what_peft_has(
    recipe_of: Callable[..., Recipe], tiny_model: Path
) -> None:
    assert "target_experts: the model has no experts; leave it out" in problems_of(
        recipe_of(lora={"target_experts": True})
    )
    for wrong in ({"lora_dropout": 0.1}, {"use_dora": True}):
        with pytest.raises(ValueError, match="target_experts cannot be joined with use_dora or lora_dropout"):
            recipe_of(lora={"target_experts": True, **wrong})
    with pytest.raises(ValueError, match="target_experts needs zero_stage 0, 1 or 2"):
        recipe_of(lora={"target_experts": True}, zero_stage=3)
    with pytest.raises(ValueError, match="load_best_model_at_end goes by the loss of held-out rows; give eval_rows"):
        recipe_of(load_best_model_at_end=True)
    with pytest.raises(ValueError, match="dtype float16 needs GPUs"):
        train_recipe(tiny_model, dtype="float16")


@pytest.mark.slow
@pytest.mark.parametrize("experts", [False, True])
@pytest.mark.parametrize("kind", families.EXPERT_FAMILIES)
def test_merged_from_disk_and_in_memory_an_adapter_on_experts_says_the_same(
    kind: str, experts: bool, expert_models: Callable[[str], Path], tmp_path: Path
) -> None:
    from peft import PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = expert_models(kind)
    section = Train(model=str(folder), lora={"target_experts": experts})  # type: ignore[arg-type]
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    adapted: Any = get_peft_model(model, adapter_config(section, model))
    torch.manual_seed(1)
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(value, std=0.05)
    adapted.eval().save_pretrained(tmp_path / "adapter")
    check_base(tmp_path / "adapter", folder)
    written = write_merged(folder, tmp_path / "adapter", tmp_path / "merged", Merge(dtype="float32"))
    assert written.merge_difference < 1e-4 and written.reload_difference == 0
    ids = torch.arange(3, 60)[None]
    base: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    merged: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        in_memory = adapted(input_ids=ids).logits
        plain = base(input_ids=ids).logits
        on_base = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()(input_ids=ids).logits
        for other in (on_base, merged(input_ids=ids).logits):
            assert float((other - in_memory).abs().max()) < 1e-4 < 0.1 < float((other - plain).abs().max())
