"""Models that are changed before training, through training and merging: FP8 codes, and a base model that runs on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.stage import Output
from pipelines.recipe.train import Merge
from pipelines.train.ends import stop_tokens
from pipelines.train.merge import write_merged
from tests import model_families as families
from tests.pipelines.train.conftest import problems_of, train, train_recipe

pytestmark = pytest.mark.slow

SHORT = {"num_workers": 1, "max_steps": 2, "global_batch_size": 2, "save_steps": 2, "evaluation_inputs": ["?"]}


def test_fp8_weights_and_a_base_models_end_go_through_training_and_merging(
    ray_cluster: None, tiny_model: Path, split_of: Callable[[int], Output[SplitReport]], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "published"))
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    families.byte_level_tokenizer(special, "<|endoftext|>", families.CHATML).save_pretrained(folder)
    whole, codes = load_file(folder / "model.safetensors"), {}
    for name, value in whole.items():
        codes[name] = value
        if name.endswith("proj.weight"):
            scale = value.float().abs().max() / 448
            codes[name] = (value.float() / scale).to(torch.float8_e4m3fn)
            codes[f"{name}_scale_inv"] = torch.full((1, 1), float(scale))
    save_file(codes, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    said = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0, "quantization_config": said}))
    (folder / "generation_config.json").unlink()

    recipe = train_recipe(folder, eval_rows=32, **SHORT)
    assert problems_of(recipe) == ""
    trained = train(recipe, split_of(6))
    base = Path(trained.report.model)
    assert stop_tokens(base) == [0, 2]
    plain = load_file(base / "model.safetensors")
    assert plain.keys() == whole.keys()
    assert all(torch.allclose(plain[n].float(), v.float(), rtol=2**-4, atol=1e-3) for n, v in whole.items())
    assert trained.report.held_out_samples and trained.report.held_out_samples.rows == 4
    assert trained.report.eval_loss_delta and trained.report.eval_loss_delta.rows == 4
    assert "over 4 rows, too few to judge" in trained.report.summary
    adapter = trained.folder.local(trained.report.weights)
    assert stop_tokens(adapter) == [0, 2]
    written = write_merged(base, adapter, tmp_path / "merged", Merge())
    assert written.merge_difference < 1e-4
    assert stop_tokens(tmp_path / "merged") == [0, 2]
    tokenizer = json.loads((tmp_path / "merged" / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
