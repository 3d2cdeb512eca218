"""LoRA's forward and backward pass as matrix products that accumulate in place.

peft computes `base(x) + lora_B(lora_A(x)) * scaling`: three matrix products, then two passes over the output, and as
many over its gradient. The passes cost as much as the adapter itself, since they move memory and do no work. Here the
products add to what is there (BLAS's beta = 1): same sums, rounded once instead of three times.
"""

from types import MethodType
from typing import Any

import torch
from torch.autograd.function import once_differentiable


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ for a frozen W: x [tokens, in], A [rank, in], B [out, rank]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        output = torch.nn.functional.linear(x, weight, bias)
        inner = x @ a.T
        ctx.save_for_backward(x, weight, a, b, inner)
        ctx.scaling = scaling
        return output.addmm_(inner, b.T, alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        x, weight, a, b, inner = ctx.saved_tensors
        of_inner = (gradient @ b).mul_(ctx.scaling)
        of_b = (gradient.T @ inner).mul_(ctx.scaling)
        of_a = of_inner.T @ x
        of_x = (gradient @ weight).addmm_(of_inner, a) if ctx.needs_input_grad[0] else None
        return of_x, None, None, of_a, of_b, None


def fuse(model: Any) -> int:
    """Let every adapted linear layer of a peft model compute so, where nothing stands between its products.

    Layers with dropout, DoRA, quantized weights or several adapters stay as they are. Returns how many were changed.
    """
    from peft.tuners.lora import Linear

    layers: list[Any] = [module for module in model.modules() if type(module) is Linear and _is_plain(module)]
    for layer in layers:
        layer.forward = MethodType(_forward, layer)
    return len(layers)


def _is_plain(layer: Any) -> bool:
    names = layer.active_adapters
    if len(names) != 1 or layer.lora_variant or layer.lora_bias[names[0]] or layer.fan_in_fan_out:
        return False
    dropout = layer.lora_dropout[names[0]]
    return type(layer.base_layer) is torch.nn.Linear and isinstance(dropout, torch.nn.Identity)


def _forward(layer: Any, x: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
    base, (name,) = layer.base_layer, layer.active_adapters
    a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
    if layer.disable_adapters or layer.merged or not (x.dtype == base.weight.dtype == a.dtype):
        output: torch.Tensor = type(layer).forward(layer, x, *arguments, **named)
        return output
    tokens = x.reshape(-1, x.shape[-1])
    fused: torch.Tensor = _LoraLinear.apply(tokens, base.weight, base.bias, a, b, layer.scaling[name])
    return fused.view(*x.shape[:-1], -1)
