"""Merge: the adapter's weights added to the base model's, as a Hugging Face folder, checked by logits.

<place>/model/       weights, configuration, generation configuration, tokenizer, chat template
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from pipelines.artifacts.reports.train import MergeReport, TrainReport
from pipelines.artifacts.stage import Inputs, Output, Stage
from pipelines.artifacts.workspace import Place, sync_tree
from pipelines.errors import Problem, StageError
from pipelines.models.gpu_kernels import without_gpu_kernels
from pipelines.models.lineup import base_model
from pipelines.models.quiet import quiet_transformers
from pipelines.models.save_tokenizer import copy_tokenizer
from pipelines.models.served import MODELS
from pipelines.models.skeleton import loaded_whole
from pipelines.models.subprocess_task import run_in_subprocess
from pipelines.models.tokenizer import load_tokenizer
from pipelines.progress import waiting
from pipelines.recipe.train import Merge, OwnSampling
from pipelines.train.peft_warnings import peft_warnings_off
from pipelines.train.weights import check_base, digest_weights, is_adapter

MODEL = "model"
PROMPTS = ("你是谁？", "用一句话祝朋友生日快乐。", "Why is the sky blue?")
"""What base with adapter and merged model are asked, to compare their logits."""

TOLERANCE = 1e-4
"""Largest difference of two float32 logits that are to be equal, relative to the largest logit, if that is above 1."""


@dataclass(frozen=True)
class MergeInputs(Inputs):
    """What was trained."""

    train: Output[TrainReport]


@dataclass(frozen=True)
class MergeStage(Stage[MergeInputs, MergeReport]):
    """Merge the trained adapter into its base model."""

    section: Merge
    method: str
    """That of training."""

    name: ClassVar[str] = "merge"
    version: ClassVar[int] = 2
    on_disk: ClassVar[tuple[str, ...]] = ("train", MODELS)

    @property
    def reports(self) -> type[MergeReport]:
        """The class of its report."""
        return MergeReport

    def fingerprint_inputs(self) -> Mapping[str, Any]:
        """The section, without what does not change the result."""
        return {"section": self.section.model_dump(exclude={"num_cpus"})}

    def preflight(self) -> list[Problem]:
        """Where there will be no 4 bits to go back from."""
        if self.section.base == "dequantized" and self.method != "qlora":
            message = f"dequantized needs train.method: qlora, and it is {self.method}; leave it out"
            return [Problem("merge.base", message)]
        return []

    def run(self, place: Place, inputs: MergeInputs) -> MergeReport:
        """Write the merged model; the report has its folder and how far logits differ.

        StageError where the merged model, read back from disk, does not answer like base and adapter together.
        """
        section, report = self.section, inputs.train.report
        target = place.local(MODEL)
        what = inputs.train.folder.local(report.weights)
        with waiting("writing the merged model"):
            written: Written = run_in_subprocess(
                write_merged, base_model(inputs.train), what, target, section, report.dtype, num_cpus=section.num_cpus
            )
        same = "base + adapter" if report.adapter else "what was trained"
        return MergeReport(
            summary=f"{written.dtype}, logits within {written.merge_difference:.1e} of {same}",
            digest="-".join([digest_weights(target), *_told(section.generation)]),
            model=MODEL,
            bytes=sum(path.stat().st_size for path in target.iterdir()),
            **asdict(written),
        )


@dataclass(frozen=True)
class Written:
    """What a merged model is stored in, and the largest differences of its logits, all computed in float32."""

    dtype: str
    merge_difference: float
    """Merged in memory, against the adapter on its base."""
    reload_difference: float
    """Read back from disk, against what was saved."""
    rounding_difference: float
    """Read back, against the adapter on its base, which is the price of storing in fewer bits."""
    largest_logit: float


def write_merged(base: Path, trained: Path, target: Path, section: Merge, trained_in: str = "float32") -> Written:
    """Write base + adapter to `target`, added in float32 and then rounded to the dtype asked for.

    Where `trained` holds a whole model instead of an adapter, that is rounded and written. `trained_in` is the dtype
    that training computed in, to which 4 bits were taken back. StageError where logits differ that must be equal.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _on_cpus(section.num_cpus)
    dtype = _dtype(section.dtype, AutoConfig.from_pretrained(base).dtype)
    prompts = _prompts(base)
    model = _load(base, trained, trained_in if section.base == "dequantized" else None)
    expected = _logits(model, prompts)
    model = model.merge_and_unload() if is_adapter(trained) else model
    merged = _largest_difference(_logits(model, prompts), expected)
    _cast_parameters(model, dtype)
    scratch = _save(model, base, target, section)
    _cast_parameters(model, torch.float32)
    saved = _logits(model, prompts)
    del model
    again = _logits(AutoModelForCausalLM.from_pretrained(scratch, dtype=torch.float32), prompts)
    written = Written(
        dtype=str(dtype).removeprefix("torch."),
        merge_difference=merged,
        reload_difference=_largest_difference(again, saved),
        rounding_difference=_largest_difference(again, expected),
        largest_logit=max(float(logits.abs().max()) for logits in expected),
    )
    _check(written)
    shutil.rmtree(target, ignore_errors=True)
    sync_tree(str(scratch))
    scratch.rename(target)
    return written


