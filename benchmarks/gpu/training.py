"""Training through `danlu train` itself, beside other trainers and a bare loop of the same model."""

import fcntl
import math
import os
import pickle
import runpy
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml

from benchmarks import train as beside
from benchmarks.gpu.setting import SEED, Figures, Setting, need
from pipelines.artifacts import shards
from pipelines.artifacts.reports.train import TrainReport
from pipelines.artifacts.workspace import Workspace
from pipelines.recipe.train import Train
from pipelines.train.flops import flops_of
from pipelines.train.memory import estimate, shapes_of
from pipelines.train.run import Preempted, Run, WorkerFacts
from pipelines.train.worker_group import Loop
from rayjobs.cli import app

RANK = 16
STEPS, FEW_STEPS = 12, 4
WARM_UP = 2
"""Steps at the beginning that are left out: kernels are chosen and memory is taken then."""


def lora_zero0(setting: Setting) -> Figures:
    """LoRA on all linear layers of the 7B, packed to 4096, without ZeRO."""
    return _ours(setting, "lora-zero0", "7b", STEPS, {"zero_stage": 0})


def lora_zero2(setting: Setting) -> Figures:
    """The same with ZeRO-2."""
    return _ours(setting, "lora-zero2", "7b", STEPS, {"zero_stage": 2})


def full(setting: Setting) -> Figures:
    """All weights of the 3B."""
    return _ours(setting, "full", "3b", FEW_STEPS, {"method": "full", "zero_stage": 2})


def qlora(setting: Setting) -> Figures:
    """An adapter on the 7B in 4 bits."""
    need("bitsandbytes")
    return _ours(setting, "qlora", "7b", FEW_STEPS, {"method": "qlora", "zero_stage": 2})


def float16(setting: Setting) -> Figures:
    """LoRA of the 3B in float16, with its loss scaling; on a CPU, which has none, in float32."""
    return _ours(
        setting, "float16", "3b", FEW_STEPS, {"zero_stage": 2, **({} if setting.dry else {"dtype": "float16"})}
    )


def offload(setting: Setting) -> Figures:
    """All weights of the 3B with the optimizer in main memory."""
    return _ours(setting, "offload", "3b", FEW_STEPS, {"method": "full", "zero_stage": 2, "offload_optimizer": True})


def section_of(setting: Setting, size: str, steps: int, changed: dict[str, Any]) -> dict[str, Any]:
    """The recipe's section `train` of a part."""
    return {
        "model": str(setting.model(size)),
        "num_workers": 1,
        "resources_per_worker": {"CPU": 1} if setting.dry else {"GPU": 1, "CPU": 1},
        "lora": {"r": RANK, "lora_alpha": 2 * RANK, "target_modules": "all-linear"},
        "dtype": "float32" if setting.dry else "bfloat16",
        "packing": True,
        "max_length": 256 if setting.dry else 4096,
        "per_device_train_batch_size": 2,
        "global_batch_size": 2,
        "learning_rate": 1e-3 if setting.dry else 1e-4,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0.0,
        "max_steps": WARM_UP + 2 if setting.dry else WARM_UP + steps,
        "num_train_epochs": 100,
        **changed,
    }


def _ours(setting: Setting, name: str, size: str, steps: int, changed: dict[str, Any]) -> Figures:
    """`danlu train` in a workspace of its own; RuntimeError where losses are not finite or do not fall."""
    section = section_of(setting, size, steps, changed)
    workspace = setting.folder / "runs" / name
    with _alone(setting) if name == "lora-zero0" else _in_this_process() if setting.dry else nullcontext():
        shutil.rmtree(workspace, ignore_errors=True)  # what an earlier run of this part has trained
        report = _train(setting, name, section, workspace)
    losses = [step.loss for step in report.losses]
    if not all(map(math.isfinite, losses)):
        raise RuntimeError(f"losses that are not finite: {losses}")
    if not statistics.mean(losses[-2:]) < statistics.mean(losses[:2]):
        raise RuntimeError(f"losses that do not fall: {losses}")
    measured = report.losses[WARM_UP:]
    tokens, loss_tokens = (sum(getattr(step, kind) for step in measured) for kind in ("tokens", "loss_tokens"))
    seconds = sum(step.seconds for step in measured)
    found: Figures = {"tokens/s": round(tokens / seconds, 1), "loss": [losses[0], losses[-1]]}
    found["peak GiB"] = round((report.peak_device_memory_bytes or report.peak_memory_bytes) / 2**30, 2)
    if guessed := _estimated(Train.model_validate(section), setting.model(size)):
        found["estimated GiB"] = round(guessed / 2**30, 2)
    if (share := _share(setting, section, size, tokens, loss_tokens, seconds)) is not None:
        found["share of peak"] = share
    return found


