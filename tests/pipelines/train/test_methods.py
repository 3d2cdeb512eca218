"""Every method with every ZeRO stage, resumed on the same and on another number of workers.

The workers are plain processes that import once and train many runs; test_stage.py has the same loop inside Ray.
"""

import json
import shutil
import struct
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.stage import Output
from pipelines.metrics.rouge import rouge_l_f
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import Merge
from pipelines.train.checkpoint import complete_checkpoints, step_of
from pipelines.train.journal import read_journal
from pipelines.train.merge import write_merged
from pipelines.train.run import Run
from pipelines.train.samples import Samples
from tests.pipelines.train.laboratory import STEPS, Laboratory, losses

pytestmark = pytest.mark.slow

FULL = {"method": "full", "learning_rate": 1e-3}
METHODS: dict[str, dict[str, Any]] = {
    **{f"lora, ZeRO-{stage}": {"zero_stage": stage} for stage in range(4)},
    **{f"full, ZeRO-{stage}": {"zero_stage": stage, **FULL} for stage in range(4)},
    "dora, ZeRO-2": {"lora": {"use_dora": True}},
    "dora, ZeRO-3": {"zero_stage": 3, "lora": {"use_dora": True}},
    "rslora": {"lora": {"use_rslora": True, "r": 4}},
    "bfloat16, ZeRO-0": {"dtype": "bfloat16", "zero_stage": 0},
    "bfloat16, ZeRO-1": {"dtype": "bfloat16", "zero_stage": 1},
    "bfloat16, ZeRO-2": {"dtype": "bfloat16"},
    "bfloat16, ZeRO-3": {"dtype": "bfloat16", "zero_stage": 3},
    "packed": {"packing": True},
    "shared rows, ZeRO-2": {"packing": True, "sequence_parallel_size": 2},
    "shared rows, ZeRO-3": {"packing": True, "sequence_parallel_size": 2, "zero_stage": 3},
    "optimizer apart, ZeRO-2": {"offload_optimizer": True},
    "optimizer apart, ZeRO-3": {"offload_optimizer": True, "zero_stage": 3},
    "checkpointed activations": {"gradient_checkpointing": True},
    "dropout and noise": {"lora": {"lora_dropout": 0.1}, "neftune_noise_alpha": 5},
}
SHARDED = [name for name in METHODS if name.startswith(("lora", "full")) and not name.endswith("0")]
"""Where a checkpoint is cut into as many shards as there are workers."""


@pytest.fixture(scope="module")
def laboratory(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_model: Path,
    recipe_of: Callable[..., Recipe],
    split_in: Callable[[Path, int], Output[SplitReport]],
) -> Laboratory:
    root = tmp_path_factory.mktemp("laboratory")
    return Laboratory(root, tiny_model, recipe_of, split_in(root, 30))


@pytest.fixture(scope="module")
def trained(laboratory: Laboratory) -> dict[str, Run]:
    """Every method, trained on two workers."""
    runs = {name: laboratory.run(name, **section) for name, section in METHODS.items()}
    laboratory.train(list(runs.values()))
    return runs


@pytest.fixture(scope="module")
def alone(laboratory: Laboratory) -> dict[str, Run]:
    """The sharded methods, trained on one worker."""
    runs = {name: laboratory.run(f"{name} alone", num_workers=1, **METHODS[name]) for name in SHARDED}
    laboratory.train(list(runs.values()))
    return runs


@pytest.mark.parametrize("name", METHODS)
def test_it_learns(trained: dict[str, Run], name: str) -> None:
    held_out = [entry["eval_loss"] for entry in read_journal(trained[name].journal) if "eval_loss" in entry]
    assert len(held_out) == 4 and held_out[-1] < held_out[0] - 0.3


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_stage_of_zero_changes_no_loss(trained: dict[str, Run], method: str) -> None:
    reference = losses(trained[f"{method}, ZeRO-0"])
    for stage in (1, 2, 3):
        assert losses(trained[f"{method}, ZeRO-{stage}"]) == pytest.approx(reference, abs=1e-4)
    for stage in (2, 3):
        assert losses(trained[f"optimizer apart, ZeRO-{stage}"]) == pytest.approx(
            losses(trained["lora, ZeRO-2"]), abs=1e-4
        )
    for stage in range(4):
        assert losses(trained[f"bfloat16, ZeRO-{stage}"]) == pytest.approx(losses(trained["lora, ZeRO-2"]), abs=0.05)


