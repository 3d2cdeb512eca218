"""How much of its devices' peak a run uses: model FLOPs utilization (MFU, arXiv:2204.02311).

Counted is the work that the model needs and no more: 2 FLOPs per weight and token forward, 2 for the gradient of its
input, 2 for its own where it is trained; the output matrix counts for tokens with loss. Left out are attention's
scores, which are under 1 % at the lengths of chats, and what activation checkpointing computes again.
"""

from dataclasses import dataclass
from pathlib import Path

from pipelines.recipe.train import Train
from pipelines.train.memory import Shapes, linear, shapes_of, trained_parameters

PEAKS = {
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "RTX 4090": 165e12,
}
"""Dense 16-bit FLOPs per second, summed in float32, from the makers' data sheets; the first name that fits counts."""


@dataclass(frozen=True)
class Flops:
    """FLOPs per token, those of the output matrix per token with loss, and what all devices could do per second."""

    per_token: int
    per_loss_token: int
    peak: float

    def share(self, tokens: int, loss_tokens: int, seconds: float) -> float:
        """The share of the peak that so many tokens in so many seconds are."""
        return (self.per_token * tokens + self.per_loss_token * loss_tokens) / seconds / self.peak


def flops_of(section: Train, model: Path, device: str, devices: int) -> Flops | None:
    """The work of a section on a model folder, on so many devices of a name, as CUDA gives it.

    None where their peak or the model's shapes are not known.
    """
    peak = next((peak for name, peak in PEAKS.items() if name in device), None)
    shapes = shapes_of(model)
    return Flops(*_token_flops(section, shapes), peak * devices) if peak and shapes else None


def _token_flops(section: Train, shapes: Shapes) -> tuple[int, int]:
    """FLOPs of one token forward and backward, and of the output matrix for one token with loss."""
    weights, head = sum(out * into for out, into in linear(shapes).values()), shapes.hidden * shapes.vocabulary
    weights += sum(shapes.experts_per_token * out * into for _, out, into in shapes.experts.values())
    if section.method == "full":
        return 6 * weights, 6 * head
    return 4 * weights + 6 * trained_parameters(section, shapes), 4 * head
