"""What runs on CUDA devices only: flash attention over packed samples, and the loss by liger's kernels."""

import pytest
import torch

from pipelines.train.attention import _flash, _one_by_one, register
from pipelines.train.samples import collate
from pipelines.train.trainer import summed_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("groups", [8, 2])
def test_flash_attention_over_samples_is_attention_of_each_sample(window: int | None, groups: int) -> None:
    torch.manual_seed(0)
    bounds = torch.tensor([0, 1, 300, 777, 1024], dtype=torch.int32, device="cuda")
    shapes = [(1, 8, 1024, 64), (1, groups, 1024, 64), (1, groups, 1024, 64)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]
    weight = torch.randn(1, 8, 1024, 64, device="cuda")

    def outputs_of(attend: object, *arguments: object) -> list[torch.Tensor]:
        leaves = [tensor.clone().requires_grad_() for tensor in inputs]
        output = attend(*leaves, None, *arguments)  # type: ignore[operator]
        (output.float() * weight).sum().backward()
        return [output, *(leaf.grad for leaf in leaves if leaf.grad is not None)]

    flash = outputs_of(_flash, bounds, 477, window)
    plain = outputs_of(_one_by_one, 0.0, bounds, window)
    assert len(flash) == len(plain) == 4
    for ours, theirs in zip(flash, plain, strict=True):
        torch.testing.assert_close(ours.float(), theirs.float(), atol=0.05, rtol=0.05)


def test_the_fused_loss_and_its_gradient_are_the_plain_ones() -> None:
    pytest.importorskip("liger_kernel")
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2
    from transformers import AutoModelForCausalLM, Qwen2Config

    register()
    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="danlu_per_sample").cuda()
    ids = torch.randint(1000, (300,)).numpy()
    labels = ids.copy()
    labels[:50] = -100
    batch = {
        name: value.cuda() if isinstance(value, torch.Tensor) else value
        for name, value in collate([[(ids[:100], labels[:100]), (ids[100:], labels[100:])]]).items()
    }
    plain = summed_loss(model, batch, fused=False)
    plain.backward()
    gradient = model.model.embed_tokens.weight.grad.clone()
    model.zero_grad()
    apply_liger_kernel_to_qwen2(model=model)
    fused = summed_loss(model, batch, fused=True)
    fused.backward()
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(model.model.embed_tokens.weight.grad, gradient, rtol=1e-3, atol=1e-3)
