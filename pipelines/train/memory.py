"""How much memory one training worker needs, by estimate, and how much there is.

weights      of the model, in the dtype that is trained in, or 4 bits and their scales
gradients    of what is trained
optimizer    Adam's two moments in float32, and the float32 copy that DeepSpeed keeps
activations  of one forward pass that fills max_length, with its logits: the most there can be
runtime      Python, libraries, DeepSpeed's buffers
"""

import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pipelines.errors import HardwareError
from pipelines.models.convert import family_of
from pipelines.models.skeleton import check_weights, text_config
from pipelines.recipe.train import Train

GIB = 1 << 30
BUCKET = 50_000_000
"""Elements that DeepSpeed reduces at a time, in two buffers, and that ZeRO-3 fetches ahead."""

GATHERED = 1_000_000_000
"""Elements that ZeRO-3 may hold whole at a time, DeepSpeed's default."""

LIBRARIES = 7 * GIB // 8
"""What a worker holds besides: Python with torch and transformers, threads and their arenas, or a CUDA context."""

NF4_BYTES = 0.516
"""Bytes of a weight in NF4 with double quantization: 4 bits, and 0.127 bits of scales (arXiv:2305.14314)."""

EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "top_k_experts")
"""What configurations call the number of experts that a token goes to."""

USABLE = 0.9
"""Share of the free memory that an estimate may take up; the rest is lost to fragmentation."""


@dataclass(frozen=True)
class Shapes:
    """What a model's memory follows from: counts of parameters, and the widths of one layer, in elements."""

    parameters: int
    matrices: dict[str, tuple[int, int]]
    hidden: int
    intermediate: int
    layers: int
    query: int
    key_value: int
    vocabulary: int
    experts: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """The tensors that hold all experts of a layer, [experts, out, in] or [experts, in, out]."""
    experts_per_token: int = 1


@dataclass(frozen=True)
class Estimate:
    """Bytes of one worker, by purpose."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    runtime: int

    @property
    def total(self) -> int:
        """Bytes of one worker."""
        return sum(asdict(self).values())

    def __str__(self) -> str:
        """For people: the total and its parts, in GiB."""
        parts = ", ".join(f"{name} {gib(size)}" for name, size in asdict(self).items())
        return f"{gib(self.total)} GiB a worker ({parts})"


def gib(size: float) -> str:
    """Bytes as GiB with one decimal, or two below one."""
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2f}"


def shapes_of(folder: Path) -> Shapes | None:
    """The shapes that a model folder has in memory, from its configuration and the headers of its weight files.

    None where the configuration lacks what decoders usually say. RecipeError where a weight would not arrive.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = text_config(config) or config
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if any(name not in config for name in needed):
        return None
    # here, because torch and peft stand behind it
    from pipelines.train.targets import experts_of, matrices_of

    model = check_weights(folder).model
    experts = {name: tuple(model.get_parameter(name).shape) for name in experts_of(model)}
    at_once = next((config[name] for name in EXPERTS_PER_TOKEN if name in config), 1)
    widths = [width for shape in experts.values() for width in shape[1:] if width != config["hidden_size"]]
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    return Shapes(
        parameters=sum(value.numel() for value in model.parameters()),
        matrices=matrices_of(model),
        hidden=config["hidden_size"],
        intermediate=max(config["intermediate_size"], at_once * max(widths, default=0)),
        layers=config["num_hidden_layers"],
        query=heads * width,
        key_value=(config.get("num_key_value_heads") or heads) * width,
        vocabulary=config["vocab_size"],
        experts=experts,
        experts_per_token=at_once,
    )


def estimate(section: Train, shapes: Shapes, zero_stage: int) -> Estimate:
    """What one worker needs at a stage of ZeRO."""
    width = _width(section)
    ranks = section.num_workers
    trained = trained_parameters(section, shapes)
    weights = _weight_bytes(section, shapes, width) + (0 if section.method == "full" else trained * width)
    gathered = 0
    if zero_stage == 3:
        gathered = min(weights, GATHERED * width) + min(
            weights, BUCKET * width
        )  # beside its own share; and fetched ahead
        weights //= ranks
    buffers = 2 * min(BUCKET, trained) * width if zero_stage else 0
    return Estimate(
        weights=weights,
        gradients=_gradient_bytes(trained, width, zero_stage, ranks),
        optimizer=_optimizer_bytes(section, trained, width, zero_stage),
        activations=_activation_bytes(section, shapes, width),
        runtime=LIBRARIES + buffers + gathered,
    )


