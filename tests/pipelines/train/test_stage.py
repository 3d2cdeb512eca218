"""Training as a stage, on real Ray workers with real DeepSpeed: straight through, and killed in between."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.stage import Output, read_manifest
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import HardwareError, RecipeError, StageError
from pipelines.models.lineup import lineup_of, served_models
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import Merge
from pipelines.train.checkpoint import complete_checkpoints, step_of
from pipelines.train.journal import read_journal
from pipelines.train.merge import MergeInputs, MergeStage
from pipelines.train.stage import _held_out_rows
from tests.model_families import CHATML
from tests.outputs import finished, rows_of
from tests.pipelines.train.conftest import chats, finished_split, place_for, problems_of, train, train_stage

RecipeOf = Callable[..., Recipe]
SplitIn = Callable[[Path, int], Output[SplitReport]]

ROWS, STEPS = 30, 24
SECTION = {"max_steps": STEPS, "num_train_epochs": 100, "save_steps": 4, "save_total_limit": 2}
SECTION |= {"eval_rows": 3, "eval_steps": 10}

DRIVER = """
import sys, tempfile
import ray
from pipelines.recipe.schema import Recipe
from pipelines.train.stage import TrainInputs, TrainStage
from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.stage import Output, read_manifest
from pipelines.artifacts.workspace import Place, Workspace

ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, log_to_driver=False,
         _temp_dir=tempfile.mkdtemp(prefix="danlu-k-"))
