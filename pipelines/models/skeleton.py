"""The model that a folder would become: transformers' own class, with every weight's name and shape and no content.

Transformers renames and joins weights while it reads them (experts, for example), so names on disk are not names in
memory. The skeleton is loaded by transformers itself, from the headers of the weight files.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.models.quiet import quiet_transformers
from pipelines.models.save_tokenizer import copy_tokenizer
from pipelines.models.weight_files import (
    SAID,
    WeightHeader,
    broken_model,
    has_main_file,
    read_weights,
    torch_dtypes,
    weight_headers,
)

DEQUANTIZED = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""Quantization methods that transformers takes back to plain weights while loading, each with its configuration."""

UNQUANTIZED = "give the unquantized model instead; train.method: qlora makes 4 bits of it by itself"

FLOATS = {"F64", "F32", "F16", "BF16"}
"""What safetensors calls numbers that are weights as they stand."""

GENERATION = "generation_config.json"

CODES = {".weight": (".weight_scale_inv", ".scale", ".qscale_weight"), "_blocks": ("_scales",), "_scales": ("_blocks",)}
"""How names of codes end, and how that ends without which they stand for nothing: of FP8, of MXFP4."""

UNKNOWN = "unknown method"

SHOWN = 3
"""How many names of weights a message lists."""

_LANGUAGE_MODEL = re.compile(r"(?:model\.)?language_model\.(?:model\.)?")


@dataclass(frozen=True)
class Skeleton:
    """The model on the device `meta`, and the weights on which files and class do not agree, by name."""

    model: Any
    missing: list[str]
    """The class has them, and the files do not."""
    unexpected: list[str]
    """The files have them, and the class does not know them."""
    mismatched: list[str]
    """Their shapes differ."""


@dataclass(frozen=True)
class Rewriting:
    """What has to be done to a folder before it can be trained."""

    quantization: str | None
    """The method that its weights are taken back from; None where they are plain."""
    text_part: bool
    """Whether its language model is taken out of a model of text, pictures or sound."""

    def __str__(self) -> str:
        """For people, as what is being done."""
        taken = "taking the text part of" if self.text_part else "dequantizing"
        return f"{taken}, and dequantizing," if self.text_part and self.quantization else taken


def config_of(folder: Path) -> dict[str, Any]:
    """A folder's config.json; RecipeError where it is none."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise broken_model(f"{path} is no JSON ({error}); fetch it again") from None
    if not isinstance(config, dict):
        raise broken_model(f"{path} is no JSON object; fetch it again")
    return config


def text_config(config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the text part of a model of text and pictures; empty where there is no such part."""
    said = config.get("text_config")
    return said if isinstance(said, dict) else {}


def rewriting_of(folder: Path) -> Rewriting | None:
    """What has to be done to a folder before it can be trained, by its configuration alone; None: nothing.

    RecipeError where its weights are quantized in a way that cannot be taken back.
    """
    method = quantization_of(folder)
    if method is not None and method not in DEQUANTIZED:
        raise broken_model(f"{folder}: its weights are quantized ({method}), which cannot be trained; {UNQUANTIZED}")
    text_part = bool(text_config(config_of(folder)))
    return Rewriting(method, text_part) if method or text_part else None


def quantization_of(folder: Path) -> str | None:
    """The method by which a folder's weights are quantized, as its configuration files say; None: they are plain."""
    config = config_of(folder)
    for place in (config, text_config(config)):
        for key in ("quantization_config", "compression_config"):
            said = place.get(key)
            if said is not None:
                return str(said.get("quant_method", UNKNOWN) if isinstance(said, dict) else UNKNOWN).lower()
    for name in ("quantize_config.json", "quant_config.json", "hf_quant_config.json"):  # AutoGPTQ, AutoAWQ, ModelOpt
        if (folder / name).is_file():
            return f"see {name}"
    return None


