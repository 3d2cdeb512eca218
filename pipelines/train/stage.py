"""Train: tokens, then a group of workers that fine-tune the model, and the weights they leave.

<place>/train_tokens/, held_out_tokens/   see tokenize.py
<place>/metrics.jsonl, samples.jsonl      see journal.py, sampling.py
<place>/tensorboard/, loss.png            see curves.py
<place>/checkpoints/                      see checkpoint.py
<place>/adapter/ or trained/              the adapter, or the model where all of it was trained; see weights.py
"""

import json
import math
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import InputError, Problem, RecipeError, nearest
from pipelines.ingest.stage import determinants as ingested
from pipelines.ingest.stage import preflight as preflight_source
from pipelines.metrics.bootstrap import bootstrap
from pipelines.models.convert import family_of
from pipelines.models.resolve import (
    check_folder,
    max_positions,
    model_digest,
    resolve,
    weight_shapes,
    with_chat_template,
)
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import Train, missing_package
from pipelines.train.checkpoint import complete_checkpoints, replace_text, step_of
from pipelines.train.checkpoint_upload import discard
from pipelines.train.curves import draw_losses
from pipelines.train.journal import BY_ROW, Entry, best_step, read_journal, shown
from pipelines.train.loop import chosen_checkpoint
from pipelines.train.loss_mask import IGNORED
from pipelines.train.memory import chosen_stage, shapes_of
from pipelines.train.run import Run
from pipelines.train.samples import Samples, total_rows
from pipelines.train.tokenize import Tokenized, further_source, parse_data, source_of, tokenize
from pipelines.train.weights import digest_weights
from pipelines.train.worker_group import check_resources, fit, memory_found

VERSION = 1
UNINFLUENTIAL = {
    "num_workers",
    "min_workers",
    "sequence_parallel_size",
    "resources_per_worker",
    "max_failures",
    "save_steps",
    "save_total_limit",
    "checkpoint_copies",
    "logging_steps",
    "report_to",
}
"""Fields that change where and how safely the work is done, but not what comes out."""


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section without what does not change the result, the seed, and the base model's content."""
    assert recipe.train
    section = recipe.train.model_dump(exclude={*UNINFLUENTIAL, "sources"})
    files = [ingested(recipe.model_copy(update={"ingest": source})) for source in _further(recipe)]
    return {"section": section, "seed": recipe.seed, "model": model_digest(recipe.train.model), "files": files}


def _further(recipe: Recipe) -> list[Ingest]:
    """How the data are read that are no side of the split."""
    assert recipe.train
    return [source for item in recipe.train.data if (source := further_source(recipe, parse_data(item)[0]))]


def preflight(recipe: Recipe) -> None:
    """RecipeError where training could not run: data or a package are missing, a folder is no model that it fits."""
    section = recipe.train
    assert section
    for source in _further(recipe):
        try:
            preflight_source(recipe.model_copy(update={"ingest": source}))
        except InputError as error:
            raise InputError(f"train.data: {error}") from None
    if "://" not in section.model:
        folder = Path(section.model).expanduser()
        check_folder(folder)
        if family_of(folder) is None:  # else its modules get other names
            _check_fit(section, folder)
    if section.checkpoint_copies:
        _ = Workspace(section.checkpoint_copies).fs
    if missing := missing_package(section):
        raise RecipeError(recipe.name, [missing])


def forget(recipe: Recipe, place: Place) -> None:
    """Delete what lies elsewhere and a run would go on from; StageError where it stays."""
    assert recipe.train
    if recipe.train.checkpoint_copies:
        discard(recipe.train.checkpoint_copies, place.local())


