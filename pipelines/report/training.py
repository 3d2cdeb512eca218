"""What the report shows of training: the losses, which checkpoint is recommended and why, and answers over steps."""

from collections.abc import Iterator, Sequence
from typing import Any

from markupsafe import Markup

from pipelines.artifacts.reports.train import SampledAnswer, TrainReport
from pipelines.report.charts import line_chart

HELD_OUT = "held-out loss"


def training(report: TrainReport) -> dict[str, Any]:
    """Curves, a sentence on the recommended checkpoint, numbers, held-out scores by step, answers by question."""
    losses = {entry.step: entry.eval_loss for entry in report.eval_losses}
    curves = {
        "training loss": [(entry.step, entry.loss) for entry in report.losses],
        HELD_OUT: list(losses.items()),
    }
    drawn = {name: points for name, points in curves.items() if points}
    best = report.best_step
    marked = None if best is None else (f"step {best}", best, losses[best])
    chart = line_chart("Loss by optimizer step", "optimizer step", "loss", drawn, frozenset([HELD_OUT]), marked)
    metrics = sorted(report.eval_losses[-1].scores()) if report.eval_losses else []
    evaluations = []
    for entry in report.eval_losses:
        scores = entry.scores()
        cells = [f"{entry.step:,}", *(f"{scores[name]:.3f}" for name in metrics)]
        evaluations.append({"best": entry.step == best, "cells": cells})
    return {
        "chart": Markup(chart),
        "recommendation": _recommendation(report, losses),
        "facts": list(_facts(report)),
        "labels": ["step", *(HELD_OUT if name == "eval_loss" else name.removeprefix("eval_") for name in metrics)],
        "evaluations": evaluations,
        "answers": _answers(report.samples_while_training),
    }


def _recommendation(report: TrainReport, losses: dict[int, float]) -> str:
    """Which checkpoint has the lowest held-out loss, what that is at the end, and whether one can still have it."""
    best = report.best_step
    if best is None:
        return ""
    last = max(losses)
    if best == last:
        return f"Recommended: the last step, {last:,}, which has the lowest held-out loss, {losses[last]:.3f}."
    least, end = f"the held-out loss is lowest there, {losses[best]:.3f}", f"{losses[last]:.3f} at the end"
    if best == 0:
        return f"No step is recommended but the base model: {least}, and {end}."
    if report.trained_step == best:
        kept = "Its weights are those that were left."
    elif f"checkpoints/checkpoint-{best}" in report.checkpoints:
        kept = f"It is kept as checkpoints/checkpoint-{best}; what was left are the weights of the last step."
    else:
        kept = "It was not kept: let train.save_steps and eval_steps agree, and raise save_total_limit."
    return f"Recommended: step {best:,}: {least}, and {end}, step {last:,}. {kept}"


def _facts(report: TrainReport) -> Iterator[tuple[str, str]]:
    numbers = {
        "held-out loss of the base model": report.eval_loss_base,
        "held-out loss after training": report.eval_loss,
        "optimizer steps": report.steps,
        "samples": report.samples.samples,
        "samples cut to the token limit": report.samples.truncated,
        "trainable parameters": report.trainable_parameters,
        "tokens a second": round(report.tokens_per_second),
    }
    for label, value in numbers.items():
        if value is not None:
            yield label, f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"


def _answers(samples: Sequence[SampledAnswer]) -> list[dict[str, Any]]:
    """What each question was answered at each step."""
    questions = dict.fromkeys(sample.input for sample in samples)
    return [
        {"input": asked, "rows": [(sample.step, sample.output) for sample in samples if sample.input == asked]}
        for asked in questions
    ]
