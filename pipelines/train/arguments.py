"""A recipe's train section as arguments of transformers' Trainer and configuration of DeepSpeed."""

from importlib.util import find_spec
from typing import Any

from pipelines.train.memory import BUCKET
from pipelines.train.run import Run


def training_arguments(run: Run, universal: bool) -> Any:
    """The Trainer's arguments; `universal`: the checkpoint to resume from is in DeepSpeed's universal format."""
    import torch
    from transformers import TrainingArguments

    section = run.section
    dtype = _dtype(section.dtype)
    on_cpu = not torch.cuda.is_available()
    rows = section.num_workers // section.sequence_parallel_size * section.per_device_train_batch_size
    return TrainingArguments(
        output_dir=str(run.checkpoints),
        max_steps=run.steps,
        per_device_train_batch_size=section.per_device_train_batch_size,
        per_device_eval_batch_size=section.per_device_train_batch_size,
        gradient_accumulation_steps=section.global_batch_size // rows,
        learning_rate=section.learning_rate,
        lr_scheduler_type=section.lr_scheduler_type,
        warmup_steps=round(section.warmup_ratio * run.steps),
        weight_decay=section.weight_decay,
        max_grad_norm=section.max_grad_norm,
        optim="adamw_torch",
        bf16=dtype == "bfloat16",
        fp16=dtype == "float16",
        use_liger_kernel=not on_cpu and find_spec("liger_kernel") is not None,
        # ZeRO-3 gathers the output matrix for its own module only, and the fused loss goes around that
        liger_kernel_config={"cross_entropy": False, "fused_linear_cross_entropy": run.zero_stage != 3},
        activation_checkpointing=section.gradient_checkpointing,
        deepspeed=_deepspeed(run.zero_stage, dtype, universal, section.offload_optimizer),
        neftune_noise_alpha=section.neftune_noise_alpha,
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
        report_to=[name for name in section.report_to if name != "swanlab"],  # which brings its own; see loop.py
        run_name=run.folder.parents[1].name,
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


def dtype_of(arguments: Any) -> Any:
    """The torch dtype that training arguments stand for."""
    import torch

    return torch.bfloat16 if arguments.bf16 else torch.float16 if arguments.fp16 else torch.float32


def _deepspeed(stage: int, dtype: str, universal: bool, offload: bool) -> dict[str, Any]:
    """DeepSpeed's configuration; what is `auto` comes from the training arguments. The optimizer is torch's."""
    import torch

    return {
        "zero_optimization": {
            "stage": stage,
            **({"offload_optimizer": {"device": "cpu", "pin_memory": torch.cuda.is_available()}} if offload else {}),
            "reduce_bucket_size": BUCKET,
            "stage3_gather_16bit_weights_on_model_save": True,
        },
        # the trainer looks at the gradient norm itself; DeepSpeed would wait for the device at every parameter
        "bf16": {"enabled": dtype == "bfloat16", "check_grad_overflow": False},
        "fp16": {"enabled": dtype == "float16"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "train_batch_size": "auto",
        "gradient_clipping": "auto",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
    }
