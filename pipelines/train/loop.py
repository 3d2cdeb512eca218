"""What every training worker runs: the Hugging Face Trainer under DeepSpeed, inside a Ray Train worker group.

Nothing here may import torch or deepspeed at the top: the driver imports this module to send it to the workers.
"""

import os
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.kill_with_parent import arm
from pipelines.models.gpu_kernels import without_gpu_kernels
from pipelines.models.quiet import quiet_transformers
from pipelines.train.arguments import dtype_of, training_arguments
from pipelines.train.attention import has_one_sample_a_row
from pipelines.train.attention import register as register_attention
from pipelines.train.checkpoint import complete_checkpoints, remove_incomplete, step_of
from pipelines.train.checkpoint_universal import shard_count, to_universal
from pipelines.train.checkpoint_upload import restore
from pipelines.train.journal import best_step, read_journal, rewind
from pipelines.train.nodes import fetch_checkpoint, fetch_run, is_first_of_node, saved_checkpoints, store_weights
from pipelines.train.preemption import PreemptionNotice
from pipelines.train.run import Preempted, Run, WorkerFacts
from pipelines.train.samples import Samples, Schedule
from pipelines.train.weights import export_adapter, export_model


def train_loop(run: Run, draining: Callable[[], Any]) -> WorkerFacts | Preempted:
    """Train, or go on from the last complete checkpoint, and leave the weights; returns facts for the report.

    Where the workers are told to leave, they save and end before that; `draining` as in preemption.py.
    """
    _prepare_process()
    import torch.distributed as dist
    from transformers import set_seed

    checkpoint, resume_from = _last_checkpoint(run)
    arguments = training_arguments(run, universal=resume_from != checkpoint)  # before the model: ZeRO-3 needs it
    set_seed(run.seed)
    resumed_at = step_of(checkpoint) if checkpoint else 0
    counts: tuple[int, int] | None = None
    if resumed_at < run.steps:
        # here, because torch stands behind it
        from pipelines.train.oom import MemoryMeter, explained

        meter, notice = MemoryMeter(), PreemptionNotice(run, draining)
        with explained(run, meter):
            trainer = _trainer(run, arguments, meter.mark, notice, resumed=checkpoint is not None)
            counts = _count_parameters(trainer.model)
            trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
        if trainer.state.global_step < run.steps:
            return Preempted(trainer.state.global_step, notice.nodes)
    if dist.get_rank() == 0:
        _export(run)
    dist.barrier()
    resident, on_device = _largest_peaks()
    return WorkerFacts(
        resumed_at=resumed_at,
        workers=dist.get_world_size(),
        parameters=counts[0] if counts else None,
        trainable_parameters=counts[1] if counts else None,
        peak_memory_bytes=resident,
        peak_device_memory_bytes=on_device,
        dtype=str(dtype_of(arguments)).removeprefix("torch."),
    )


def _prepare_process() -> None:
    """Tie this worker's life to Ray's, and keep DeepSpeed from compiling what is not used here."""
    arm()
    # rows differ in length, so that blocks of fixed size would leave gaps; read at CUDA's first use
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    import torch
    from ray.train.torch import get_device

    if torch.cuda.is_available():
        torch.cuda.set_device(get_device())
    else:
        os.environ["DS_ACCELERATOR"] = "cpu"
        without_gpu_kernels()
    import deepspeed.ops

    # a shared-memory all-reduce: gloo does the same without minutes of compiling at the first start
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    library: Any = deepspeed
    library.init_distributed()  # on Ray's process group; without it ZeRO-3 takes the world for one worker
    quiet_transformers()
    register_attention()


def _last_checkpoint(run: Run) -> tuple[Path | None, Path | None]:
    """The checkpoint to go on from, and where it lies in a form that this number of workers can read.

    Rank 0 clears away what lies behind it, and converts it where another number of workers wrote it, before any
    rank goes on.
    """
    import torch.distributed as dist

    if run.spread is not None and is_first_of_node(run):
        fetch_run(run)
    if dist.get_rank() == 0:
        remove_incomplete(run.checkpoints)
        if run.section.checkpoint_copies:
            restore(run, run.section.checkpoint_copies)
    dist.barrier()
    complete = complete_checkpoints(run.checkpoints)
    last = complete[-1] if complete else None
    convert = last is not None and shard_count(last) not in (0, dist.get_world_size()) and step_of(last) < run.steps
    if dist.get_rank() == 0:
        for path in (run.journal, run.samples):
            rewind(path, step_of(last) if last else None)
    if last is not None and convert and is_first_of_node(run):
        to_universal(last, run.universal)
    dist.barrier()
    return last, run.universal if convert else last


