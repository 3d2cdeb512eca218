"""Train: tokens, then a group of workers that fine-tune the model, and the weights they leave.

<place>/train_tokens/, held_out_tokens/   see tokenize.py
<place>/metrics.jsonl, samples.jsonl      see journal.py, sampling.py
<place>/tensorboard/, loss.png            see curves.py
<place>/checkpoints/                      see checkpoint.py
<place>/adapter/ or trained/              the adapter, or the model where all of it was trained; see weights.py
"""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from pipelines.artifacts.reports.interval import Interval
from pipelines.artifacts.reports.rows import SplitReport
from pipelines.artifacts.reports.train import EvaluationEntry, SampledAnswer, StepEntry, TokenCounts, TrainReport
from pipelines.artifacts.stage import Inputs, Output, Stage
from pipelines.artifacts.workspace import Place, Workspace
from pipelines.errors import InputError, Problem, RecipeError
from pipelines.metrics.bootstrap import FEW_ROWS, bootstrap
from pipelines.models.convert import family_of
from pipelines.models.gpu_kernels import without_gpu_kernels
from pipelines.models.resolve import PYPI, check_folder, max_positions, model_digest, resolve
from pipelines.models.served import MODELS
from pipelines.models.skeleton import check_weights, rewriting_of
from pipelines.models.tokenizer import open_tokenizer, with_chat_template
from pipelines.models.weight_files import weight_shapes
from pipelines.progress import say
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.train import Train, fingerprint_of, further_source, missing_package, parse_data
from pipelines.sources.read import VERSION, check_source, source_fingerprint
from pipelines.train.adapter_start import adapter_problems
from pipelines.train.attention_check import attention_problems
from pipelines.train.checkpoint import replace_text, step_of
from pipelines.train.checkpoint_upload import copies_key, discard
from pipelines.train.curves import draw_losses
from pipelines.train.ends import describe_end, lacking_embedding, stop_tokens, with_end
from pipelines.train.journal import BY_ROW, Entry, best_step, read_journal, shown
from pipelines.train.loop import chosen_checkpoint, train_loop
from pipelines.train.loss_mask import IGNORE_INDEX
from pipelines.train.memory import chosen_stage, shapes_of
from pipelines.train.nodes import fetch_weights, saved_checkpoints
from pipelines.train.proof import template_of, unknown_thinking, unproven
from pipelines.train.run import Run, WorkerFacts
from pipelines.train.samples import Samples, total_rows
from pipelines.train.spread import spread_of
from pipelines.train.tokenize import Tokenized, mean_by_row, source_of, tokenize, tokens_here
from pipelines.train.weights import digest_weights
from pipelines.train.worker_group import check_resources, memory_found, run_workers