def test_every_stage_tells_the_same_gradient_norm(trained: dict[str, Run]) -> None:
    norms = {
        name: [entry["grad_norm"] for entry in read_journal(trained[name].journal) if "loss" in entry]
        for name in ("lora, ZeRO-2", "lora, ZeRO-0", "lora, ZeRO-1", "lora, ZeRO-3")
    }
    for name, found in norms.items():
        assert found == pytest.approx(norms["lora, ZeRO-2"], rel=1e-3), name


@pytest.mark.parametrize("stage", [2, 3])
def test_rows_shared_by_two_workers_give_the_losses_they_give_alone(trained: dict[str, Run], stage: int) -> None:
    assert losses(trained[f"shared rows, ZeRO-{stage}"]) == pytest.approx(losses(trained["packed"]), abs=1e-4)


def test_checkpointed_activations_change_no_loss(trained: dict[str, Run]) -> None:
    assert losses(trained["checkpointed activations"]) == pytest.approx(losses(trained["lora, ZeRO-2"]), abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_what_is_left_has_the_held_out_loss_of_training(trained: dict[str, Run], name: str) -> None:
    """In one process, with the model's own loss on single samples: no part of the loop's code."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = trained[name]
    if run.section.method == "full":
        model = AutoModelForCausalLM.from_pretrained(run.trained, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32)
        model = PeftModel.from_pretrained(model, run.trained)
    assert run.held_out
    samples = Samples(run.held_out)
    total, count = 0.0, 0
    for number in range(len(samples)):
        tokens, labels = (torch.tensor(array).long()[None] for array in samples[number])
        with torch.no_grad():
            loss = model.eval()(input_ids=tokens, labels=labels).loss
        weight = int((labels[:, 1:] != -100).sum())
        total, count = total + float(loss) * weight, count + weight
    assert total / count == pytest.approx(losses(run)[-1], abs=0.01 if "bfloat16" in name else 1e-4)


@pytest.mark.parametrize("name", ["lora, ZeRO-2", "lora, ZeRO-3", "full, ZeRO-0", "full, ZeRO-3", "dora, ZeRO-2"])
def test_merged_it_answers_as_it_was_trained(trained: dict[str, Run], name: str, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = trained[name]
    written = write_merged(run.model, run.trained, tmp_path / "model", Merge(dtype="float32"))
    assert written.merge_difference < 1e-4 and written.reload_difference == 0
    full = run.section.method == "full"
    model = AutoModelForCausalLM.from_pretrained(run.trained if full else run.model, dtype=torch.float32)
    model = model if full else PeftModel.from_pretrained(model, run.trained).eval()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        assert float((model(input_ids=ids).logits - merged(input_ids=ids).logits).abs().max()) < 1e-4


def test_six_steps_are_four_and_two_bit_for_bit(laboratory: Laboratory, trained: dict[str, Run]) -> None:
    names = [name for name in METHODS]
    runs = {name: laboratory.continued(trained[name], f"{name} again", 4, **METHODS[name]) for name in names}
    laboratory.train(list(runs.values()))
    for name, run in runs.items():
        assert json.loads((run.folder / "facts.json").read_text())["resumed_at"] == 4
        assert losses(run) == losses(trained[name]), name
        assert {path.name: path.read_bytes() for path in run.trained.glob("*.safetensors")} == {
            path.name: path.read_bytes() for path in trained[name].trained.glob("*.safetensors")
        }, name


def test_a_run_whose_disk_is_lost_goes_on_from_the_copies(laboratory: Laboratory, tmp_path: Path) -> None:
    run = laboratory.run("copied", checkpoint_copies=str(tmp_path))
    laboratory.train([run])
    undisturbed = losses(run)
    assert {path.name for path in (tmp_path / "copied").iterdir()} == {f"checkpoint-{step}" for step in (2, 4, 6)}
    shutil.rmtree(tmp_path / "copied" / "checkpoint-6")
    shutil.rmtree(run.folder)
    again = laboratory.run("copied", checkpoint_copies=str(tmp_path))
    laboratory.train([again])
    assert json.loads((again.folder / "facts.json").read_text())["resumed_at"] == 4
    assert losses(again) == undisturbed


def test_two_workers_go_on_as_one(laboratory: Laboratory, trained: dict[str, Run]) -> None:
    runs = {
        name: laboratory.continued(trained[name], f"{name} to one", 4, num_workers=1, **METHODS[name])
        for name in SHARDED
    }
    laboratory.train(list(runs.values()))
    for name, run in runs.items():
        assert json.loads((run.folder / "facts.json").read_text())["resumed_at"] == 4
        assert losses(run) == pytest.approx(losses(trained[name]), abs=1e-3), name
        assert not run.universal.exists()


def test_one_worker_goes_on_as_two(laboratory: Laboratory, trained: dict[str, Run], alone: dict[str, Run]) -> None:
    runs = {name: laboratory.continued(alone[name], f"{name} to two", 4, **METHODS[name]) for name in SHARDED}
    laboratory.train(list(runs.values()))
    for name, run in runs.items():
        assert json.loads((run.folder / "facts.json").read_text())["resumed_at"] == 4
        assert losses(alone[name]) == pytest.approx(losses(trained[name]), abs=1e-4), name
        assert losses(run) == pytest.approx(losses(trained[name]), abs=1e-3), name


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_weights_in_four_bits_learn_in_every_layer_and_resume(laboratory: Laboratory) -> None:
    """With an evaluation before the first step, after which bitsandbytes may repack weights so that none learns."""
    section: dict[str, Any] = {"method": "qlora", "dtype": "bfloat16"}
    runs = [laboratory.run(f"qlora {stage}", zero_stage=stage, **section) for stage in range(4)]
    laboratory.train(runs)
    again = [
        laboratory.continued(run, f"qlora {stage} again", 4, zero_stage=stage, **section)
        for stage, run in enumerate(runs)
    ]
    laboratory.train(again)
    from safetensors.torch import load_file

    held_out = [entry["eval_loss"] for entry in read_journal(runs[0].journal) if "eval_loss" in entry]
    assert held_out[-1] < held_out[0] - 0.3
    for run, gone_on in zip(runs, again, strict=True):
        assert losses(run) == pytest.approx(losses(runs[0]), abs=0.02)
        assert losses(gone_on) == losses(run)
    weights = load_file(runs[0].trained / "adapter_model.safetensors")
    grown = [float(value.abs().max()) for name, value in weights.items() if "layers.0." in name and "lora_B" in name]
    assert len(grown) == 7 and min(grown) > 1e-3  # they begin at 0


@pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_what_was_trained_on_four_bits_is_merged_into_the_published_weights_or_into_what_the_bits_say(
    laboratory: Laboratory, tmp_path: Path
) -> None:
    import torch
    from bitsandbytes.nn import Linear4bit
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    run = laboratory.run("qlora float32", method="qlora")
    laboratory.train([run])
    for base in ("original", "dequantized"):
        merge = Merge.model_validate({"dtype": "float32", "base": base})
        written = write_merged(run.model, run.trained, tmp_path / base, merge)
        assert written.merge_difference < 1e-4 and written.reload_difference == 0
        assert "quantization_config" not in json.loads((tmp_path / base / "config.json").read_text())
    options: dict[str, Any] = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)
    model = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32, quantization_config=four_bits)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False  # computes in float32, and not in a packed form of bfloat16
    models = [PeftModel.from_pretrained(model, run.trained).eval()]
    models += [AutoModelForCausalLM.from_pretrained(tmp_path / base) for base in ("dequantized", "original")]
    ids = torch.arange(3, 90)[None]
    with torch.no_grad():
        trained, dequantized, original = (model(input_ids=ids).logits for model in models)
    assert float((trained - dequantized).abs().max()) < 1e-4 < 1e-2 < float((trained - original).abs().max())


@pytest.mark.parametrize(
    ("name", "files", "stored"),
    [
        ("wandb", "wandb/offline-run-*/run-*.wandb", lambda value: repr(value).encode()),
        ("swanlab", "run-*/run-*.swanlab", lambda value: struct.pack("<d", value)),
    ],
)
def test_a_tracker_that_is_asked_for_gets_the_losses_of_the_journal(
    laboratory: Laboratory, monkeypatch: pytest.MonkeyPatch, name: str, files: str, stored: Callable[[float], bytes]
) -> None:
    pytest.importorskip(name)
    monkeypatch.setenv(f"{name.upper()}_MODE", "offline")
    run = laboratory.run(f"told {name}", report_to=[name])
    laboratory.train([run])
    (file,) = run.folder.glob(files)
    written = file.read_bytes()
    assert len(losses(run)) == 10 and all(stored(loss) in written for loss in losses(run))


def test_answers_while_training_are_kept_and_the_best_checkpoint_is_left(laboratory: Laboratory) -> None:
    """A learning rate that rises until it ruins the model: the weights that are left are not those of the last step."""
    section: dict[str, Any] = {
        "evaluation_inputs": ["What is 1 and 2?", "red", "一"],
        "sample_steps": 4,
        "evaluation_max_tokens": 6,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
        "method": "full",
        "learning_rate": 0.2,
        "max_grad_norm": 100,
        "warmup_ratio": 1.0,
    }
    runs = [laboratory.run(f"answers {stage}", zero_stage=stage, **section) for stage in (2, 3)]
    laboratory.train(runs)
    held_out = {entry["step"]: entry["eval_loss"] for entry in read_journal(runs[0].journal) if "eval_loss" in entry}
    best = min((step for step in held_out if step), key=lambda step: held_out[step])
    assert best != STEPS
    assert [step_of(folder) for folder in complete_checkpoints(runs[0].checkpoints)] == [best, STEPS]
    from safetensors.torch import load_file

    left = load_file(runs[0].trained / "model.safetensors")
    saved = load_file(runs[0].checkpoints / f"checkpoint-{best}" / "model.safetensors")
    assert left.keys() == saved.keys()
    assert all(bool((left[name] == saved[name]).all()) for name in saved)
    answers = read_journal(runs[0].samples)
    assert [(answer["step"], answer["input"]) for answer in answers] == [
        (step, text) for step in (0, 4, 6) for text in section["evaluation_inputs"]
    ]
    assert answers[0]["output"] != answers[-3]["output"]
    assert read_journal(runs[1].samples)[:3] == answers[:3]  # before training the stages answer alike


def test_held_out_rows_are_answered_at_each_evaluation(laboratory: Laboratory) -> None:
    """The scores of the last evaluation, and those of answers made one by one, from the rows, with no padding."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    section: dict[str, Any] = {"predict_with_generate": True, "evaluation_max_tokens": 12, "eval_steps": 3}
    runs = [laboratory.run(f"predicting {stage}", zero_stage=stage, **section) for stage in (2, 3)]
    laboratory.train(runs)
    entries = [[e for e in read_journal(run.journal) if "eval_loss" in e] for run in runs]
    assert [entry["step"] for entry in entries[0]] == [0, 3, 6]
    names = ("eval_rouge-l-f", "eval_bleu-4")
    for one, other in zip(*entries, strict=True):
        assert [one[name] for name in names] == pytest.approx([other[name] for name in names], abs=1e-6)
    run = runs[0]
    tokenizer = AutoTokenizer.from_pretrained(run.model)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(run.model, dtype="float32"), run.trained)
    scores = []
    for row in laboratory.held_out_rows:
        prompt = f"<|im_start|>user\n{row['query']}<|im_end|>\n<|im_start|>assistant\n"
        ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        output = model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
        scores.append(rouge_l_f(tokenizer.decode(output, skip_special_tokens=True).strip(), row["response"]))
    assert sum(scores) / len(scores) == pytest.approx(entries[0][-1]["eval_rouge-l-f"], abs=1e-6)