workspace = Workspace(sys.argv[1])
split = Place(workspace, "split", "s")
inputs = TrainInputs(Output("split", split, read_manifest(split, SplitReport)))
recipe = Recipe.model_validate_json(sys.argv[2])
TrainStage(recipe.train, recipe.ingest, recipe.seed).run(Place(workspace, "train", "f"), inputs)
"""


@pytest.fixture(scope="module")
def split(split_in: SplitIn, tmp_path_factory: pytest.TempPathFactory) -> Output[SplitReport]:
    """What the run that nothing disturbs is trained on."""
    return split_in(tmp_path_factory.mktemp("straight"), ROWS)


@pytest.fixture(scope="module")
def straight(ray_cluster: None, recipe_of: RecipeOf, split: Output[SplitReport]) -> Output[TrainReport]:
    """A finished run that nothing disturbed."""
    return train(recipe_of(**SECTION), split)


def test_the_model_learns_and_the_report_says_how(straight: Output[TrainReport]) -> None:
    report, delta = straight.report, straight.report.eval_loss_delta
    assert report.eval_loss is not None and report.eval_loss_base is not None and delta is not None
    assert report.eval_loss < 0.9 * report.eval_loss_base
    assert delta.value == pytest.approx(report.eval_loss - report.eval_loss_base, abs=1e-9)
    assert delta.low < delta.value < delta.high < 0
    assert report.steps == STEPS and [entry.step for entry in report.losses] == list(range(1, STEPS + 1))
    assert [entry.step for entry in report.eval_losses] == [0, 10, 20, 24]
    assert report.losses[0].loss == pytest.approx(report.eval_loss_base, abs=0.3)
    assert report.losses[-1].loss < 0.9 * report.losses[0].loss
    assert all(100 << 20 < entry.memory_bytes <= report.peak_memory_bytes for entry in report.losses)
    losses = {entry.step: entry.eval_loss for entry in report.eval_losses}
    assert report.best_step == min(losses, key=lambda step: losses[step])
    assert straight.folder.local(report.files["loss curves"]).read_bytes().startswith(b"\x89PNG")
    epochs = STEPS * 4 / ROWS
    assert sum(entry.tokens for entry in report.losses) == pytest.approx(report.samples.tokens * epochs, rel=0.1)
    # q, k, v, o of width 64 with two of four heads for k and v, gate, up, down of 128: ranks of 8 on both sides, twice
    assert report.trainable_parameters == 2 * 8 * ((64 + 64) * 2 + (64 + 32) * 2 + (64 + 128) * 3)


@pytest.mark.slow
def test_rows_above_the_token_limits_are_counted_in_the_closing_words(
    straight: Output[TrainReport], recipe_of: RecipeOf, split_in: SplitIn, tmp_path: Path
) -> None:
    assert "token limits" not in straight.report.summary
    mean = straight.report.samples.tokens // straight.report.samples.samples
    report = train(recipe_of(max_steps=1, max_length=mean), split_in(tmp_path, ROWS)).report
    assert 0 < report.samples.truncated <= ROWS
    counted = f"{report.samples.truncated} of {ROWS} rows above the token limits (train.overlong: truncate)"
    assert report.summary.endswith(f"tokens/s; {counted}")


def test_the_manifest_is_read_back_as_it_was(straight: Output[TrainReport]) -> None:
    manifest = read_manifest(straight.folder, TrainReport)
    assert manifest and manifest.report == straight.report


def test_the_base_loss_is_the_models_own(
    straight: Output[TrainReport], split: Output[SplitReport], tiny_model: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    rows = rows_of(split, split.report.outputs.test)
    losses, tokens = [], []
    for row in rows:
        prompt = tokenizer.encode(f"<|im_start|>user\n{row['query']}<|im_end|>\n<|im_start|>assistant\n")
        answer = tokenizer.encode(f"{row['response']}<|im_end|>")
        ids = torch.tensor([prompt + answer])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss))
        tokens.append(len(answer))
    three = {
        sum(losses[i] * tokens[i] for i in left) / sum(tokens[i] for i in left)
        for left in ([i for i in range(4) if i != out] for out in range(4))
    }  # three of the four test rows are drawn
    base = straight.report.eval_loss_base
    assert base is not None and min(abs(base - loss) for loss in three) < 1e-5


def test_only_the_last_complete_checkpoints_are_kept_each_rank_with_its_shard(straight: Output[TrainReport]) -> None:
    found = complete_checkpoints(straight.folder.local("checkpoints"))
    assert [step_of(folder) for folder in found] == [20, 24]
    shards = {path.name for path in (found[-1] / "global_step24").iterdir()}
    assert {f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in (0, 1)} <= shards
    assert {"rng_state_0.pth", "rng_state_1.pth"} <= {path.name for path in found[-1].iterdir()}


def test_the_adapter_folder_loads_on_its_base(straight: Output[TrainReport], tiny_model: Path) -> None:
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = straight.folder.local("adapter")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tiny_model)
    assert (
        AutoTokenizer.from_pretrained(folder).chat_template == AutoTokenizer.from_pretrained(tiny_model).chat_template
    )
    weights = load_file(folder / "adapter_model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_model), folder)
    loaded = {name.replace(".default.", "."): value for name, value in model.named_parameters() if "lora_" in name}
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name].float(), weights[name]) for name in weights)


def test_merged_is_base_plus_adapter(straight: Output[TrainReport], tiny_model: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    place = Place(straight.folder.workspace, "merge", "f")
    report = MergeStage(Merge(dtype="float32"), "lora").run(place, MergeInputs(straight))
    assert report.merge_difference < 1e-4 and report.reload_difference == 0 and report.dtype == "float32"
    names = {path.name for path in place.local("model").iterdir()}
    assert {"chat_template.jinja", "generation_config.json", "tokenizer.json", "config.json"} <= names
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        plain = base(input_ids=ids).logits
        adapted = PeftModel.from_pretrained(base, straight.folder.local("adapter")).eval()(input_ids=ids).logits
        merged = AutoModelForCausalLM.from_pretrained(place.local("model"))(input_ids=ids).logits
    assert float((merged - adapted).abs().max()) < 1e-4 < 0.5 < float((merged - plain).abs().max())


@pytest.mark.slow
def test_killed_with_its_process_group_it_goes_on_to_the_same_end(
    straight: Output[TrainReport], recipe_of: RecipeOf, split_in: SplitIn, tmp_path: Path
) -> None:
    split = split_in(tmp_path, ROWS)
    place = place_for(split)
    recipe = recipe_of(**SECTION)
    with (tmp_path / "log").open("wb") as log:
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, str(tmp_path), recipe.model_dump_json()],
            start_new_session=True,
            stdout=log,
            stderr=log,
        )
    checkpoints = place.local("checkpoints")
    try:
        wait_until(lambda: len(complete_checkpoints(checkpoints)) == 2 or driver.poll() is not None, seconds=400)
        family = [driver_process := psutil.Process(driver.pid), *driver_process.children(recursive=True)]
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
    workers = [process for process in family if is_worker(process)]
    wait_until(lambda: not any(process.is_running() and alive(process) for process in workers), seconds=60)
    assert read_manifest(place, TrainReport) is None
    stopped = [step_of(folder) for folder in complete_checkpoints(checkpoints)]
    assert stopped and stopped[-1] < STEPS, (tmp_path / "log").read_text()
    half_written = checkpoints / "checkpoint-23"  # as a crash while saving leaves it
    (half_written / "global_step23").mkdir(parents=True)

    report, undisturbed = train(recipe, split).report, straight.report
    assert report.resumed_at == stopped[-1]
    assert not half_written.exists()
    same = {"loss", "grad_norm", "lr", "tokens", "step"}
    ours, theirs = ([entry.model_dump(include=same) for entry in one.losses] for one in (report, undisturbed))
    assert ours == theirs
    assert report.eval_losses == undisturbed.eval_losses
    assert report.digest == undisturbed.digest


@pytest.mark.slow
def test_a_lost_worker_is_replaced_and_the_end_is_the_same(
    straight: Output[TrainReport], recipe_of: RecipeOf, split_in: SplitIn, tmp_path: Path
) -> None:
    split = split_in(tmp_path, ROWS)
    place = place_for(split)

    def kill_one() -> None:
        wait_until(lambda: len(complete_checkpoints(place.local("checkpoints"))) == 2, seconds=400)
        workers = [process for process in psutil.Process().children(recursive=True) if is_worker(process)]
        workers[0].kill()

    killer = threading.Thread(target=kill_one)
    killer.start()
    report = train(recipe_of(**SECTION), split).report
    killer.join()
    assert report.resumed_at >= 4
    assert [entry.loss for entry in report.losses] == [entry.loss for entry in straight.report.losses]
    assert report.digest == straight.report.digest


@pytest.mark.slow
def test_a_finished_run_that_lost_its_adapter_only_writes_it_again(
    straight: Output[TrainReport], split: Output[SplitReport], recipe_of: RecipeOf
) -> None:
    weights = straight.folder.local("adapter", "adapter_model.safetensors")
    before, entries = weights.read_bytes(), read_journal(straight.folder.local("metrics.jsonl"))
    weights.unlink()
    report = train(recipe_of(**SECTION), split).report
    assert report.resumed_at == STEPS and report.digest == straight.report.digest
    assert weights.read_bytes() == before and read_journal(straight.folder.local("metrics.jsonl")) == entries


@pytest.mark.slow
def test_a_full_fine_tune_leaves_a_model_that_is_merged_and_served(
    ray_cluster: None, recipe_of: RecipeOf, split_in: SplitIn, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    template = CHATML.replace("<|im_end|>\n", "<|im_end|>")
    more = {"chat_template": template, "max_steps": 3}
    recipe = recipe_of(method="full", learning_rate=1e-3, num_workers=[1, 4], **more)
    trained = train(recipe, split_in(tmp_path, ROWS))
    report = trained.report
    assert report.workers == 2  # as many as find room on two processors
    assert report.adapter is None and report.trainable_parameters == report.parameters
    place = Place(trained.folder.workspace, "merge", "m")
    merged = finished(place, MergeStage(Merge(), "full").run(place, MergeInputs(trained)))
    assert merged.report.summary.endswith("of what was trained")
    lineup = lineup_of(recipe)
    assert lineup
    base, tuned = served_models(lineup, trained, merged)
    assert (base.path, tuned.path) == (report.model, str(place.local("model")))
    for folder in (base.path, tuned.path):
        assert AutoTokenizer.from_pretrained(folder).chat_template == template
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (base.path, tuned.path)]
    ids = torch.arange(3, 60)[None]
    with torch.no_grad():
        before, after = (model(input_ids=ids).logits for model in models)
    assert float((before - after).abs().max()) > 0.1


def test_more_workers_than_processors_fail_at_once(
    ray_cluster: None, recipe_of: RecipeOf, split_in: SplitIn, tmp_path: Path
) -> None:
    began = time.monotonic()
    split = split_in(tmp_path, ROWS)
    with pytest.raises(HardwareError, match=r"3 workers.*lacks 3 CPU \(there: 2\).*lower train.num_workers"):
        train(recipe_of(num_workers=3, global_batch_size=3), split)
    with pytest.raises(HardwareError, match=r"2 GPU \(there: 0\)"):
        train(recipe_of(resources_per_worker={"GPU": 1}), split)
    assert time.monotonic() - began < 5


def test_a_length_beyond_the_models_is_refused(
    ray_cluster: None, recipe_of: RecipeOf, split_in: SplitIn, tmp_path: Path
) -> None:
    told = "train.max_length: 513 is more than the 512 tokens"
    assert problems_of(recipe_of(max_length=513)).startswith(told)
    with pytest.raises(RecipeError, match=told):
        train(recipe_of(max_length=513), split_in(tmp_path, ROWS))


def test_a_module_the_model_does_not_have_is_refused(
    ray_cluster: None, recipe_of: RecipeOf, split_in: SplitIn, tmp_path: Path
) -> None:
    split = split_in(tmp_path, ROWS)
    misspelt = recipe_of(lora={"target_modules": ["q_porj", "mlp.up_proj"]})
    told = "train.lora.target_modules: the model has no module 'q_porj'; did you mean 'q_proj'?"
    assert problems_of(misspelt) == told
    with pytest.raises(RecipeError, match=re.escape(told)):
        train(misspelt, split)
    with pytest.raises(RecipeError, match=r"no module of the model matches 'q_porj'; did you mean 'q_proj'\?"):
        train(recipe_of(lora={"target_modules": "q_porj"}), split)


@pytest.mark.slow
def test_a_loss_that_is_no_number_stops_the_run_in_one_message(
    ray_cluster: None, recipe_of: RecipeOf, split_in: SplitIn, tmp_path: Path
) -> None:
    split = split_in(tmp_path, ROWS)
    with pytest.raises(StageError, match=r"at step [2-9].*the checkpoints before it are kept"):
        train(recipe_of(method="full", learning_rate=1e15, max_grad_norm=1e15, warmup_ratio=0, save_steps=1), split)
    assert complete_checkpoints(place_for(split).local("checkpoints"))


def test_only_what_changes_the_result_is_in_the_fingerprint(recipe_of: RecipeOf) -> None:
    def inputs(**section: Any) -> Mapping[str, Any]:
        return train_stage(recipe_of(**section)).fingerprint_inputs()

    assert inputs(num_workers=1, save_steps=7, resources_per_worker={"CPU": 0.5}) == inputs()
    assert inputs(learning_rate=2e-2) != inputs()


def wait_until(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def is_worker(process: psutil.Process) -> bool:
    try:
        return "RayTrainWorker" in " ".join(process.cmdline())
    except psutil.Error:
        return False


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def test_each_held_out_row_is_measured_once(
    recipe_of: RecipeOf, split_of: Callable[[int], Output[SplitReport]], tmp_path: Path
) -> None:
    split = split_of(4)
    section = recipe_of(eval_rows=32).train
    assert section
    assert _held_out_rows(section, split) == 4
    assert _held_out_rows(section.model_copy(update={"eval_rows": 3}), split) == 3
    none = finished_split(Workspace(str(tmp_path / "none")), chats(2), chats(0))
    with pytest.raises(RecipeError, match=r"train.eval_rows: the split left no rows to test on"):
        _held_out_rows(section, none)