def free_memory(workers: int, gpu: bool) -> int | None:
    """Free bytes for each of `workers` on this machine: of its smallest GPU, or their share of the main memory.

    None where a GPU is asked for and none is here.
    """
    if gpu:
        return min(_gpu_memory(), default=None)
    import psutil

    free = int(psutil.virtual_memory().available)
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int(used.read_text()))
    return free // workers


def _gpu_memory() -> list[int]:
    """Free bytes of each GPU of this machine."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    result = subprocess.run(query, capture_output=True, text=True, timeout=30)
    return [int(line) << 20 for line in result.stdout.split()] if result.returncode == 0 else []


def gpus_here() -> int:
    """GPUs of this machine."""
    return len(_gpu_memory())


def uses_gpu(section: Train) -> bool:
    """Whether its workers ask for GPUs."""
    return section.resources_per_worker.get("GPU", 0) > 0


def _width(section: Train) -> int:
    """Bytes of one number; `auto` is bfloat16 on GPUs, and at most float32 elsewhere."""
    return 4 if section.dtype == "float32" or (section.dtype == "auto" and not uses_gpu(section)) else 2


def trained_parameters(section: Train, shapes: Shapes) -> int:
    """Parameters that are trained."""
    if section.method == "full":
        return shapes.parameters
    lora = section.lora
    inner = linear(shapes)
    if isinstance(lora.target_modules, list):
        ends = tuple(lora.target_modules)
        inner = {name: shape for name, shape in inner.items() if name.removesuffix(".weight").endswith(ends)}
    trained = sum(lora.r * (out + into) + (out if lora.use_dora else 0) for out, into in inner.values())
    if lora.target_experts:
        trained += sum(lora.r * number * (out + into) for number, out, into in shapes.experts.values())
    return trained


def linear(shapes: Shapes) -> dict[str, tuple[int, int]]:
    """The matrices of the layers, without the vocabulary's two ends."""
    return {name: shape for name, shape in shapes.matrices.items() if shapes.vocabulary not in shape}


def _weight_bytes(section: Train, shapes: Shapes, width: int) -> int:
    if section.method != "qlora":
        return shapes.parameters * width
    quantized = sum(out * into for out, into in linear(shapes).values())
    return int(quantized * NF4_BYTES) + (shapes.parameters - quantized) * width


def _gradient_bytes(trained: int, width: int, zero_stage: int, ranks: int) -> int:
    """As they are computed, and, where that is in 16 bits, their sum in float32."""
    summed = 4 if width == 2 else 0
    if zero_stage == 3:
        return trained * 4 // ranks
    if zero_stage == 2:
        return trained * (width + summed) // ranks
    return trained * width + trained * summed // (ranks if zero_stage else 1)


def _optimizer_bytes(section: Train, trained: int, width: int, zero_stage: int) -> int:
    """Two moments in float32, and DeepSpeed's own copy; none of it on a GPU that it is kept away from."""
    if section.offload_optimizer and zero_stage and uses_gpu(section):
        return 0
    return trained * 12 // section.num_workers if zero_stage else trained * (12 if width == 2 else 8)


def _activation_bytes(section: Train, shapes: Shapes, width: int) -> int:
    """What autograd keeps of one forward pass, by what each layer multiplies; attention keeps no scores."""
    tokens = section.max_length * section.per_device_train_batch_size // section.sequence_parallel_size
    attention = width * (3 * shapes.query + 2 * shapes.key_value)
    norms = 2 * (8 + width) * shapes.hidden  # computed in float32
    layer = attention + norms + width * 4 * shapes.intermediate
    if section.method != "full" and section.lora.lora_dropout:  # each module keeps its own input after dropout
        layer += width * (5 * shapes.hidden + shapes.query + shapes.intermediate)
    kept = layer * shapes.layers
    if section.gradient_checkpointing:
        kept = width * shapes.hidden * shapes.layers + layer
    logits = shapes.vocabulary * 12  # where the backward pass begins: log-probabilities and two gradients, in float32
    return tokens * (kept + logits)


