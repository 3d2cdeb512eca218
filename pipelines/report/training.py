"""What the report shows of training: the losses, which checkpoint is recommended and why, and answers over steps."""

from collections.abc import Iterator
from typing import Any

from markupsafe import Markup

from pipelines.report.charts import line_chart

HELD_OUT = "held-out loss"


def training(report: dict[str, Any]) -> dict[str, Any]:
    """Curves, a sentence on the recommended checkpoint, numbers, held-out scores by step, answers by question."""
    evaluations = report["eval_losses"]
    curves = {
        "training loss": [(point["step"], point["loss"]) for point in report["losses"]],
        HELD_OUT: [(point["step"], point["eval_loss"]) for point in evaluations],
    }
    drawn = {name: points for name, points in curves.items() if points}
    best, by_step = report["best_step"], dict(curves[HELD_OUT])
    marked = None if best is None else (f"step {best}", best, by_step[best])
    chart = line_chart("Loss by optimizer step", "optimizer step", "loss", drawn, frozenset([HELD_OUT]), marked)
    names = [name for name in (evaluations[-1] if evaluations else ()) if name.startswith("eval_")]
    return {
        "chart": Markup(chart),
        "recommendation": _recommendation(report, by_step),
        "facts": list(_facts(report)),
        "labels": ["step", *(HELD_OUT if name == "eval_loss" else name.removeprefix("eval_") for name in names)],
        "evaluations": [
            {"best": point["step"] == best, "cells": [f"{point['step']:,}", *(f"{point[name]:.3f}" for name in names)]}
            for point in evaluations
        ],
        "answers": _answers(report["samples_while_training"]),
    }


def _recommendation(report: dict[str, Any], losses: dict[int, float]) -> str:
    """Which checkpoint has the lowest held-out loss, what that is at the end, and whether one can still have it."""
    best = report["best_step"]
    if best is None:
        return ""
    last = max(losses)
    if best == last:
        return f"Recommended: the last step, {last:,}, which has the lowest held-out loss, {losses[last]:.3f}."
    least, end = f"the held-out loss is lowest there, {losses[best]:.3f}", f"{losses[last]:.3f} at the end"
    if best == 0:
        return f"No step is recommended but the base model: {least}, and {end}."
    if report["trained_step"] == best:
        kept = "Its weights are those that were left."
    elif f"checkpoints/checkpoint-{best}" in report["checkpoints"]:
        kept = f"It is kept as checkpoints/checkpoint-{best}; what was left are the weights of the last step."
    else:
        kept = "It was not kept: let train.save_steps and eval_steps agree, and raise save_total_limit."
    return f"Recommended: step {best:,}: {least}, and {end}, step {last:,}. {kept}"


def _facts(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    numbers = {
        "held-out loss of the base model": report["eval_loss_base"],
        "held-out loss after training": report["eval_loss"],
        "optimizer steps": report["steps"],
        "samples": report["samples"]["samples"],
        "samples cut to the token limit": report["samples"]["truncated"],
        "trainable parameters": report.get("trainable_parameters"),  # not counted where nothing was left to train
        "tokens a second": round(report["tokens_per_second"]),
    }
    for label, value in numbers.items():
        if value is not None:
            yield label, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


def _answers(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What each question was answered at each step."""
    questions = dict.fromkeys(sample["input"] for sample in samples)
    return [
        {"input": asked, "rows": [(sample["step"], sample["output"]) for sample in samples if sample["input"] == asked]}
        for asked in questions
    ]