NOT_IN_FINGERPRINT = {
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


@dataclass(frozen=True)
class TrainInputs(Inputs):
    """The rows to train on, and those held out."""

    split: Output[SplitReport]


@dataclass(frozen=True)
class TrainStage(Stage[TrainInputs, TrainReport]):
    """Fine-tune the model."""

    section: Train
    ingest: Ingest | None
    """How the recipe reads its own rows; further files to train on may have as many broken ones."""
    seed: int
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    """What the recipe gives the model's chat template."""

    name: ClassVar[str] = "train"
    version: ClassVar[int] = 2
    on_disk: ClassVar[tuple[str, ...]] = ("split", MODELS, "copies.key")
    spreads: ClassVar[bool] = True

    @property
    def reports(self) -> type[TrainReport]:
        """The class of its report."""
        return TrainReport

    def fingerprint_inputs(self) -> Mapping[str, Any]:
        """The section without what does not change the result, the seed, and the content of model and further data."""
        further = [further_source(self.section, self.ingest, parse_data(item)[0]) for item in self.section.data]
        return {
            # in the place of `sources` stands what lies there, and how it is read
            "section": fingerprint_of(self.section, NOT_IN_FINGERPRINT | {"sources", "adapter"}),
            "seed": self.seed,
            "model": model_digest(self.section.model),
            "files": [source_fingerprint(source) for source in further if source],
            **({"reading": VERSION} if any(further) else {}),
            **({"adapter": digest_weights(Path(adapter).expanduser())} if (adapter := self.section.adapter) else {}),
            **({"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}),
        }

    def preflight(self) -> list[Problem]:
        """Where training could not run: data or a package are missing, a folder is no model that the section fits."""
        without_gpu_kernels()  # models are looked at here, and computed with in the workers' processes
        section = self.section
        problems: list[Problem] = []
        for item in section.data:
            try:
                if source := further_source(section, self.ingest, parse_data(item)[0]):
                    check_source(source)
            except RecipeError as error:
                problems += error.problems
            except InputError as error:
                problems.append(Problem("train.data", str(error)))
        folder = Path(section.model).expanduser()
        try:
            if section.model.startswith(PYPI):
                model_digest(section.model)  # the package may not be installed
            elif "://" not in section.model:
                check_folder(folder)
        except RecipeError as error:
            problems += error.problems
        else:
            # else its modules get other names, and its tokenizer is converted
            if "://" not in section.model and family_of(folder) is None:
                problems += misfits(section, folder) or attention_problems(section, folder)
                if not problems:
                    problems += unproven(section, self.ingest, self.chat_template_kwargs, folder)
        if section.checkpoint_copies:
            try:
                _ = Workspace(section.checkpoint_copies).fs
            except InputError as error:
                problems.append(Problem("", str(error)))
        if missing := missing_package(section):
            problems.append(missing)
        return problems

    def forget(self, place: Place) -> None:
        """Delete what lies elsewhere and a run would go on from; StageError where it stays."""
        if self.section.checkpoint_copies:
            discard(self.section.checkpoint_copies, place.local())

    def run(self, place: Place, inputs: TrainInputs) -> TrainReport:
        """Fine-tune the model on the split's training rows; goes on from the last complete checkpoint.

        HardwareError where the cluster lacks what the workers need.
        """
        without_gpu_kernels()
        section = self.section
        if section.adapter is not None:  # workers are started in other folders
            adapter = Path(section.adapter).expanduser().absolute()
            section = section.model_copy(update={"adapter": str(adapter)})
        check_resources(section)
        cache = place.workspace.local(MODELS)
        model = resolve(section.model, cache)
        template = section.chat_template
        if section.merge_system or self.chat_template_kwargs or section.thinking != "as_is":
            tokenizer = open_tokenizer(model)
            template = template_of(section, self.chat_template_kwargs, tokenizer)
            tokenizer.chat_template = template or tokenizer.chat_template
            if problem := unknown_thinking(section, tokenizer):
                raise RecipeError("the recipe", [problem])
        if template is not None:
            model = with_chat_template(model, template, cache)
        model = with_end(section, model, cache)
        if problems := misfits(section, model) or attention_problems(section, model):
            raise RecipeError("the recipe", problems)
        section = _with_zero_stage(section, model, place)
        if origin := place.workspace.origin:
            origin.store()  # for the workers: the model, where it was fetched or converted
        training = self._tokens(place, inputs.split, model, "train_tokens", section.data)
        held_out = None
        if section.eval_rows:
            rows = _held_out_rows(section, inputs.split)
            held_out = self._tokens(place, inputs.split, model, "held_out_tokens", [f"test#{rows}"])
        steps = total_steps(section, self.seed, training)
        key = copies_key(place.workspace) if section.checkpoint_copies else b""
        run = Run(section, self.seed, steps, model, place.local(), training, held_out, key, spread_of(place))
        run.folder.mkdir(parents=True, exist_ok=True)
        with shown(run.journal, run.steps):
            facts = run_workers(train_loop, run)
        fetch_weights(run)
        return _report(place, run, facts)

    def _tokens(self, place: Place, split: Output[SplitReport], model: Path, name: str, data: list[str]) -> Tokenized:
        section, seen = self.section, place.seen_by_all
        sources = [source_of(section, self.ingest, seen, split.seen_by_all, item) for item in data]
        return tokens_here(place, name, tokenize(seen, name, model, sources, section, self.seed))


def _with_zero_stage(section: Train, model: Path, place: Place) -> Train:
    """The section with the stage that `auto` stands for; a run that goes on keeps the one it began with."""
    if section.zero_stage != "auto":
        return section
    record = place.local("zero_stage.json")
    if origin := place.workspace.origin:
        origin.fetch(place.stage, place.fingerprint, record.name)
    if not record.is_file():
        shapes = shapes_of(model)
        if shapes is None:
            message = "auto estimates memory by sizes that this model's config.json does not say; give a number"
            raise RecipeError("the recipe", [Problem("train.zero_stage", message)])
        record.parent.mkdir(parents=True, exist_ok=True)
        replace_text(record, json.dumps(chosen_stage(section, shapes, memory_found(section))))
    return section.model_copy(update={"zero_stage": json.loads(record.read_text(encoding="utf-8"))})


def _held_out_rows(section: Train, split: Output[SplitReport]) -> int:
    """How many rows are held out: each at most once, since copies would make the loss look surer than it is.

    RecipeError where the split has none.
    """
    there = split.report.rows.test
    if there == 0:
        message = "the split left no rows to test on; set split.test_ratio, or eval_rows: 0"
        raise RecipeError("the recipe", [Problem("train.eval_rows", message)])
    if there < section.eval_rows:
        few = ", which are too few to judge by" if there < FEW_ROWS else ""
        say(f"  training: of eval_rows {section.eval_rows} the test split has {there}{few}; each is measured once")
    return min(there, section.eval_rows)


def total_steps(section: Train, seed: int, training: Tokenized) -> int:
    """Optimizer steps of the whole run; the last is filled up from the next epoch."""
    packed_to = section.max_length if section.packing else None
    rows = total_rows(Samples(training), seed, section.num_train_epochs, packed_to)
    steps = math.ceil(rows / section.global_batch_size)
    return min(steps, section.max_steps or steps)


def misfits(section: Train, model: Path) -> list[Problem]:
    """What is wrong with a model folder, and where the section asks for what the model does not have.

    Of the weights only headers are read.
    """
    problems = []
    limit = max_positions(model)
    if limit is not None and section.max_length > limit:
        message = f"{section.max_length} is more than the {limit} tokens the model was made for; lower it to {limit}"
        problems.append(Problem("train.max_length", message, on_every_machine=True))
    try:
        skeleton = check_weights(model)
        stop_tokens(model)
        lacking = lacking_embedding(section, model)
    except RecipeError as error:
        return [*problems, *error.problems]
    if lacking:
        problems.append(lacking)
    if section.method != "full":
        # here, because torch and peft stand behind it
        from pipelines.train.targets import check_targets

        if wrong := adapter_problems(section, model):
            return [*problems, *wrong]
        problems += check_targets(section, skeleton.model, weight_shapes(model))[1]
    return problems


def describe_model(section: Train) -> list[str]:
    """What `danlu check` says of a model that lies in a folder and has been found right."""
    folder = Path(section.model).expanduser()
    if not (folder / "config.json").is_file() or family_of(folder) is not None:
        return []
    lines = []
    if rewriting := rewriting_of(folder):
        lines.append(f"{rewriting} the model comes first, once for each workspace")
    if section.method != "full":
        from pipelines.train.targets import check_targets  # here, because torch and peft stand behind it

        lines.append(f"trains {check_targets(section, check_weights(folder).model, weight_shapes(folder))[0]}")
    if ends := describe_end(section, folder):
        lines.append(ends)
    return lines


def _report(place: Place, run: Run, facts: WorkerFacts) -> TrainReport:
    full = run.section.method == "full"
    entries = read_journal(run.journal)
    if not run.picture.exists():  # drawn with each checkpoint, and the last one may have been fetched
        draw_losses(run.picture, entries)
    steps = [StepEntry.model_validate(entry) for entry in entries if "loss" in entry]
    evaluations = [entry for entry in entries if "eval_loss" in entry]
    seconds = sum(entry.seconds for entry in steps)
    speed = sum(entry.tokens for entry in steps) / seconds
    trained_step = step_of(chosen_checkpoint(run))
    best = best_step(entries, (entry["step"] for entry in evaluations))
    before, after, delta = _held_out(run, evaluations, trained_step)
    if before is None or after is None:
        fall = f"loss {steps[-1].loss:.3f}"
    else:
        fall = f"held-out loss {before:.3f} -> {after:.3f}"
        if delta is not None and delta.rows is not None:
            fall += f" over {delta.rows} rows" + (", too few to judge" if delta.rows < FEW_ROWS else "")
    if best not in (None, trained_step):
        fall += f" (lower at step {best})"
    samples = TokenCounts.model_validate(run.training.counts)
    return TrainReport(
        summary=f"{run.steps} steps, {fall}, {speed:.0f} tokens/s{_overlong_in_words(run.section, samples)}",
        digest=digest_weights(run.trained),
        model=str(run.model),
        adapter=None if full else run.trained.name,
        trained=run.trained.name if full else None,
        checkpoints=place.relative(map(str, saved_checkpoints(run))),
        zero_stage=run.zero_stage,
        steps=run.steps,
        losses=steps,
        eval_losses=[
            EvaluationEntry.model_validate({key: entry[key] for key in entry if key != BY_ROW}) for entry in evaluations
        ],
        eval_loss_base=before,
        eval_loss=after,
        eval_loss_delta=delta,
        best_step=best,
        trained_step=trained_step,
        samples_while_training=[SampledAnswer.model_validate(entry) for entry in read_journal(run.samples)],
        files={"loss curves": run.picture.name, "journal": run.journal.name},
        training_seconds=seconds,
        samples=samples,
        held_out_samples=TokenCounts.model_validate(run.held_out.counts) if run.held_out else None,
        tokens_per_second=speed,
        loss_tokens_per_second=sum(entry.loss_tokens for entry in steps) / seconds,
        **asdict(facts),
    )


def _overlong_in_words(section: Train, samples: TokenCounts) -> str:
    """How many rows are above a token limit, as the end of a summary; empty where none is."""
    if not samples.truncated:
        return ""
    return f"; {samples.truncated} of {samples.rows} rows above the token limits (train.overlong: {section.overlong})"


def _held_out(
    run: Run, evaluations: list[Entry], trained_step: int
) -> tuple[float | None, float | None, Interval | None]:
    """The loss before and after training, and their difference with its bootstrap interval; nothing without rows."""
    if not run.held_out or not evaluations:
        return None, None, None
    before = evaluations[0]
    after = next((entry for entry in evaluations if entry["step"] == trained_step), evaluations[-1])
    samples = Samples(run.held_out)
    tokens = [
        int((labels[1:] != IGNORE_INDEX).sum()) for _, labels in (samples[place] for place in range(len(samples)))
    ]
    differences = [new - old for new, old in zip(after[BY_ROW], before[BY_ROW], strict=True)]
    by_row, weights = mean_by_row(run.held_out, differences, tokens)
    delta = Interval(**asdict(bootstrap(by_row, run.seed, weights)))
    return before["eval_loss"], after["eval_loss"], delta