def describe(section: Train) -> str:
    """What `danlu check` says: the estimate against the memory of this machine, and what to lower.

    Empty for a folder without a model, of which the stage says so itself.
    """
    shapes = shapes_here(section)
    if shapes is None:
        if "://" not in section.model and not (Path(section.model).expanduser() / "config.json").is_file():
            return ""
        return f"memory: estimated once {section.model} has been fetched, or converted to safetensors, by danlu train"
    found = free_memory(section.num_workers, uses_gpu(section))
    if found is None:
        given: int = 3 if section.zero_stage == "auto" else section.zero_stage
        return f"memory: ZeRO-{given} needs {estimate(section, shapes, given)}; no GPU here to compare it with"
    try:
        stage = chosen_stage(section, shapes, found)
    except HardwareError as error:
        return f"memory: {error}"
    need = estimate(section, shapes, stage)
    fits = "fits" if need.total <= USABLE * found else f"does not fit; {advice(section)}"
    return f"memory: ZeRO-{stage} needs {need}; free: {gib(found)} GiB a worker: {fits}"


def shapes_here(section: Train) -> Shapes | None:
    """The shapes of a model that lies in a folder and is trained as it is."""
    folder = Path(section.model).expanduser()
    is_here = (folder / "config.json").is_file() and family_of(folder) is None
    return shapes_of(folder) if is_here else None


def describe_merge(section: Train) -> str:
    """What merging takes against the memory of this machine, as merge.py does it; empty where that is not known."""
    shapes = shapes_here(section)
    found = free_memory(1, gpu=False)
    if shapes is None or found is None:
        return ""
    need = merge_bytes(shapes)
    fits = "fits" if need <= USABLE * found else "does not fit; remove the section merge, or merge on a larger machine"
    return f"memory: {gib(need)} GiB in one process, in float32; free: {gib(found)} GiB: {fits}"


def merge_bytes(shapes: Shapes) -> int:
    """What merging needs: Python, its libraries, and all weights in float32."""
    return 4 * shapes.parameters + LIBRARIES


def chosen_stage(section: Train, shapes: Shapes, found: int) -> int:
    """The stage of ZeRO that the section asks for; `auto` is the lowest that fits into `found` bytes a worker.

    In 16 bits that is 1 at least, which costs one worker nothing: ZeRO-0 does not store the weights it keeps in
    float32, so what it leaves would be rounded. HardwareError where none fits.
    """
    if section.zero_stage != "auto":
        return section.zero_stage
    most = 2 if section.lora.target_experts else 3
    for stage in range(0 if _width(section) == 4 and not section.offload_optimizer else 1, most + 1):
        if estimate(section, shapes, stage).total <= USABLE * found:
            return stage
    raise HardwareError(
        f"no stage of ZeRO fits: ZeRO-{most} needs {estimate(section, shapes, most)}, and {gib(found)} GiB are free; "
        f"{advice(section)}, or give train.zero_stage as a number to try nevertheless"
    )


def advice(section: Train) -> str:
    """What to change in the recipe so that training takes less memory, most effective first."""
    ways = []
    if section.per_device_train_batch_size > 1:
        ways.append("lower train.per_device_train_batch_size")
    if not section.gradient_checkpointing:
        ways.append("set train.gradient_checkpointing: true")
    ways.append("lower train.max_length")
    if not uses_gpu(section) and section.num_workers > 1:
        ways.append("lower train.num_workers")
    if section.method == "full":
        ways.append("use train.method: lora")
    elif section.method == "lora":
        ways.append("use train.method: qlora")
    if section.method == "full" and uses_gpu(section) and not section.offload_optimizer:
        ways.append("set train.offload_optimizer: true")
    if section.zero_stage != "auto" and section.zero_stage < 3 and section.num_workers > 1:
        ways.append("raise train.zero_stage")
    return ", ".join(ways[:-1]) + (", or " if ways[:-1] else "") + ways[-1]
