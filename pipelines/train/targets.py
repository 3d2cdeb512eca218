"""Which weights an adapter trains: by the recipe's targets, never on a router, on experts where the recipe says so.

Targets are names in memory. Transformers joins the experts of a layer into one tensor while it loads them, so a name
that the experts have on disk is none that an adapter could take by itself.

Imported in training workers and where models are checked only: torch and peft stand behind it.
"""

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from inspect import getsource
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from pipelines.errors import Problem, nearest
from pipelines.recipe.train import Train
from pipelines.train.peft_warnings import peft_warnings_off

KEY = "train.lora.target_modules"

_ROUTER_CLASS = re.compile(r"Router|Gating|TopKGate|MoE\w*Gate$")
_EXPERT_ON_DISK = re.compile(r"\.experts\.\d+\.")
_READ_BY_HAND = re.compile(r"\bself\.(\w+)\.(?:weight|bias)\b(?!\.(?:dtype|device))")


@dataclass(frozen=True)
class Trained:
    """What an adapter trains of a model: parameters of the adapter and of the model, and the modules it sits on."""

    parameters: int
    of: int
    modules: list[str]

    def __str__(self) -> str:
        """For people: the share, and the kinds of modules."""
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in self.modules}))
        return f"{self.parameters:,} of {self.of:,} weights ({self.parameters / self.of:.2%}), on {kinds}"


def adapter_config(section: Train, model: Any) -> Any:
    """The recipe's LoRA as peft's configuration for a model: that of the adapter it goes on from, if there is one."""
    from peft import LoraConfig

    lora = section.lora
    if section.adapter is not None:
        config = LoraConfig.from_pretrained(str(Path(section.adapter).expanduser()))
        config.lora_dropout = lora.lora_dropout
        config.inference_mode = False
        return config
    options = lora.model_dump(exclude={"target_experts"})
    if experts := experts_of(model):
        names = _matching(lora.target_modules, _linear(model))
        # peft takes the names that experts had on disk for the experts, also where another layer is called so now
        renamed = [name for name in names if name.rpartition(".")[2] in _renamed_by_peft(model)]
        options["target_modules"] = sorted(set(names) - set(renamed))
        options["target_parameters"] = sorted(
            {*(f"{name}.weight" for name in renamed), *(experts if lora.target_experts else ())}
        )
    elif lora.target_modules == "all-linear" and (others := routers_of(model) | fixed_layers(model).keys()):
        options["exclude_modules"] = sorted(others)
    config_class: Any = LoraConfig  # peft types alpha as int, and takes a float
    return config_class(**options, task_type="CAUSAL_LM")


def experts_of(model: Any) -> list[str]:
    """The parameters that hold the matrices of all experts of a layer, [experts, out, in] or [experts, in, out]."""
    return [
        f"{name}.{parameter}" if name else parameter
        for name, module in model.named_modules()
        if not isinstance(module, torch.nn.modules.conv._ConvNd)
        for parameter, value in module.named_parameters(recurse=False)
        if value.ndim == 3
    ]


def matrices_of(model: Any) -> dict[str, tuple[int, int]]:
    """The weights of linear layers and embeddings by their names, [out, in]; without those that are never adapted."""
    fixed = routers_of(model) | fixed_layers(model).keys()
    return {
        f"{name}.weight": (module.weight.shape[0], module.weight.shape[1])
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding | Conv1D) and name not in fixed
    }


def routers_of(model: Any) -> set[str]:
    """The linear layers that deal tokens out to experts, or weigh a shared one."""
    roots = set()
    for name, module in model.named_modules():
        parent, _, leaf = name.rpartition(".")
        if _ROUTER_CLASS.search(type(module).__name__):
            roots.add(name)
        elif leaf == "experts":
            block = model.get_submodule(parent)
            roots |= {f"{parent}.{child}" for child, _ in block.named_children() if _routes(child)}
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    return {name for name in linear if any(name == root or name.startswith(f"{root}.") for root in roots)}


