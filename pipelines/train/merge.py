"""Merge: the adapter's weights added to the base model's, as a Hugging Face folder, checked by logits.

<place>/model/       weights, configuration, generation configuration, tokenizer, chat template
"""

import json
import shutil
from pathlib import Path
from typing import Any

from pipelines.artifacts.workspace import Place
from pipelines.errors import Problem, RecipeError, StageError
from pipelines.models.resolve import quiet_transformers
from pipelines.models.subprocess_task import in_own_process
from pipelines.progress import waiting
from pipelines.recipe.schema import Recipe
from pipelines.recipe.train import Merge, OwnSampling
from pipelines.train.tokenize import load_tokenizer
from pipelines.train.weights import check_base, digest_weights, is_adapter

VERSION = 1
MODEL = "model"
PROMPTS = ("你是谁？", "用一句话祝朋友生日快乐。", "Why is the sky blue?")
"""What base with adapter and merged model are asked, to compare their logits."""

TOLERANCE = 1e-4
"""Largest difference of two float32 logits that are to be equal, relative to the largest logit, if that is above 1."""


def determinants(recipe: Recipe) -> dict[str, Any]:
    """The section, without what does not change the result."""
    assert recipe.merge
    return {"section": recipe.merge.model_dump(exclude={"num_cpus"})}


def preflight(recipe: Recipe) -> None:
    """RecipeError, before any stage runs, where there will be no 4 bits to go back from."""
    assert recipe.merge and recipe.train
    if recipe.merge.base == "dequantized" and recipe.train.method != "qlora":
        message = f"dequantized needs train.method: qlora, and it is {recipe.train.method}; leave it out"
        raise RecipeError(recipe.name, [Problem("merge.base", message)])


def merge(recipe: Recipe, place: Place) -> dict[str, Any]:
    """Merge the trained adapter into its base model; the report has the folder and how far logits differ.

    StageError where the merged model, read back from disk, does not answer like base and adapter together.
    """
    section = recipe.merge
    assert section
    trained = place.inputs["train"]
    report = trained.report()
    target = place.local(MODEL)
    what = trained.local(report["adapter"] or report["trained"])
    with waiting("writing the merged model"):
        facts: dict[str, Any] = in_own_process(
            write_merged, Path(report["model"]), what, target, section, report["dtype"], num_cpus=section.num_cpus
        )
    same = "base + adapter" if report["adapter"] else "what was trained"
    return {
        "summary": f"{facts['dtype']}, logits within {facts['merge_difference']:.1e} of {same}",
        "digest": "-".join([digest_weights(target), *_told(section.generation)]),
        "model": MODEL,
        "bytes": sum(path.stat().st_size for path in target.iterdir()),
        **facts,
    }


def write_merged(
    base: Path, trained: Path, target: Path, section: Merge, trained_in: str = "float32"
) -> dict[str, Any]:
    """Write base + adapter to `target`, added in float32 and then rounded to the dtype asked for.

    Where `trained` holds a whole model instead of an adapter, that is rounded and written. `trained_in` is the dtype
    that training computed in, to which 4 bits were taken back.

    Returns the largest differences of logits, all computed in float32: `merge_difference`, merged in memory against
    adapter on base; `reload_difference`, read back from disk against what was saved; `rounding_difference`, read
    back against adapter on base, which is the price of storing in fewer bits.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    _quiet(section.num_cpus)
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
    facts = {
        "dtype": str(dtype).removeprefix("torch."),
        "merge_difference": merged,
        "reload_difference": _largest_difference(again, saved),
        "rounding_difference": _largest_difference(again, expected),
        "largest_logit": max(float(logits.abs().max()) for logits in expected),
    }
    _check(facts)
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)
    return facts


def _load(base: Path, trained: Path, quantized_in: str | None) -> Any:
    """What was trained, in float32: the base model, or what its 4 bits say, with the adapter, or the whole model."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from pipelines.train.methods import quantization

    adapter = is_adapter(trained)
    if adapter:
        check_base(trained, base)
    if quantized_in:
        dtype = getattr(torch, quantized_in)
        quantized: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, quantization_config=quantization(dtype)
        )
        model = quantized.dequantize(dtype=torch.float32).float()
    else:
        model = AutoModelForCausalLM.from_pretrained(base if adapter else trained, dtype=torch.float32)
    return PeftModel.from_pretrained(model, trained) if adapter else model


def _quiet(num_cpus: float) -> None:
    import torch

    quiet_transformers()
    torch.set_num_threads(max(1, int(num_cpus)))


def _dtype(wanted: str, stored: Any) -> Any:
    import torch

    return (stored or torch.float32) if wanted == "auto" else getattr(torch, wanted)


def _prompts(base: Path) -> list[Any]:
    import torch

    tokenizer, _ = load_tokenizer(base)
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in PROMPTS
    ]
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
    load_tokenizer(base)[0].save_pretrained(scratch)
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


def _check(facts: dict[str, Any]) -> None:
    """StageError where logits that must be equal are not; a number that is none fails too."""
    tolerance = TOLERANCE * max(1.0, facts["largest_logit"])
    for name in ("merge_difference", "reload_difference"):
        if not facts[name] <= tolerance:
            raise StageError(
                f"merge: {name} of logits is {facts[name]:.2e}, above {tolerance:.2e}; the merged model was not kept. "
                "Run train again; if that does not help, this model cannot be merged"
            )
