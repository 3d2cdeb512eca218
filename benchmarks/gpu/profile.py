"""Where the time of one training step goes, and what the hardware would allow at best."""

from typing import Any

from benchmarks.gpu.setting import Figures, Setting
from benchmarks.gpu.training import loop_of, step
from pipelines.train.flops import PEAKS

SHOWN = 20
BANDWIDTHS = {"H200": 4.8e12, "H100": 3.35e12, "H800": 3.35e12, "A100": 2.0e12, "A800": 2.0e12, "L40S": 0.864e12}
"""Bytes per second of the card's memory, from the makers' data sheets; the first name that fits counts."""


def one_step(setting: Setting) -> Figures:
    """The twenty operations that take longest in one step of the bare loop, and the floor: operations over the card's
    peak, and bytes of weights read twice and activations over its bandwidth. The table is in FOLDER/profile.txt."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiling

    model, batches, device = loop_of(setting)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for batch in batches[:2]:
        step(model, batch, optimizer)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device == "cuda" else [])]
    with profiling(activities=activities) as profiler:
        step(model, batches[2], optimizer)
        if device == "cuda":
            torch.cuda.synchronize()
    averages: Any = profiler.key_averages()
    order = "self_device_time_total" if device == "cuda" else "self_cpu_time_total"
    text = averages.table(sort_by=order, row_limit=SHOWN)
    (setting.folder / "profile.txt").write_text(text, encoding="utf-8")
    events = sorted(averages, key=lambda event: -getattr(event, order))
    total = sum(getattr(event, order) for event in events)
    largest = {event.key[:40]: round(getattr(event, order) / total, 3) for event in events[:5]}
    return {"step ms": round(total / 1000, 2), "largest shares": largest, **_floor(model, batches[2], device)}


def _floor(model: Any, batch: dict[str, Any], device: str) -> Figures:
    """Milliseconds that a step takes at least, by operations and by bytes; nothing for cards that are not known."""
    import torch

    if device != "cuda":
        return {}
    name = torch.cuda.get_device_name()
    peak = next((value for card, value in PEAKS.items() if card in name), None)
    bandwidth = next((value for card, value in BANDWIDTHS.items() if card in name), None)
    if not peak or not bandwidth:
        return {}
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    tokens = batch["input_ids"].numel()
    # a weight that is not trained: forward and the gradient of its input; one that is: its own gradient too
    operations = tokens * (4 * frozen + 6 * trained)
    moved = 2 * 2 * frozen + 16 * trained
    return {
        "floor ms by operations": round(operations / peak * 1000, 2),
        "floor ms by bytes": round(moved / bandwidth * 1000, 2),
    }
