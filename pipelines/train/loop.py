"""What every training worker runs: the Hugging Face Trainer under DeepSpeed, inside a Ray Train worker group.

Nothing here may import torch or deepspeed at the top: the driver imports this module to send it to the workers.
"""

import ctypes
import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.train.attention import NAME as PER_SAMPLE
from pipelines.train.attention import register as register_attention
from pipelines.train.checkpoint import complete_checkpoints, remove_incomplete, step_of
from pipelines.train.journal import rewind
from pipelines.train.models import quiet_transformers
from pipelines.train.samples import Samples, Schedule
from pipelines.train.section import Train
from pipelines.train.tokenize import Tokenized

PR_SET_PDEATHSIG = 1
CHECKPOINTS, JOURNAL, ADAPTER = "checkpoints", "metrics.jsonl", "adapter"


@dataclass(frozen=True)
class Run:
    """Everything a worker has to know; paths are absolute, because workers are started in other folders."""

    section: Train
    seed: int
    steps: int
    model: Path
    folder: Path
    training: Tokenized
    held_out: Tokenized | None


def train_loop(config: dict[str, Any]) -> dict[str, Any]:
    """Train, or go on from the last complete checkpoint, and leave the adapter; returns facts for the report."""
    run: Run = config["run"]
    _prepare_process()
    import torch.distributed as dist
    from transformers import set_seed

    from pipelines.train.adapter import export_adapter

    arguments = _arguments(run)  # before the model: under ZeRO-3 it decides how weights are loaded
    set_seed(run.seed)
    checkpoint = _last_checkpoint(run)
    facts: dict[str, Any] = {"resumed_at": step_of(checkpoint) if checkpoint else 0}
    if facts["resumed_at"] < run.steps:
        trainer = _trainer(run, arguments, resumed=checkpoint is not None)
        facts |= _count_parameters(trainer.model)
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if dist.get_rank() == 0:
        export_adapter(complete_checkpoints(run.folder / CHECKPOINTS)[-1], run.folder / ADAPTER, run.model)
    dist.barrier()
    return facts | {"peak_memory_bytes": _largest_peak(), "dtype": str(arguments_dtype(arguments)).split(".")[-1]}


def _prepare_process() -> None:
    """Tie this worker's life to Ray's, and keep DeepSpeed from compiling what is not used here."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    import torch

    if not torch.cuda.is_available():
        os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.ops

    # a shared-memory all-reduce: gloo does the same without minutes of compiling at the first start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    quiet_transformers()
    register_attention()


def _last_checkpoint(run: Run) -> Path | None:
    """The checkpoint to go on from; rank 0 clears away what lies behind it, before any rank writes."""
    import torch.distributed as dist

    root = run.folder / CHECKPOINTS
    if dist.get_rank() == 0:
        remove_incomplete(root)
        found = complete_checkpoints(root)
        rewind(run.folder / JOURNAL, step_of(found[-1]) if found else None)
    dist.barrier()
    found = complete_checkpoints(root)
    return found[-1] if found else None


def _arguments(run: Run) -> Any:
    import torch
    from transformers import TrainingArguments

    section = run.section
    dtype = _dtype(section.dtype)
    on_cpu = not torch.cuda.is_available()
    accumulation = section.global_batch_size // (section.num_workers * section.per_device_train_batch_size)
    return TrainingArguments(
        output_dir=str(run.folder / CHECKPOINTS),
        max_steps=run.steps,
        per_device_train_batch_size=section.per_device_train_batch_size,
        per_device_eval_batch_size=section.per_device_train_batch_size,
        gradient_accumulation_steps=accumulation,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.lr_scheduler_type,
        warmup_steps=round(section.warmup_ratio * run.steps),
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        optim="adamw_torch",
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        activation_checkpointing=section.gradient_checkpointing,
        deepspeed=_deepspeed(section.zero_stage, dtype),
        seed=run.seed,
        logging_strategy="steps",
        logging_steps=section.logging_steps,
        logging_nan_inf_filter=False,
        eval_strategy="steps" if run.held_out else "no",
        eval_steps=section.eval_steps,
        save_strategy="steps",
        save_steps=section.save_steps,
        save_total_limit=None,  # ours counts complete checkpoints only
        dataloader_pin_memory=not on_cpu,
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        use_cpu=on_cpu,
    )


def _dtype(wanted: str) -> str:
    """The dtype to compute in. `auto`: bfloat16 where every worker's processor multiplies it natively."""
    if wanted != "auto":
        return wanted
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported()
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    everywhere = torch.tensor(int(native), device="cuda" if torch.cuda.is_available() else "cpu")
    dist.all_reduce(everywhere, dist.ReduceOp.MIN)
    return "bfloat16" if everywhere else "float32"


def arguments_dtype(arguments: Any) -> Any:
    """The torch dtype that training arguments stand for."""
    import torch

    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def _deepspeed(stage: int, dtype: str) -> dict[str, Any]:
    """DeepSpeed's configuration; what is `auto` comes from the training arguments. The optimizer is torch's."""
    return {
        "zero_optimization": {"stage": stage, "stage3_gather_16bit_weights_on_model_save": True},
        "bf16": {"enabled": dtype == "bfloat16"},
        "fp16": {"enabled": dtype == "float16"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def _trainer(run: Run, arguments: Any, resumed: bool) -> Any:
    from transformers import PrinterCallback

    from pipelines.train.trainer import ChatTrainer, Recorder

    arguments.eval_on_start = run.held_out is not None and not resumed
    recorder = Recorder(run.folder / JOURNAL, run.section.save_total_limit)
    trainer = ChatTrainer(
        model=_model(run, arguments),
        args=arguments,
        train_dataset=_schedule(run),
        held_out=Samples(run.held_out) if run.held_out else None,
        callbacks=[recorder],
    )
    recorder.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # the driver shows the journal
    return trainer


def _schedule(run: Run) -> Schedule:
    section = run.section
    packed_to = section.max_length if section.packing else None
    return Schedule(Samples(run.training), run.seed, run.steps * section.global_batch_size, packed_to)


def _model(run: Run, arguments: Any) -> Any:
    """The base model with a new adapter on it."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(
        run.model,
        dtype=arguments_dtype(arguments),
        attn_implementation="sdpa" if torch.cuda.is_available() else PER_SAMPLE,
    )
    lora = run.section.lora
    config_class: Any = LoraConfig  # peft types alpha as int, and takes a float
    config = config_class(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=lora.target_modules,
        task_type="CAUSAL_LM",
    )
    if run.section.gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(model, config)


def _count_parameters(model: Any) -> dict[str, int]:
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return {"parameters": sum(n for n, _ in sizes), "trainable_parameters": sum(n for n, trains in sizes if trains)}


def _largest_peak() -> int:
    """The most resident memory any worker had, bytes."""
    import torch
    import torch.distributed as dist

    device = "cuda" if torch.cuda.is_available() else "cpu"
    peak = torch.tensor(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, device=device)
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)
