"""Packed attention and the fused loss against plain float32, and packed samples against each alone."""

from itertools import pairwise
from typing import Any

from benchmarks.gpu.setting import SEED, SIZES, Figures, Setting

BOUNDS = (0, 1, 300, 777, 1024)
"""Where the samples of the packed row begin and end, tokens."""
TOLERANCE = {"bfloat16": 0.05, "float32": 1e-4}
"""Largest difference that counts as equal, of values near 1: bfloat16 has 8 bits of fraction."""


def against_references(setting: Setting) -> Figures:
    """The largest differences; RuntimeError where one is above its tolerance."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    tolerance = TOLERANCE[str(dtype).removeprefix("torch.")]
    found = {"attention": _attention(device, dtype), "packed samples": _packed(device, dtype)}
    if device == "cuda":
        found["fused loss"] = _fused_loss()
    over = {name: value for name, value in found.items() if not value <= tolerance}
    if over:
        raise RuntimeError(f"above {tolerance}: {over}")
    return {**found, "tolerance": tolerance, "dtype": str(dtype).removeprefix("torch.")}


def _attention(device: str, dtype: Any) -> float:
    """Our attention over packed samples, output and gradients, against float32 attention with a mask."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from pipelines.train.attention import per_sample_attention  # torch stands behind it

    torch.manual_seed(SEED)
    shapes = [(1, heads, BOUNDS[-1], 64) for heads in (8, 2, 2)]
    given = [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]
    bounds = torch.tensor(BOUNDS, dtype=torch.int32, device=device)
    number = torch.bucketize(torch.arange(BOUNDS[-1], device=device), bounds[1:].long(), right=True)
    mask = (number[:, None] == number[None, :]).tril()
    ours = [tensor.clone().requires_grad_() for tensor in given]
    longest = max(end - begin for begin, end in pairwise(BOUNDS))
    query, key, value = ours
    output, _ = per_sample_attention(
        torch.nn.Module(), query, key, value, None, cu_seq_lens_q=bounds, max_length_q=longest
    )
    plain = [tensor.clone().float().requires_grad_() for tensor in given]
    query, key, value = plain
    expected = scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True).transpose(1, 2)
    weight = torch.randn_like(expected)
    (output.float() * weight).sum().backward()
    (expected * weight).sum().backward()
    pairs = [(output, expected), *((a.grad, b.grad) for a, b in zip(ours, plain, strict=True))]
    return max(_relative(found, wanted) for found, wanted in pairs)


def _relative(found: Any, wanted: Any) -> float:
    return float((found.float() - wanted).abs().max() / wanted.abs().max())


def _tiny(attention: str, device: str, dtype: Any) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    shape = SIZES["tiny"]
    config = Qwen2Config(
        vocab_size=shape["vocabulary"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["intermediate_size"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv"],
    )
    torch.manual_seed(SEED)
    model: Any = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return model.to(device=device, dtype=dtype)


def _packed(device: str, dtype: Any) -> float:
    """The logits of packed samples against those that each has alone, by the library's eager attention."""
    import numpy as np
    import torch

    from pipelines.train.attention import NAME, register
    from pipelines.train.samples import collate

    register()
    draw = np.random.default_rng(SEED)
    samples = []
    for length in (11, 7, 23, 64):
        tokens = draw.integers(3, SIZES["tiny"]["vocabulary"], length).astype(np.int32)
        samples.append((tokens, tokens.copy()))
    together, alone = (_tiny(name, device, dtype) for name in (NAME, "eager"))
    batch = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in collate([samples]).items()}
    for name in ("targets", "owners"):  # what the loss is taken with
        batch.pop(name)
    with torch.no_grad():
        packed = together(**batch, use_cache=False).logits[0]
        single = [alone(input_ids=torch.tensor(t)[None].long().to(device)).logits[0] for t, _ in samples]
    # of the packed row there are logits only where a next token has loss: not at the last of a sample
    return _relative(packed, torch.cat([logits[:-1] for logits in single]).float())


def _fused_loss() -> float:
    """The loss by liger's kernels, and its gradient, against the plain one."""
    import numpy as np
    import torch
    from liger_kernel.transformers import apply_liger_kernel_to_qwen2

    from pipelines.train.attention import NAME, register
    from pipelines.train.samples import collate
    from pipelines.train.trainer import summed_loss

    register()
    model = _tiny(NAME, "cuda", torch.float32)
    ids = np.random.default_rng(SEED).integers(3, SIZES["tiny"]["vocabulary"], 300).astype(np.int32)
    batch = {
        k: v.cuda() if isinstance(v, torch.Tensor) else v
        for k, v in collate([[(ids[:100], ids[:100]), (ids[100:], ids[100:])]]).items()
    }
    gradients = []
    for fused in (False, True):
        if fused:
            apply_liger_kernel_to_qwen2(model=model)
        model.zero_grad()
        loss = summed_loss(model, batch, fused=fused)
        loss.backward()
        gradients.append((loss.detach(), model.model.embed_tokens.weight.grad.clone()))
    (plain, its), (other, others) = gradients
    return max(_relative(other, plain), _relative(others, its))
