"""The fused forward and backward pass against peft's own."""

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import Linear

from pipelines.train.fused_lora import fuse

ROWS, TOKENS, WIDTH = 2, 5, 12


class TwoLayers(torch.nn.Module):
    """One layer with a bias and one without, so that gradients of inputs count too."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(WIDTH, 20)
        self.down = torch.nn.Linear(20, 7, bias=False)

    def forward(self, x: torch.Tensor) -> Any:
        return self.down(torch.relu(self.up(x)))


def adapted(**config: Any) -> Any:
    torch.manual_seed(0)
    config = {"r": 3, "lora_alpha": 8, "target_modules": ["up", "down"], **config}
    model = get_peft_model(TwoLayers().double(), LoraConfig(**config), autocast_adapter_dtype=False).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros at the start, which would hide a fault
            torch.nn.init.normal_(parameter)
    return model


def outcome(model: Any) -> list[torch.Tensor]:
    """Output, gradient of the input, gradients of what is trained."""
    x = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    output = model(x)
    output.square().sum().backward()
    assert x.grad is not None
    return [output.detach(), x.grad, *(p.grad for p in model.parameters() if p.requires_grad and p.grad is not None)]


@pytest.mark.parametrize("rslora", [False, True])
def test_outputs_and_gradients_are_pefts(rslora: bool) -> None:
    theirs, ours = adapted(use_rslora=rslora), adapted(use_rslora=rslora)
    assert fuse(ours) == 2
    expected, got = outcome(theirs), outcome(ours)
    assert len(expected) == len(got) == 2 + 4
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_frozen_weights_get_no_gradient() -> None:
    model = adapted()
    fuse(model)
    outcome(model)
    frozen = [p for name, p in model.named_parameters() if "lora_" not in name]
    assert frozen and all(p.grad is None for p in frozen)


@pytest.mark.parametrize("config", [{"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_more_than_products_stays_with_peft(config: dict[str, Any]) -> None:
    assert fuse(adapted(**config)) == 0


def test_a_switched_off_adapter_is_left_out() -> None:
    model = adapted()
    x = torch.randn(ROWS, TOKENS, WIDTH, dtype=torch.float64)
    with model.disable_adapter():
        base = model(x)
    fuse(model)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base)
    assert not torch.allclose(model(x), base)


def test_inputs_in_another_precision_take_pefts_way() -> None:
    model = adapted().float()
    fuse(model)
    layer = next(module for module in model.modules() if type(module) is Linear)
    layer.base_layer.bfloat16()
    x = torch.randn(TOKENS, WIDTH, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16
