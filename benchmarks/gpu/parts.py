"""The parts by name, and how one is run: in a process of its own, which is forked where torch is loaded already.

Loading torch, transformers and peft takes longer than what most parts then do with a tiny model.
"""

import json
import os
import signal
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from benchmarks.gpu import engines, kernels, machine, profile, training
from benchmarks.gpu.setting import Figures, MissingPackageError, Setting
from rayjobs.cluster import end_on_sigterm

PART_SECONDS = 180.0
END_SECONDS = 20.0
"""What a part that is stopped may take to stop what it has started."""
LOADED = (
    "rayjobs.cli",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.qwen2.modeling_qwen2",
    "peft",
)
"""Modules that most parts need, left out where they are not installed; none starts CUDA or threads as it is loaded."""
LOADED_DRY = ("pipelines.train.trainer", "deepspeed")
"""Besides in a dry run, where there is no CUDA to start."""


@dataclass(frozen=True)
class Part:
    """What is measured: in words, and by which function."""

    title: str
    run: Callable[[Setting], Figures]


PARTS = {
    "machine": Part("what is there", machine.describe),
    "tests": Part("pytest -m gpu", machine.gpu_tests),
    "kernels": Part("packed attention and fused loss against float32", kernels.against_references),
    "lora-zero0": Part("LoRA r 16 of 7B, packed 4096, ZeRO-0", training.lora_zero0),
    "lora-zero2": Part("the same, ZeRO-2", training.lora_zero2),
    "bare-loop": Part("a bare loop of the same model: the ceiling", training.bare_loop),
    "trainer": Part("transformers' Trainer with liger", training.trainer),
    "trl": Part("TRL with liger", training.trl),
    "profile": Part("where the time of one step goes", profile.one_step),
    "full": Part("full fine-tuning of 3B", training.full),
    "qlora": Part("QLoRA (NF4) of 7B", training.qlora),
    "float16": Part("LoRA of 3B in float16", training.float16),
    "offload": Part("full fine-tuning of 3B, optimizer on the CPU", training.offload),
    "batch": Part("base and adapter in one batch equal each alone, by engines in turn", engines.batch),
    "endpoint": Part("the endpoint beside raw vLLM, 1.5B", engines.endpoint_beside_vllm),
}
"""In the order in which they run: what others need first."""


@dataclass(frozen=True)
class Ended:
    """How a part ended: what it found if it did, what it said, its exit code; None where it was stopped."""

    figures: Figures | None
    output: str
    code: int | None


def seconds_of(setting: Setting) -> float:
    """The longest that a part may take; a part of a dry run shares two slow cores with others."""
    return PART_SECONDS * (2 if setting.dry else 1)


def run_part(setting: Setting, name: str) -> Ended:
    """Run a part, for `seconds_of` the setting at most; what it says is in FOLDER/NAME.log."""
    log, found = (setting.folder / f"{name}.{kind}" for kind in ("log", "json"))
    found.unlink(missing_ok=True)
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__, *LOADED, *(LOADED_DRY if setting.dry else ())])
    process = context.Process(target=_work, args=(setting, name, log, found))
    process.start()
    process.join(seconds_of(setting))
    stopped = process.is_alive()
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.is_alive():
            with suppress(ProcessLookupError):
                os.killpg(process.pid or 0, number)
            process.join(END_SECONDS)
    output = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    figures = json.loads(found.read_text(encoding="utf-8")) if found.is_file() and not process.exitcode else None
    return Ended(figures, output, None if stopped else process.exitcode)


def _work(setting: Setting, name: str, log: Path, found: Path) -> None:
    """In the part's own process: the leader of a group, so that all that it starts can be stopped with it."""
    os.setsid()
    with log.open("w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    end_on_sigterm()
    try:
        figures = PARTS[name].run(setting)
    except MissingPackageError as missing:
        figures = {"missing": str(missing)}
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
    found.write_text(json.dumps(figures), encoding="utf-8")
