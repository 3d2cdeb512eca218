"""One fine-tuning run with another trainer, on rows that are tokens already; run by the peer's own Python.

    python train_peer.py --trainer dynamic|flat|maximum|trl --rows rows.jsonl --model FOLDER … --result result.json

`dynamic` and `maximum`: transformers' Trainer, rows padded to the longest of the batch or to `--max-length`; `flat`:
the same with its own collator for training without padding. `trl`: SFTTrainer. Needs torch, transformers and peft;
`trl` needs trl. It imports nothing of this project, so that it runs in an environment of its own. The rows are taken
in the order of the file.
"""

import argparse
import json
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

IGNORE_INDEX = -100


def main() -> None:
    """Train and write what was measured as one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--trainer", choices=["dynamic", "flat", "maximum", "trl"], required=True)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--result", type=Path, required=True)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--max-length", type=int, required=True)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], required=True)
    parser.add_argument("--learning-rate", type=float, required=True)
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--liger", action="store_true")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    rows = [json.loads(line) for line in options.rows.open(encoding="utf-8")]
    timed = Timed()
    trainer = (_sft if options.trainer == "trl" else _plain)(options, rows)
    trainer.add_callback(timed)
    step = trainer.training_step
    trainer.training_step = lambda model, inputs, *rest: step(model, timed.counted(inputs), *rest)
    trainer.train()
    timed.losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    options.result.write_text(json.dumps(timed.result()), encoding="utf-8")


class Timed(TrainerCallback):
    """Seconds, tokens that are not padding, tokens with loss, and all tokens, of each step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.counts: list[list[int]] = []
        self.losses: list[float] = []
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        """The clock starts at the first micro-batch."""
        _synchronize()
        self.began = time.monotonic()
        self.counts.append([0, 0, 0])

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """And stops behind the optimizer."""
        _synchronize()
        self.seconds.append(time.monotonic() - self.began)

    def counted(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch as it is, after its tokens were counted."""
        every = batch["input_ids"].numel()
        real = int(batch["attention_mask"].sum()) if "attention_mask" in batch else every
        self.counts[-1] = [real, int((batch["labels"][:, 1:] != IGNORE_INDEX).sum()), every]
        return batch

    def result(self) -> dict[str, Any]:
        """One list entry per step, and the process's peak memory in bytes."""
        steps = [
            {"seconds": seconds, "tokens": real, "loss_tokens": with_loss, "padded_tokens": every}
            for seconds, (real, with_loss, every) in zip(self.seconds, self.counts, strict=True)
        ]
        device = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"steps": steps, "losses": self.losses, "peak_bytes": resident, "peak_device_bytes": device}


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _arguments(options: argparse.Namespace) -> dict[str, Any]:
    """What both trainers are given, as the project's own run has it."""
    on_cpu = not torch.cuda.is_available()
    return {
        "output_dir": str(options.result.with_suffix("")),
        "max_steps": options.steps,
        "per_device_train_batch_size": options.batch,
        "learning_rate": options.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "optim": "adamw_torch",
        "bf16": options.dtype == "bfloat16" and not on_cpu,
        "gradient_checkpointing": False,
        "use_liger_kernel": options.liger,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "dataloader_pin_memory": not on_cpu,
        "use_cpu": on_cpu,
        "seed": 42,
    }


def _model(options: argparse.Namespace) -> Any:
    return AutoModelForCausalLM.from_pretrained(
        options.model, dtype=getattr(torch, options.dtype), attn_implementation="sdpa"
    )


def _lora(options: argparse.Namespace) -> LoraConfig:
    return LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _plain(options: argparse.Namespace, rows: list[dict[str, list[int]]]) -> Any:
    model = get_peft_model(_model(options), _lora(options))
    pad_to = options.max_length if options.trainer == "maximum" else None
    collate = DataCollatorWithFlattening() if options.trainer == "flat" else partial(_padded, pad_to=pad_to)
    arguments = TrainingArguments(**_arguments(options), remove_unused_columns=False)
    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate)


def _padded(batch: list[dict[str, list[int]]], pad_to: int | None) -> dict[str, torch.Tensor]:
    length = pad_to or max(len(row["input_ids"]) for row in batch)

    def filled(rows: list[list[int]], filler: int) -> torch.Tensor:
        return torch.tensor([row + [filler] * (length - len(row)) for row in rows])

    return {
        "input_ids": filled([row["input_ids"] for row in batch], 0),
        "labels": filled([row["labels"] for row in batch], IGNORE_INDEX),
        "attention_mask": filled([[1] * len(row["input_ids"]) for row in batch], 0),
    }


def _sft(options: argparse.Namespace, rows: list[dict[str, list[int]]]) -> Any:
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer

    library: Any = trl
    arguments = library.SFTConfig(**_arguments(options), max_length=options.max_length)
    return library.SFTTrainer(
        model=_model(options),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(options.model),
        peft_config=_lora(options),
    )


if __name__ == "__main__":
    main()