def train(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Fine-tune the model on the split's training rows; goes on from the last complete checkpoint.

    The report has losses, speeds, counts, and the model's and adapter's folders. HardwareError where the cluster
    lacks what the workers need.
    """
    section = recipe.train
    assert section
    check_resources(section)
    cache = place.workspace.local("models")
    model = resolve(section.model, cache)
    if section.chat_template is not None:
        model = with_chat_template(model, section.chat_template, cache)
    _check_fit(section, model)
    section = _with_zero_stage(section, model, place)
    training = _tokens(recipe, place, model, "train_tokens", section.data)
    held_out = (
        _tokens(recipe, place, model, "held_out_tokens", [f"test#{section.eval_rows}"]) if section.eval_rows else None
    )
    run = Run(
        section, recipe.seed, total_steps(section, recipe.seed, training), model, place.local(), training, held_out
    )
    with shown(run.journal, run.steps):
        facts = fit(run)
    return _report(place, run, facts)


def _with_zero_stage(section: Train, model: Path, place: Place) -> Train:
    """The section with the stage that `auto` stands for; a run that goes on keeps the one it began with."""
    if section.zero_stage != "auto":
        return section
    record = place.local("zero_stage.json")
    if not record.is_file():
        shapes = shapes_of(model)
        if shapes is None:
            message = "auto needs a model in safetensors, to estimate its memory; give a number"
            raise RecipeError("the recipe", [Problem("train.zero_stage", message)])
        record.parent.mkdir(parents=True, exist_ok=True)
        replace_text(record, json.dumps(chosen_stage(section, shapes, memory_found(section))))
    return section.model_copy(update={"zero_stage": json.loads(record.read_text(encoding="utf-8"))})


def total_steps(section: Train, seed: int, training: Tokenized) -> int:
    """Optimizer steps of the whole run; the last is filled up from the next epoch."""
    packed_to = section.max_length if section.packing else None
    rows = total_rows(Samples(training), seed, section.num_train_epochs, packed_to)
    steps = math.ceil(rows / section.global_batch_size)
    return min(steps, section.max_steps or steps)


def _tokens(recipe: Recipe, place: Place, model: Path, name: str, data: list[str]) -> Tokenized:
    section = recipe.train
    assert section
    return tokenize(
        place,
        name,
        model,
        [source_of(recipe, place, item) for item in data],
        max_length=section.max_length,
        overlong=section.overlong,
        max_input_length=section.max_input_length,
        max_output_length=section.max_output_length,
        system=section.system,
        seed=recipe.seed,
    )


def _check_fit(section: Train, model: Path) -> None:
    """RecipeError where the section asks for what the model does not have."""
    problems = []
    limit = max_positions(model)
    if limit is not None and section.max_length > limit:
        message = f"{section.max_length} is more than the {limit} tokens the model was made for; lower it to {limit}"
        problems.append(Problem("train.max_length", message))
    names = [name.removesuffix(".weight") for name, shape in weight_shapes(model).items() if len(shape) == 2]
    problems += _unknown_targets(section.lora.target_modules, names) if section.method != "full" and names else []
    if problems:
        raise RecipeError("the recipe", problems)


def _unknown_targets(targets: str | list[str], names: list[str]) -> list[Problem]:
    """One problem for each target that no module of the model is called by; a text is a pattern, as peft has it."""
    key, short = "train.lora.target_modules", {name.rpartition(".")[2] for name in names}
    if isinstance(targets, str):
        if targets == "all-linear" or any(re.fullmatch(targets, name) for name in names):
            return []
        return [Problem(key, f"no module of the model matches {targets!r}; {nearest(targets, short)}")]
    unknown = [t for t in targets if not any(name == t or name.endswith("." + t) for name in names)]
    return [Problem(key, f"the model has no module {target!r}; {nearest(target, short)}") for target in unknown]


def _report(place: Place, run: Run, facts: dict[str, Any]) -> dict[str, Any]:
    full = run.section.method == "full"
    entries = read_journal(run.journal)
    if not run.picture.exists():  # drawn with each checkpoint, and the last one may have been fetched
        draw_losses(run.picture, entries)
    steps = [entry for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    seconds = sum(entry["seconds"] for entry in steps)
    rates = {
        "tokens_per_second": sum(entry["tokens"] for entry in steps) / seconds,
        "loss_tokens_per_second": sum(entry["loss_tokens"] for entry in steps) / seconds,
    }
    trained_step = step_of(chosen_checkpoint(run))
    held_out = _held_out(run, evaluations, trained_step)
    best = best_step(entries, (entry["step"] for entry in evaluations))
    fall = "held-out loss {eval_loss_base:.3f} -> {eval_loss:.3f}" if evaluations else f"loss {steps[-1]['loss']:.3f}"
    fall += f" (lower at step {best})" if best not in (None, trained_step) else ""
    return {
        "summary": f"{run.steps} steps, {fall.format_map(held_out)}, {rates['tokens_per_second']:.0f} tokens/s",
        "digest": digest_weights(run.trained),
        "model": str(run.model),
        "adapter": None if full else run.trained.name,
        "trained": run.trained.name if full else None,
        "checkpoints": place.relative(map(str, complete_checkpoints(run.checkpoints))),
        "zero_stage": run.section.zero_stage,
        "steps": run.steps,
        "losses": steps,
        "eval_losses": [{key: entry[key] for key in entry if key != BY_ROW} for entry in evaluations],
        **held_out,
        "best_step": best,
        "trained_step": trained_step,
        "samples_while_training": read_journal(run.samples),
        "files": {"loss curves": run.picture.name, "journal": run.journal.name},
        "training_seconds": seconds,
        "samples": run.training.counts,
        "held_out_samples": run.held_out.counts if run.held_out else None,
        **rates,
        **facts,
    }


def _held_out(run: Run, evaluations: list[Entry], trained_step: int) -> dict[str, Any]:
    """The loss before and after training, and their difference with its bootstrap interval; nothing without rows."""
    if not run.held_out or not evaluations:
        return {"eval_loss_base": None, "eval_loss": None, "eval_loss_delta": None}
    before = evaluations[0]
    after = next((entry for entry in evaluations if entry["step"] == trained_step), evaluations[-1])
    samples = Samples(run.held_out)
    tokens = [int((labels[1:] != IGNORED).sum()) for _, labels in (samples[place] for place in range(len(samples)))]
    differences = [new - old for new, old in zip(after[BY_ROW], before[BY_ROW], strict=True)]
    return {
        "eval_loss_base": before["eval_loss"],
        "eval_loss": after["eval_loss"],
        "eval_loss_delta": asdict(bootstrap(differences, run.seed, tokens)),
    }