def check_weights(folder: Path) -> Skeleton:
    """The skeleton of a folder whose weights all arrive.

    Nothing but headers is read, and what is returned is not to be changed. RecipeError that names what is missing,
    superfluous, of another shape or quantized, or that transformers has no class for.
    """
    files = [path for path in sorted(folder.iterdir()) if path.is_file()] if folder.is_dir() else []
    return _checked(folder, tuple((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files))


@lru_cache(maxsize=1)
def _checked(folder: Path, files: tuple[tuple[str, int, int], ...]) -> Skeleton:
    """See above; a folder is looked at once while its files stay as they are: mixtures have 20,000 weights."""
    rewriting = rewriting_of(folder)
    config = causal_config(folder)
    if not has_main_file(folder):
        raise broken_model(
            f"{folder} has neither model.safetensors nor model.safetensors.index.json, so transformers loads none of "
            "its files; fetch the model again"
        )
    headers = weight_headers(folder)
    _check_numbers(folder, headers, rewriting)
    skeleton = _load(folder, config, headers, rewriting)
    if told := disagreement(skeleton.missing, skeleton.unexpected, skeleton.mismatched):
        raise broken_model(f"{folder}: {told}")
    if not (rewriting and rewriting.quantization):
        _check_floats(folder, headers, skeleton.model)
    _check_tied(folder, skeleton.model)
    return skeleton


def causal_config(folder: Path) -> Any:
    """The configuration of the language model in a folder; RecipeError where transformers has no class for it."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    kind = config_of(folder).get("model_type", "unknown")
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except Exception as error:  # what transformers raises over a field depends on the field
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:SAID]}"
        raise broken_model(
            f"{folder}: transformers cannot read its config.json (model_type {kind}; {told}); Danlu runs no code "
            "that comes with a model; install a transformers that has this class, or use another model"
        ) from None
    text = config.get_text_config(decoder=True)
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        part = "its text part" if hasattr(config, "text_config") else "it"
        raise broken_model(
            f"{folder}: model_type {kind} is no causal language model, and transformers cannot load {part} as one; "
            "use a language model"
        )
    is_shared = text is not config and config.tie_word_embeddings
    if is_shared and not any(name.endswith("lm_head.weight") for name in weight_headers(folder)):
        text.tie_word_embeddings = True  # as the whole model says it of its text part
    return text


def causal_class(config: Any) -> Any:
    """Transformers' class for a configuration that `causal_config` gave."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


def disagreement(missing: Iterable[str], unexpected: Iterable[str], mismatched: Iterable[str]) -> str:
    """On which weights files and class do not agree, with what to do; empty where they agree."""
    said = [
        f"{len(names)} weights {what}: {', '.join(sorted(names)[:SHOWN])}{' …' if len(names) > SHOWN else ''}"
        for names, what in (
            (list(missing), "are not in its files and would be random"),
            (list(unexpected), "in its files are not of its class and would be left out"),
            (list(mismatched), "have another shape than config.json says"),
        )
        if names
    ]
    return f"{'; '.join(said)}; fetch the model again, or use one that is whole" if said else ""


def loaded_whole(loading: tuple[Any, Mapping[str, Any]], folder: Path) -> Any:
    """The model of `from_pretrained(…, output_loading_info=True)`; RecipeError unless every weight arrived."""
    model, info = loading
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    if told := disagreement(info["missing_keys"], info["unexpected_keys"], mismatched):
        raise broken_model(f"{folder}: {told}")
    return model


def write_plain(folder: Path, target: Path) -> None:
    """Write a folder to `target` as plain weights of the language model alone, with its tokenizer."""
    rewriting = rewriting_of(folder)
    assert rewriting
    _check_numbers(folder, weight_headers(folder), rewriting)
    weights = read_weights(folder)
    config = causal_config(folder)
    dtype = _dtype_before(config) if rewriting.quantization else _dtype_stored(weights)
    loaded = loaded_whole(_from_weights(folder, config, weights, rewriting, dtype=dtype), folder)
    _without_codes(loaded, causal_config(folder)).save_pretrained(target)
    copy_tokenizer(folder, target)
    if (folder / GENERATION).is_file():
        shutil.copyfile(folder / GENERATION, target / GENERATION)


def _without_codes(loaded: Any, config: Any) -> Any:
    """The weights of a model in one that was never quantized, since transformers would write codes again."""
    import torch

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        plain = causal_class(config)(config)
    plain.load_state_dict(loaded.state_dict(), assign=True)
    plain.tie_weights()
    return plain


def _dtype_before(config: Any) -> Any:
    """The dtype that codes are taken back to: the one the model was trained in."""
    import torch

    return config.dtype if config.dtype in (torch.float32, torch.float16) else torch.bfloat16


def _dtype_stored(weights: Mapping[str, Any]) -> Any:
    """The dtype that most numbers are stored in."""
    sizes: Counter[Any] = Counter()
    for value in weights.values():
        sizes[value.dtype] += value.numel()
    return sizes.most_common(1)[0][0]


def _load(folder: Path, config: Any, headers: Mapping[str, WeightHeader], rewriting: Rewriting | None) -> Skeleton:
    import torch

    weights = {name: torch.empty(head.shape, dtype=torch_dtypes().get(head.dtype, torch.float32), device="meta")
               for name, head in headers.items()}  # fmt: skip
    model, info = _from_weights(folder, config, weights, rewriting, device_map="meta", ignore_mismatched_sizes=True)
    mismatched = [entry[0] for entry in info["mismatched_keys"]]
    return Skeleton(model, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]), sorted(mismatched))