@contextmanager
def _in_this_process() -> Iterator[None]:
    """Tokenize and train here, and not in workers of Ray.

    A dry run does so in all parts but one, `lora-zero0`: workers take half a minute on two cores to load what this
    process has loaded already.
    """
    with patch.object(shards, "_run", _shards_here), patch("pipelines.train.stage.run_workers", _one_worker):
        yield


def _shards_here(
    workspace: Workspace, folder: str, pending: list[shards.Shard], work: shards.Work, *_: int | str | None, done: int
) -> None:
    for shard in pending:
        if error := shards._attempt(workspace, folder, f"{shard['index']:05d}", shard, work):
            raise pickle.loads(error)  # made a line above


def _one_worker(loop: Loop, run: Run) -> WorkerFacts | Preempted:
    import torch
    import torch.distributed

    dist: Any = torch.distributed  # its types lack HashStore
    torch.set_num_threads(1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")  # as Ray Train does for its workers
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return loop(run, lambda: None)


@contextmanager
def _alone(setting: Setting) -> Iterator[None]:
    """While this is open no other part makes the workspace that the peers take their rows from."""
    with (setting.folder / ".rows").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        yield


def _train(setting: Setting, name: str, section: dict[str, Any], workspace: Path) -> TrainReport:
    recipe = write_recipe(setting, name, section)
    ready = setting.folder / "runs" / "rows"
    with (setting.folder / ".split").open("w") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)  # the first part makes what all begin with
        # in this process, which has loaded what it needs
        app(["split", str(recipe), "--workspace", str(ready)], standalone_mode=False)
    shutil.copytree(ready, workspace)
    app(["train", str(recipe), "--workspace", str(workspace)], standalone_mode=False)
    return beside.report_of(workspace)


def write_recipe(setting: Setting, name: str, section: dict[str, Any]) -> Path:
    """The recipe of a part: the rows that all parts train on, and the part's own section `train`."""
    path = setting.folder / f"{name}.yaml"
    content = {
        "name": name,
        "seed": SEED,
        "ingest": {"source": str(setting.rows())},
        "split": {"test_ratio": 0.02},
        "train": section,
    }
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def _estimated(section: Train, model: Path) -> int | None:
    """What `zero_stage: auto` and `danlu check` expect of one worker, bytes."""
    shapes = shapes_of(model)
    stage = section.zero_stage if isinstance(section.zero_stage, int) else 0
    return estimate(section, shapes, stage).total if shapes else None


def _share(
    setting: Setting, section: dict[str, Any], size: str, tokens: int, loss_tokens: int, seconds: float
) -> float | None:
    """Of the device's peak; None on a CPU, and on cards whose peak is not known."""
    import torch

    if not torch.cuda.is_available():
        return None
    flops = flops_of(Train.model_validate(section), setting.model(size), torch.cuda.get_device_name(), 1)
    return round(flops.share(tokens, loss_tokens, seconds), 4) if flops else None


def trainer(setting: Setting) -> Figures:
    """transformers' Trainer on the same rows, without padding between them."""
    if not setting.dry:
        need("liger_kernel")
    return _peer(setting, sys.executable, "flat")


def trl(setting: Setting) -> Figures:
    """TRL's SFTTrainer on the same rows; in a dry run, where TRL need not be installed, the Trainer again."""
    if setting.peer_python is None and not setting.dry:
        need("trl", "liger_kernel")
    return _peer(setting, setting.peer_python or sys.executable, "dynamic" if setting.dry else "trl")