def fixed_layers(model: Any) -> dict[str, str]:
    """The linear layers on which an adapter would not do what it was trained to do, with why; not the vocabulary's end.

    Layers of a state space (Mamba) hand the matrices of others to a kernel, past an adapter on them; where blocks share
    a matrix (Zamba 2), merging would add to each the adapters of all; and what is linear by its class and computes
    something else (DeepSeek-V4: each group by itself) has an output that no adapter of peft's fits.
    """
    uses = Counter(id(value) for _, value in model.named_parameters(remove_duplicate=False))
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    linear = {name: layer for name, layer in linear.items() if layer is not model.get_output_embeddings()}
    found = {
        name: "shares its matrix with another layer" for name, layer in linear.items() if uses[id(layer.weight)] > 1
    }
    for name, layer in linear.items():
        parent, _, leaf = name.rpartition(".")
        kind: Any = type(model.get_submodule(parent))
        own = type(layer)
        if leaf in _read_by_hand(kind):
            found[name] = f"is read by {kind.__name__} past an adapter"
        elif own.__module__.startswith("transformers.models.") and own.forward is not torch.nn.Linear.forward:
            found[name] = f"is a {own.__name__}, whose output no adapter fits"
    return found


@cache
def _read_by_hand(kind: type) -> frozenset[str]:
    """The children of a module whose matrices its source reads, instead of calling them."""
    return frozenset(_READ_BY_HAND.findall(getsource(kind)))


def _routes(name: str) -> bool:
    return "router" in name or ("gate" in name and "proj" not in name)


def check_targets(section: Train, model: Any, on_disk: Iterable[str]) -> tuple[Trained | None, list[Problem]]:
    """What the section's adapter trains of a model whose weights may be on the device `meta`, and what is wrong.

    `on_disk`: the names of the weights in the files.
    """
    problems = _wrong_targets(section, model, list(on_disk)) if section.adapter is None else []
    if problems:
        return None, problems
    from peft import get_peft_model

    made = copy.deepcopy(model)
    try:
        with peft_warnings_off():
            adapted: Any = get_peft_model(made, adapter_config(section, made), low_cpu_mem_usage=True)
    except (ValueError, NotImplementedError) as error:  # as peft says what it cannot adapt
        return None, [Problem(KEY, f"peft: {error}", on_every_machine=True)]
    modules = sorted({name.partition(".lora_")[0] for name, _ in adapted.named_parameters() if ".lora_" in name})
    names = [name.removeprefix("base_model.model.").removesuffix(".base_layer") for name in modules]
    trains = sum(value.numel() for value in adapted.parameters() if value.requires_grad)
    whole = sum(value.numel() for value in model.parameters())
    problems = [*_ends_of_tied(model, names), *_other_layers(section, model, names)]
    return Trained(trains, whole, sorted(set(names))), problems


def _wrong_targets(section: Train, model: Any, on_disk: list[str]) -> list[Problem]:
    targets, wants_experts = section.lora.target_modules, section.lora.target_experts
    experts, routers, fixed = experts_of(model), routers_of(model), fixed_layers(model)
    problems = []
    if wants_experts and not experts:
        message = "the model has no experts; leave it out"
        problems.append(Problem("train.lora.target_experts", message, on_every_machine=True))
    if targets == "all-linear":
        return problems
    if isinstance(targets, str):
        try:
            re.compile(targets)
        except re.error as error:
            return [*problems, _problem(f"{targets!r} is no pattern ({error}); give a list of names, or all-linear")]
    modules = [name for name, module in model.named_modules() if name and getattr(module, "weight", None) is not None]
    # peft itself sees to layers that were renamed since, so names on disk count too
    known = [*modules, *(name.removesuffix(".weight") for name in on_disk if not _EXPERT_ON_DISK.search(name))]
    of_experts = [name.removesuffix(".weight") for name in on_disk if _EXPERT_ON_DISK.search(name)]
    for target in [targets] if isinstance(targets, str) else targets:
        asked = _as_given(targets, target)
        if named := _matching(asked, [*sorted(routers), *_router_weights(model)]):
            problems.append(_problem(f"{target!r} is a router ({named[0]}), which is never trained; leave it out"))
        elif named := _matching(asked, fixed):
            problems.append(_problem(f"{target!r} names {named[0]}, which {fixed[named[0]]}; leave it out"))
        elif experts and (_matching(asked, of_experts) or _matching(asked, experts)) and not wants_experts:
            problems.append(
                _problem(
                    f"{target!r} names experts, which are trained all together or not at all; set "
                    "train.lora.target_experts: true and name other layers here, or use all-linear"
                )
            )
        elif experts and not _matching(asked, _linear(model)):
            problems.append(
                _problem(f"no layer outside the experts matches {target!r}; {_near(target, _linear(model))}")
            )
        elif not _matching(asked, known):
            what = "no module of the model matches" if isinstance(targets, str) else "the model has no module"
            near = f"a text is a pattern of whole names; give [{target}]" if _matching([target], known) else ""
            problems.append(_problem(f"{what} {target!r}; {near or _near(target, known)}"))
    return problems