def _trainer(run: Run, arguments: Any, begun: Callable[[], None], notice: PreemptionNotice, resumed: bool) -> Any:
    from transformers import PrinterCallback

    # here, because torch and transformers stand behind them
    from pipelines.train.methods import load_model
    from pipelines.train.sequence import init_sequence_parallel
    from pipelines.train.trainer import ChatTrainer, Recorder, batch_of

    init_sequence_parallel(run.section.sequence_parallel_size)
    arguments.eval_on_start = run.held_out is not None and not resumed
    recorder = Recorder(run, begun, notice)
    held_out = Samples(run.held_out) if run.held_out else None
    trainer = ChatTrainer(
        model=load_model(run, arguments),
        args=arguments,
        data_collator=partial(batch_of, one_sample=has_one_sample_a_row(run.section)),
        train_dataset=_schedule(run),
        held_out=held_out,
        predict=partial(_predict, run, held_out) if held_out and run.section.predict_with_generate else None,
        callbacks=[recorder, *_trackers(run)],
    )
    recorder.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # the driver shows the journal
    return trainer


def _trackers(run: Run) -> list[Any]:
    """SwanLab's own callback: that of transformers does not run with SwanLab 0.10. W&B's is made by transformers."""
    for variable in ("WANDB_DIR", "SWANLAB_LOG_DIR"):  # beside the journal; workers are started in other folders
        os.environ.setdefault(variable, str(run.folder))
    if "swanlab" not in run.section.report_to:
        return []
    from swanlab.integration.transformers import SwanLabCallback

    return [SwanLabCallback(experiment_name=run.folder.parents[1].name)]


def _predict(run: Run, held_out: Samples, model: Any) -> dict[str, float]:
    from pipelines.train.predictions import predict  # here, because torch stands behind it

    return predict(run, model, held_out)


def _schedule(run: Run) -> Schedule:
    section = run.section
    packed_to = section.max_length if section.packing else None
    copies, batch = section.sequence_parallel_size, section.per_device_train_batch_size
    rows = run.steps * section.global_batch_size
    return Schedule(Samples(run.training), run.seed, rows, packed_to, copies, batch)


def chosen_checkpoint(run: Run) -> Path:
    """The checkpoint whose weights are left: the last, or the best where the recipe asks for it."""
    found = saved_checkpoints(run)
    best = best_step(read_journal(run.journal), map(step_of, found)) if run.section.load_best_model_at_end else None
    return next((folder for folder in found if step_of(folder) == best), found[-1])


def _export(run: Run) -> None:
    """Leave what was trained in a form that other programs load."""
    from transformers.integrations import deepspeed

    integration: Any = deepspeed
    integration.unset_hf_deepspeed_config()  # one rank loads whole weights here, which ZeRO-3 would spread over all
    chosen = chosen_checkpoint(run)
    fetch_checkpoint(run, chosen)
    if run.section.method == "full":
        export_model(chosen, run.trained, run.model)
    else:
        export_adapter(chosen, run.trained, run.model)
    shutil.rmtree(run.universal, ignore_errors=True)
    store_weights(run)


def _count_parameters(model: Any) -> tuple[int, int]:
    """All parameters, and those that are trained; of what ZeRO-3 shards, DeepSpeed keeps the whole size."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trains in sizes if trains)


def _largest_peaks() -> tuple[int, int | None]:
    """The most resident memory, and memory on its device if it has one, that any worker had, bytes."""
    import torch
    import torch.distributed as dist

    on_cuda = torch.cuda.is_available()
    own = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, torch.cuda.max_memory_allocated()]
    peaks = torch.tensor(own, device="cuda" if on_cuda else "cpu")
    dist.all_reduce(peaks, dist.ReduceOp.MAX)
    resident, on_device = peaks.tolist()
    return resident, on_device if on_cuda else None