def _load(base: Path, trained: Path, quantized_in: str | None) -> Any:
    """What was trained, in float32: the base model, or what its 4 bits say, with the adapter, or the whole model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from pipelines.train.methods import quantization  # here, because torch stands behind it

    adapter = is_adapter(trained)
    if adapter:
        check_base(trained, base)
    if quantized_in:
        dtype = getattr(torch, quantized_in)
        loading: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, quantization_config=quantization(dtype), output_loading_info=True
        )
        model = loaded_whole(loading, base).dequantize(dtype=torch.float32).float()
    else:
        folder = base if adapter else trained
        loading = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
        model = loaded_whole(loading, folder)
    if not adapter:
        return model
    with peft_warnings_off():
        return PeftModel.from_pretrained(model, trained)


def _on_cpus(num_cpus: float) -> None:
    import torch

    quiet_transformers()
    without_gpu_kernels()
    torch.set_num_threads(max(1, int(num_cpus)))


def _dtype(wanted: str, stored: Any) -> Any:
    import torch

    return (stored or torch.float32) if wanted == "auto" else getattr(torch, wanted)


def _prompts(base: Path) -> list[Any]:
    import torch

    tokenizer, _ = load_tokenizer(base)
    texts = list(PROMPTS)
    if tokenizer.chat_template is not None:
        chats = ([{"role": "user", "content": text}] for text in PROMPTS)
        texts = [tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    return [torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]]) for text in texts]


def _cast_parameters(model: Any, dtype: Any) -> None:
    """Parameters only: buffers such as rotary frequencies stay float32, as they do after loading."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _logits(model: Any, prompts: list[Any]) -> list[Any]:
    import torch

    model.eval()
    with torch.no_grad():
        return [model(input_ids=prompt, use_cache=False).logits.float() for prompt in prompts]


def _largest_difference(one: list[Any], other: list[Any]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one, other, strict=True))


def _save(model: Any, base: Path, target: Path, section: Merge) -> Path:
    """Write the model beside `target`, under a name that no later stage reads."""
    scratch = target.with_name(target.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    model.save_pretrained(scratch, max_shard_size=section.max_shard_size)
    copy_tokenizer(base, scratch)
    if section.generation:
        _write_sampling(scratch / "generation_config.json", section.generation)
    return scratch


def _write_sampling(path: Path, sampling: OwnSampling) -> None:
    """What transformers and vLLM take where a request is silent; transformers itself refuses to write temperature 0."""
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    config |= {"do_sample": sampling.temperature > 0, **sampling.model_dump()}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _told(sampling: OwnSampling | None) -> list[str]:
    """What a model answers follows from its own sampling too."""
    return [f"{name}={value:g}" for name, value in sampling.model_dump().items()] if sampling else []


def _check(written: Written) -> None:
    """StageError where logits that must be equal are not; a number that is none fails too."""
    tolerance = TOLERANCE * max(1.0, written.largest_logit)
    equal = {"merge_difference": written.merge_difference, "reload_difference": written.reload_difference}
    for name, difference in equal.items():
        if not difference <= tolerance:
            raise StageError(
                f"merge: {name} of logits is {difference:.2e}, above {tolerance:.2e}; the merged model was not kept. "
                "Run train again; if that does not help, this model cannot be merged"
            )