def _other_layers(section: Train, model: Any, modules: Iterable[str]) -> list[Problem]:
    """Where the section names layers beside an adapter to go on from, which has others."""
    if section.adapter is None:
        return []
    own = adapter_config(section, model).target_modules or []
    asked = section.lora.target_modules
    if asked == own or (not isinstance(asked, str) and not isinstance(own, str) and set(asked) == set(own)):
        return []
    if set(_matching(asked, _linear(model))) == set(modules):
        return []
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in modules}))
    return [_problem(f"{asked!r}, and the adapter has other layers ({kinds}); leave the key out")]


def _as_given(targets: str | list[str], target: str) -> str | list[str]:
    return target if isinstance(targets, str) else [target]


def _near(target: str, names: list[str]) -> str:
    return nearest(target, {name.rpartition(".")[2] for name in names})


def _problem(message: str) -> Problem:
    return Problem(KEY, message, on_every_machine=True)


def _router_weights(model: Any) -> list[str]:
    """Routers that are no linear layers, but hold a matrix themselves."""
    routers = [(name, module) for name, module in model.named_modules() if _ROUTER_CLASS.search(type(module).__name__)]
    return [name for name, module in routers if isinstance(getattr(module, "weight", None), torch.nn.Parameter)]


def _ends_of_tied(model: Any, modules: Iterable[str]) -> list[Problem]:
    """Adapters on one end of a vocabulary whose ends are one matrix: merging would change the other too."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return []
    ends = {id(end): end for end in (model.get_input_embeddings(), model.get_output_embeddings()) if end is not None}
    names = {name for name, module in model.named_modules() if id(module) in ends}
    taken = sorted(names & set(modules))
    return [
        _problem(
            f"{name} shares its matrix with the other end of the vocabulary (tie_word_embeddings), so an adapter on it "
            "cannot be merged; leave it out"
        )
        for name in taken
    ]


def _linear(model: Any) -> list[str]:
    """The linear layers that may be adapted: neither the vocabulary's end nor routers nor fixed layers."""
    output, fixed = model.get_output_embeddings(), routers_of(model) | fixed_layers(model).keys()
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D) and module is not output and name not in fixed
    ]


def _matching(targets: str | list[str], names: Iterable[str]) -> list[str]:
    """The names that targets stand for, by peft's rules; all-linear: every one."""
    if targets == "all-linear":
        return list(names)
    if isinstance(targets, str):
        return [name for name in names if re.fullmatch(targets, name)]
    return [name for name in names if any(name == target or name.endswith(f".{target}") for target in targets)]


def _renamed_by_peft(model: Any) -> Mapping[str, str]:
    """The names that peft takes for experts of this kind of model."""
    from peft.utils import transformers_weight_conversion as conversion

    library: Any = conversion
    kind = library._MODEL_TO_CONVERSION_PATTERN.get(model.config.model_type)
    mapping: Mapping[str, str] = library._MOE_TARGET_MODULE_MAPPING.get(kind, {})
    return mapping
