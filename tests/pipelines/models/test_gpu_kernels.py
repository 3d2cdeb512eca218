"""Models are looked at and merged on CPUs also where a package of GPU kernels is installed."""

import subprocess
import sys
from pathlib import Path

import pytest

from pipelines.kill_with_parent import child_environment
from tests.model_families import write_qwen3_5

pytestmark = pytest.mark.slow

KERNEL = """
def chunk_gated_delta_rule(*_, **__):
    raise ValueError("Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)")
"""
CHECK = """
from tests.pipelines.train.conftest import problems_of, train_recipe

assert not problems_of(train_recipe(model)), problems_of(train_recipe(model))
"""
MERGE = """
from pipelines.recipe.train import Merge
from pipelines.train.merge import write_merged

write_merged(model, model.with_name("adapter"), model.with_name("merged"), Merge(dtype="float32"))
"""


@pytest.mark.parametrize("script", [CHECK, MERGE], ids=["check", "merge"])
def test_kernels_that_read_gpus_alone_are_not_taken_on_cpus(script: str, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    kernels = tmp_path / "packages" / "fla" / "ops" / "gated_delta_rule"
    kernels.mkdir(parents=True)
    for folder in (kernels.parents[1], kernels.parent, kernels):
        (folder / "__init__.py").write_text(KERNEL if folder == kernels else "")
    model = tmp_path / "model"
    model.mkdir()
    write_qwen3_5(model)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path / "adapter")
    environment = child_environment()
    environment["PYTHONPATH"] += f":{tmp_path / 'packages'}"
    script = f"from pathlib import Path\nmodel = Path({str(model)!r})\n{script}"
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