def _from_weights(
    folder: Path, config: Any, weights: Mapping[str, Any], rewriting: Rewriting | None, **options: Any
) -> tuple[Any, Mapping[str, Any]]:
    """What transformers makes of weights, whether they have content or not, and its loading information."""
    import transformers

    if rewriting and rewriting.text_part:
        weights = _of_language_model(weights)
    if rewriting and rewriting.quantization:
        # the rest of the configuration, such as the size of blocks, stands in the folder
        config.quantization_config = _quantization_said(folder)
        options["quantization_config"] = getattr(transformers, DEQUANTIZED[rewriting.quantization])(dequantize=True)
    quiet_transformers()
    try:
        loading: tuple[Any, Mapping[str, Any]] = causal_class(config).from_pretrained(
            None, config=config, state_dict=dict(weights), output_loading_info=True, **options
        )
    except Exception as error:  # a field that the class does not take, or parts of one weight that do not fit together
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:SAID]}"
        raise broken_model(
            f"{folder}: transformers cannot make the model that its config.json and weights say ({told}); fetch the "
            "model again, or use one that is whole"
        ) from None
    return loading


def _of_language_model(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of the text part under the names that it has by itself; all of them where none is called so."""
    if not any(_LANGUAGE_MODEL.match(name) for name in weights):
        return dict(weights)
    found = {}
    for name, value in weights.items():
        inner, count = _LANGUAGE_MODEL.subn("", name, count=1)
        if count:
            found[inner if inner.startswith("lm_head.") else f"model.{inner}"] = value
        elif name.startswith("lm_head."):
            found[name] = value
    return found


def _check_tied(folder: Path, model: Any) -> None:
    """RecipeError where the files have two matrices that the configuration says are one.

    Transformers would keep both, and a server takes one for both.
    """
    import torch

    apart = {
        target: source
        for target, source in model.all_tied_weights_keys.items()
        if model.get_parameter(target) is not model.get_parameter(source)  # both are in the files
    }
    if not apart:
        return
    stored = _of_language_model(read_weights(folder))
    for target, source in apart.items():
        one, other = (
            next((value for name, value in stored.items() if f".{wanted}".endswith(f".{name}")), None)
            for wanted in (target, source)
        )
        if one is None or other is None or not torch.equal(one, other):
            raise broken_model(
                f"{folder}: its files have a {target} that is not {source}, and its config.json says that they are "
                "one; write tie_word_embeddings: false there, or use a copy of the model without it"
            )


def _check_numbers(folder: Path, headers: Mapping[str, WeightHeader], rewriting: Rewriting | None) -> None:
    """RecipeError where a matrix is stored as codes, and what they stand for is not told, or not there."""
    codes = {
        name: [name.removesuffix(ending) + other for other in others]
        for name, head in headers.items()
        for ending, others in CODES.items()
        if head.dtype not in FLOATS and name.endswith(ending)
    }
    if codes and not (rewriting and rewriting.quantization):
        first = next(iter(codes))
        raise broken_model(
            f"{folder}: {len(codes)} weights are {headers[first].dtype} codes, such as {first}, and config.json has no "
            f"quantization_config that says what they stand for; {UNQUANTIZED}"
        )
    lacking = [others[0] for others in codes.values() if not any(other in headers for other in others)]
    if lacking:
        raise broken_model(
            f"{folder}: {len(lacking)} quantized weights lack a part, such as {lacking[0]}; fetch the model again"
        )


def _check_floats(folder: Path, headers: Mapping[str, WeightHeader], model: Any) -> None:
    """RecipeError where what training computes with is stored as whole numbers; masks beside the weights may be."""
    names = {name for name, _ in model.named_parameters()}
    whole = [name for name, head in headers.items() if head.dtype not in FLOATS and name in names]
    if whole:
        raise broken_model(
            f"{folder}: {len(whole)} weights are {headers[whole[0]].dtype}, such as {whole[0]}, which are no numbers "
            "to train with; fetch the model again, or use one that is whole"
        )


def _quantization_said(folder: Path) -> dict[str, Any]:
    config = config_of(folder)
    said: dict[str, Any] = config.get("quantization_config") or text_config(config)["quantization_config"]
    return said
