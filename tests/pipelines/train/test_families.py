"""Every family that recipes name: trained on two workers, resumed, merged."""

from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.stage import Output
from pipelines.models.convert import convert
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import Merge
from pipelines.train.merge import write_merged
from pipelines.train.run import Run
from tests import model_families as families
from tests.pipelines.train.laboratory import Laboratory, losses

pytestmark = pytest.mark.slow

CONVERTED, AS_THEY_ARE = ("internlm2", "chatglm3"), ("llama", "smollm2", "qwen3_5")
ONE_BY_ONE = {"qwen3_5"}
"""Whose recurrent layers go from one sample to the next."""
FAMILIES = ("qwen2", *AS_THEY_ARE, *CONVERTED)


@pytest.fixture(scope="module")
def laboratories(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    recipe_of: Callable[..., Recipe],
    split_in: Callable[[Path, int], Output[SplitReport]],
) -> dict[str, Laboratory]:
    """One for each family, over the same rows."""
    root = tmp_path_factory.mktemp("families")
    models = {"qwen2": tiny_model}
    for name in (*AS_THEY_ARE, *CONVERTED):
        models[name] = root / "models" / name
        models[name].mkdir(parents=True)
        if name in CONVERTED:
            getattr(families, f"write_{name}")(root / "published" / name)
            convert(root / "published" / name, models[name])
        else:
            getattr(families, f"write_{name}")(models[name])
    split = split_in(root, 30)
    return {name: Laboratory(root / name, models[name], recipe_of, split) for name in FAMILIES}


@pytest.fixture(scope="module")
def trained(laboratories: dict[str, Laboratory]) -> dict[str, Run]:
    """Each family, trained with LoRA on all linear layers."""
    runs = {name: laboratory.run("lora", packing=name not in ONE_BY_ONE) for name, laboratory in laboratories.items()}
    laboratories["qwen2"].train(list(runs.values()))
    return runs


def test_every_family_learns_and_goes_on_bit_for_bit(
    laboratories: dict[str, Laboratory], trained: dict[str, Run]
) -> None:
    again = {
        name: laboratories[name].continued(run, "again", 4, packing=run.section.packing)
        for name, run in trained.items()
    }
    laboratories["qwen2"].train(list(again.values()))
    for name, run in trained.items():
        assert losses(run)[-1] < losses(run)[0] - 0.3, name
        assert losses(again[name]) == losses(run), name


@pytest.mark.parametrize("name", FAMILIES)
def test_merged_it_is_base_and_adapter(trained: dict[str, Run], name: str, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = trained[name]
    written = write_merged(run.model, run.trained, tmp_path / "model", Merge(dtype="float32"))
    assert written.merge_difference < 1e-4 and written.reload_difference == 0
    base = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, run.trained).eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")(input_ids=ids).logits
    assert float((merged - adapted).abs().max()) < 1e-4 < 0.1 < float((merged - plain).abs().max())
    templates = [AutoTokenizer.from_pretrained(folder).chat_template for folder in (run.model, tmp_path / "model")]
    assert templates[0] == templates[1]
