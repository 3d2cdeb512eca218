"""The Hugging Face Trainer, as far as it has to differ: loss per token over all ranks, held-out loss, checkpoints.

Imported in training workers only: it needs torch and transformers, which take seconds to load.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.functional import cross_entropy
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import unwrap_peft_model

from pipelines.errors import StageError
from pipelines.train.checkpoint import PREFIX, mark_complete, remove_oldest, step_of
from pipelines.train.checkpoint_upload import CheckpointUpload
from pipelines.train.curves import draw, draw_losses
from pipelines.train.deepspeed_patches import forget_trial_step, keep_norm
from pipelines.train.flops import Flops, flops_of
from pipelines.train.journal import BY_ROW, append, best_step, read_journal
from pipelines.train.nodes import is_first_of_node, saved_checkpoints, store_checkpoint, store_journals
from pipelines.train.oom import peak_memory
from pipelines.train.preemption import PreemptionNotice
from pipelines.train.run import Run
from pipelines.train.samples import BOUNDS, Samples, collate
from pipelines.train.sampling import sample
from pipelines.train.sequence import own_part, sequence_group

Batch = dict[str, Any]

STORE_SECONDS = 3.0
"""Between two times that the journals are stored, where the driver does not see them here."""


class ChatTrainer(Trainer):
    """Trains on packed rows; every loss is a mean over the tokens that have one, on all ranks together."""

    def __init__(
        self, *, held_out: Samples | None, predict: Callable[[Any], dict[str, float]] | None = None, **arguments: Any
    ) -> None:
        """`predict`: gives scores of the model's answers, which are logged with the held-out loss."""
        super().__init__(eval_dataset=held_out, **arguments)
        self.predict_scores = predict
        self.loss_is_scaled_for_ga = True  # `training_loss` divides by the tokens of the whole step
        self.model_accepts_loss_kwargs = False  # the loss is ours, not the model's
        base: Any = unwrap_peft_model(self.model)
        by_liger = base.forward.__module__.startswith("liger_kernel.")
        # liger reads the output matrix itself, so it would leave out an adapter on it, whatever pattern put it there
        self.fused = by_liger and type(base.get_output_embeddings()) is torch.nn.Linear
        self.since = time.monotonic()
        self.held_out_losses: list[float] = []  # of each held-out sample, at the last evaluation
        self.tokens_seen = torch.zeros(2, dtype=torch.int64)  # all, with loss: since the last entry in the journal

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        schedule: Any = self.train_dataset
        return SequentialSampler(schedule)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], Any]:
        """The micro-batches of one optimizer step, and how many of their tokens have loss, over all ranks."""
        if not self.tokens_seen.any():  # the clock stands still while evaluating and saving
            self.since = time.monotonic()
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        counts = [[batch["input_ids"].numel(), batch["targets"].numel()] for batch in batches]
        seen = torch.tensor(counts, device=device).sum(dim=0)
        dist.all_reduce(seen)
        self.tokens_seen += seen.cpu()
        return batches, seen[1]

    def compute_loss(
        self, model: Any, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """This rank's share of the step's mean loss, times the ranks, because DeepSpeed averages over them."""
        loss = summed_loss(model, inputs, self.fused) / num_items_in_batch * dist.get_world_size()
        if not torch.isfinite(loss):
            raise _not_finite("loss", float(loss), self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        parent: Any = super()
        norm = parent._get_grad_norm(model, grad_norm)
        if norm is not None and not math.isfinite(norm) and not self.args.fp16:  # fp16 skips such steps by itself
            raise _not_finite("gradient norm", float(norm), self.state.global_step + 1)
        return norm

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Mean loss per token over the held-out samples; every rank does the same number of forward passes."""
        size, shared = self.args.per_device_eval_batch_size, sequence_group().size
        groups, group = dist.get_world_size() // shared, dist.get_rank() // shared
        samples: Any = self.eval_dataset
        sums = torch.zeros(2, len(samples), dtype=torch.float64, device=self.args.device)  # losses, tokens
        model = self.model_wrapped
        model.eval()
        collate_rows: Any = self.data_collator
        for begin in range(0, len(samples), size * groups):
            mine = begin + group * size
            places = range(mine, min(mine + size, len(samples)))
            batch = self._prepare_inputs(collate_rows([[samples[place] for place in places or [0]]]))
            with torch.no_grad():
                losses = _losses(model, batch).double()
            if places:  # ZeRO-3 needs every rank in every pass, also one that has no samples left
                sums.index_add_(1, batch["owners"] + mine, torch.stack([losses, torch.ones_like(losses)]))
        dist.all_reduce(sums)
        self.held_out_losses = (sums[0] / sums[1]).tolist()
        total, tokens = sums.sum(dim=1).tolist()
        metrics = {f"{metric_key_prefix}_loss": total / tokens}
        scores = self.predict_scores(self.model) if self.predict_scores else {}
        metrics |= {f"{metric_key_prefix}_{name}": score for name, score in scores.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def floating_point_ops(self, inputs: Any) -> int:
        """Not counted: it walks over all parameters in each step."""
        return 0


class Recorder(TrainerCallback):
    """Keeps the journal and completes checkpoints, on rank 0 for all ranks."""

    def __init__(self, run: Run, begun: Callable[[], None], notice: PreemptionNotice) -> None:
        self.run = run
        self.begun = begun  # called when model and optimizer are there
        self.notice = notice
        self.trainer: ChatTrainer | None = None
        self.flops: Flops | None = None
        self.stored = time.monotonic()  # the journals, where the driver does not see them
        copies = run.section.checkpoint_copies
        self.upload = CheckpointUpload(run, copies, dist.get_rank(), dist.get_world_size()) if copies else None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The engine is there now; the base model's answers come first."""
        self.begun()
        if torch.cuda.is_available():
            section, name = self.run.section, torch.cuda.get_device_name()
            self.flops = flops_of(section, self.run.model, name, dist.get_world_size())
        assert self.trainer is not None
        keep_norm(self.trainer.deepspeed)
        if state.global_step == 0:
            forget_trial_step(self.trainer.deepspeed)
            self._sample(0)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """The last step is always evaluated, saved and sampled; one after which all leave is saved."""
        last = state.global_step >= state.max_steps
        if last or state.global_step % self.run.section.sample_steps == 0:
            self._sample(state.global_step)
        if last:
            control.should_evaluate = args.eval_strategy != "no"
        if last or self.notice.given():
            control.should_save = control.should_log = control.should_training_stop = True

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Write one entry to the journal."""
        entry: dict[str, Any] = {"step": state.global_step}
        if "eval_loss" in logs:
            assert self.trainer is not None
            entry[BY_ROW] = self.trainer.held_out_losses
            entry |= {name: value for name, value in logs.items() if name.startswith("eval_")}
        elif "loss" in logs:
            assert self.trainer is not None
            tokens, loss_tokens = self.trainer.tokens_seen.tolist()
            self.trainer.tokens_seen.zero_()
            entry |= {"loss": logs["loss"], "grad_norm": logs.get("grad_norm"), "lr": logs["learning_rate"]}
            seconds = time.monotonic() - self.trainer.since
            entry |= {"tokens": tokens, "loss_tokens": loss_tokens, "seconds": seconds, "memory_bytes": peak_memory()}
            if self.flops is not None:
                entry["mfu"] = self.flops.share(tokens, loss_tokens, seconds)
        else:
            return
        if state.is_world_process_zero:
            append(self.run.journal, entry)
            draw(self.run.curves, entry)
            if time.monotonic() - self.stored >= STORE_SECONDS:
                self.stored = time.monotonic()
                store_journals(self.run)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Complete the checkpoint once all ranks have written theirs, then delete the oldest."""
        if self.upload:
            self.upload.finish()  # what is deleted below may be what is copied
        dist.barrier()
        root, section = self.run.checkpoints, self.run.section
        checkpoint, best = root / f"{PREFIX}{state.global_step}", None
        if is_first_of_node(self.run):
            mark_complete(checkpoint)
        if state.is_world_process_zero:
            entries = read_journal(self.run.journal)
            draw_losses(self.run.picture, entries)
            saved = (*map(step_of, saved_checkpoints(self.run)), state.global_step)
            best = best_step(entries, saved) if section.load_best_model_at_end else None
        if self.run.spread is not None:
            store_checkpoint(self.run, checkpoint, best)
        if is_first_of_node(self.run):
            remove_oldest(root, section.save_total_limit, best)
        dist.barrier()
        if self.upload:
            self.upload.begin(root / f"{PREFIX}{state.global_step}")

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Nothing ends before the last checkpoint is copied."""
        if self.upload:
            self.upload.finish()

    def _sample(self, step: int) -> None:
        if self.run.section.evaluation_inputs:
            assert self.trainer is not None
            sample(self.run, self.trainer.model, step)


def batch_of(rows: Any, *, one_sample: bool) -> Batch:
    """This rank's part of some rows; `one_sample`: without bounds, which layers that carry a state may not take."""
    batch = own_part(collate(rows))
    return {name: value for name, value in batch.items() if not (one_sample and name in BOUNDS)}


def _losses(model: Any, batch: Batch) -> torch.Tensor:
    """Cross entropy of each of the batch's targets, in float32; logits are computed where there is a target only."""
    logits = model(**_inputs(batch), use_cache=False).logits[0]
    return cross_entropy(logits.float(), batch["targets"], reduction="none")


def summed_loss(model: Any, batch: Batch, fused: bool) -> torch.Tensor:
    """The sum of the losses. `fused`: by liger's kernel, which never holds the logits of all targets at once."""
    if not fused:
        return _losses(model, batch).sum()
    targets = batch["targets"][None]
    output = model(**_inputs(batch), use_cache=False, shift_labels=targets, num_items_in_batch=1, skip_logits=True)
    loss: torch.Tensor = output.loss
    return loss


def _inputs(batch: Batch) -> Batch:
    return {name: value for name, value in batch.items() if name not in ("targets", "owners")}


def _not_finite(what: str, value: float, step: int) -> StageError:
    return StageError(
        f"training: {what} is {value} at step {step}; the checkpoints before it are kept. "
        "Lower train.learning_rate, raise train.warmup_ratio, or use bfloat16 instead of float16"
    )