def _peer(setting: Setting, python: str, kind: str) -> Figures:
    """One run of another trainer, over the rows that `lora-zero0` has tokenized."""
    section = section_of(setting, "7b", STEPS, {"zero_stage": 0})
    steps, batch = (WARM_UP + 2, 8) if setting.dry else (WARM_UP + STEPS, 16)
    workspace = setting.folder / "runs" / "lora-zero0"
    with _alone(setting):
        if not list(workspace.glob("train/*/manifest.json")):
            _train(setting, "lora-zero0", section, workspace)
    common = beside.Setting(
        device="cpu" if setting.dry else "cuda",
        model=section["model"],
        dtype=section["dtype"],
        max_length=section["max_length"],
        batch=batch,
        steps=steps,
        rank=RANK,
        threads=1 if setting.dry else None,
    )
    rows = beside.export_rows(workspace, common)
    liger = [] if setting.dry else ["--liger"]
    with patch.object(beside, "call", _call_here) if setting.dry else nullcontext():
        result = beside.run_peer(common, rows, setting.folder / f"{kind}.json", python, ["--trainer", kind, *liger])
    found: Figures = {"tokens/s": round(result.rate, 1), "peak GiB": round(result.peak_bytes / 2**30, 2)}
    share = _share(setting, section, "7b", result.tokens, result.loss_tokens, result.seconds)
    return found | ({"share of peak": share} if share is not None else {})


def _call_here(command: list[str]) -> None:
    """Run the peer's program in this process, which has loaded what it needs."""
    with patch.object(sys, "argv", command[1:]):
        runpy.run_path(command[1], run_name="__main__")


def bare_loop(setting: Setting) -> Figures:
    """The same model and batches in a loop of a dozen lines: no Ray, no DeepSpeed, no Trainer."""
    import torch

    model, batches, device = loop_of(setting)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=device == "cuda")
    seconds = []
    for batch in batches:
        begin = _now(device)
        step(model, batch, optimizer)
        seconds.append(_now(device) - begin)
    tokens = sum(batch["input_ids"].numel() for batch in batches[WARM_UP:])
    loss_tokens = sum(len(batch["targets"]) for batch in batches[WARM_UP:])
    spent = sum(seconds[WARM_UP:])
    found: Figures = {"tokens/s": round(tokens / spent, 1)}
    section = section_of(setting, "7b", STEPS, {"zero_stage": 0})
    share = _share(setting, section, "7b", tokens, loss_tokens, spent)
    return found | ({"share of peak": share} if share is not None else {})


def loop_of(setting: Setting) -> tuple[Any, list[dict[str, Any]], str]:
    """The model of `lora-zero0` as a worker prepares it, packed batches of random tokens, and their device."""
    import numpy as np
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    # here, because torch stands behind them
    from pipelines.train.attention import NAME, register
    from pipelines.train.fused_lora import fuse
    from pipelines.train.samples import collate

    register()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    section = section_of(setting, "7b", STEPS, {"zero_stage": 0})
    if device == "cuda":
        from liger_kernel.transformers import apply_liger_kernel_to_qwen2

        apply_liger_kernel_to_qwen2()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        section["model"], dtype=getattr(torch, section["dtype"]), attn_implementation=NAME
    )
    config: Any = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model: Any = get_peft_model(loaded.to(device), config)
    fuse(model)
    model.train()
    draw = np.random.default_rng(SEED)
    length = section["max_length"]

    def row() -> list[Any]:
        cuts = [length // 4, length // 4, length // 2]
        tokens = [draw.integers(3, 250, cut).astype(np.int32) for cut in cuts]
        return [(sample, sample.copy()) for sample in tokens]

    batches = []
    for _ in range(section["max_steps"]):
        batch = collate([row() for _ in range(section["per_device_train_batch_size"])])
        batches.append({k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()})
    return model, batches, device


def step(model: Any, batch: dict[str, Any], optimizer: Any) -> None:
    """One optimizer step."""
    from pipelines.train.trainer import summed_loss  # torch stands behind it

    loss = summed_loss(model, batch, fused=batch["input_ids"].is_cuda) / len(batch["targets"])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _now(device: str) -> float:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.monotonic()
