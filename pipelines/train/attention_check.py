"""Whether training computes what the layers of a model compute, told before anything starts."""

import ast
from importlib.util import find_spec
from inspect import getmodule, getsource, signature
from pathlib import Path
from typing import Any

from pipelines.errors import Problem, StageError
from pipelines.models.weight_files import SAID
from pipelines.recipe.train import Train
from pipelines.train.attention import UNDERSTOOD, require_understood

TRIAL = "danlu_trial"
"""The name of an attention that is only looked at."""


def attention_problems(section: Train, model: Path) -> list[Problem]:
    """Why the layers of a model in a folder cannot be trained as the section says; nothing where they can.

    A recurrent or convolutional layer goes from sample to sample, so that such a model trains one sample at a time.
    """
    if find_spec("transformers") is None:
        return []
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        text = AutoConfig.from_pretrained(model).get_text_config(decoder=True)
    except (ValueError, OSError, KeyError):
        return []  # what no class reads is said where the model is looked up
    if type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return []
    kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text)]
    name, problems = text.model_type, []
    types = set(getattr(text, "layer_types", None) or [])
    if stateful := has_state(kind, types):
        why = f"{name} has recurrent or convolutional layers, which go from one sample to the next"
        problems += _one_by_one_problems(section, why)
    module: Any = getmodule(kind)
    source = ast.parse(getsource(module))
    if not any("Attention" in node.name for node in ast.walk(source) if isinstance(node, ast.ClassDef)):
        return problems
    asked = _arguments_of_attention(source)
    if not asked:
        message = f"{name} computes attention outside transformers' attention interface, so samples would not be kept"
        return [*problems, Problem("train.model", f"{message} apart; use another model")]
    if unknown := asked - UNDERSTOOD:
        message = f"{name} computes attention with {', '.join(sorted(unknown))}, which training does not"
        return [*problems, Problem("train.model", f"{message}; use another model")]
    refused, bounds_arrive = _tried(kind, text, with_bounds=not stateful)
    if refused:
        return [*problems, Problem("train.model", refused)]
    takes_places = "position_ids" in signature(kind.forward).parameters
    if not stateful and not (bounds_arrive and takes_places):
        problems += _one_by_one_problems(section, f"{name} does not tell its layers where samples begin")
    elif not stateful and (why := _follows_whole_row(section, text)):
        problems += _one_by_one_problems(section, f"{name} {why}")
    chunk = getattr(text, "attention_chunk_size", None)
    if chunk and "chunked_attention" in types and section.max_length > chunk:
        message = (
            f"{name} attends within chunks of {chunk} tokens, which training does not compute; give at most {chunk}"
        )
        problems.append(Problem("train.max_length", message))
    return problems


def _follows_whole_row(section: Train, config: Any) -> str:
    """Why the places of a sample would mean something else beside a longer one in its row; empty where they do not.

    transformers chooses the frequencies of a row by its longest sample (Phi 3.5, Phi 4 mini: other ones above 4,096
    tokens), and Llama 4 scales queries by their place in the whole row.
    """
    given = getattr(config, "rope_parameters", None) or {}
    each = [part for part in given.values() if isinstance(part, dict)] or [given]  # of each kind of layer, or of all
    for rope in each:
        kind = rope.get("rope_type") or "default"
        limit = rope.get("original_max_position_embeddings") or getattr(config, "max_position_embeddings", None)
        if (kind == "longrope" or "dynamic" in kind) and limit and section.max_length > limit:
            return (
                f"has other rotary frequencies ({kind}) in rows with a sample of more than {limit} tokens; lower "
                f"train.max_length to {limit}, or train one sample at a time"
            )
    tokens = section.max_length * section.per_device_train_batch_size
    if getattr(config, "attn_temperature_tuning", False) and tokens >= config.floor_scale:
        return f"scales attention by places in the whole row from {config.floor_scale} tokens on"
    return ""


def _one_by_one_problems(section: Train, why: str) -> list[Problem]:
    """What to change so that the section trains one sample at a time."""
    one_by_one = {"packing": False, "per_device_train_batch_size": 1, "sequence_parallel_size": 1}
    return [
        Problem(f"train.{key}", f"{why}; give {str(wanted).lower()}")
        for key, wanted in one_by_one.items()
        if getattr(section, key) != wanted
    ]


def _tried(kind: Any, config: Any, with_bounds: bool) -> tuple[str, bool]:
    """What a model asks of attention that is not computed, and whether the bounds of samples reach it.

    It is called without content, on the device `meta`, and runs there as far as nothing depends on values. Where it
    does not come to attention, transformers' own word is taken that bounds reach it.
    """
    import torch
    from transformers import AttentionInterface, AutoModelForCausalLM

    arrived = []

    def attend(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, scaling: Any = None, **options: Any
    ) -> tuple[Any, None]:
        require_understood(module, attention_mask, options)
        arrived.append("cu_seq_lens_q" in options)
        return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3]), None

    AttentionInterface.register(TRIAL, attend)
    try:
        with torch.device("meta"), torch.no_grad():
            model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=TRIAL, dtype=torch.bfloat16)
            ids, places = torch.zeros(1, 8, dtype=torch.int64), torch.empty(3, dtype=torch.int32)
            bounds = {"cu_seq_lens_q": places, "cu_seq_lens_k": places, "max_length_q": 4, "max_length_k": 4}
            model(input_ids=ids, position_ids=ids, use_cache=False, **(bounds if with_bounds else {}))
    except StageError as error:
        return str(error).removeprefix("train.model: "), False
    except RuntimeError:  # a step that depends on values, which meta has none of
        if not arrived:
            return "", bool(kind._supports_attention_backend)
    except Exception as error:
        if not arrived:
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:SAID]}"
            return f"{config.model_type} cannot be called ({told}); use another model", False
    return "", bool(arrived) and all(arrived)


ATTENTION_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""transformers' names of layers in which a token sees others by attention alone."""


def has_state(kind: Any, layer_types: set[str]) -> bool:
    """Whether a model class has layers that hand a state, or a token's neighbours, from one token to the next."""
    return bool(kind._is_stateful or layer_types - ATTENTION_LAYERS)


def _arguments_of_attention(source: ast.Module) -> set[str]:
    """The keywords with which the source of a model calls transformers' attention interface."""
    calls = (node for node in ast.walk(source) if isinstance(node, ast.Call))
    own = (call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "attention_interface")
    return {keyword.arg for call in own for keyword in call.keywords if keyword.arg}
