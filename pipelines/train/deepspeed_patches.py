"""What DeepSpeed does differently where it runs without ZeRO, made as it is in the other stages."""

from typing import Any

from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import clip_grad_norm_


def keep_norm(engine: Any) -> None:
    """Let the engine report the gradient norm in float32 too; it clips there by a norm that it forgets."""

    def clip() -> None:
        parameters, most = engine.module.parameters(), engine.gradient_clipping()
        engine._global_grad_norm = clip_grad_norm_(parameters=parameters, max_norm=most, mpu=engine.mpu)

    engine.clip_fp32_gradients = clip


def forget_trial_step(engine: Any) -> None:
    """Let the optimizer of a run that begins be as new.

    In half precision DeepSpeed has it take a step with gradients of zero, to see that its memory is there. Adam counts
    that step: its first real ones would be up to a quarter shorter.
    """
    optimizer = engine.optimizer
    if not isinstance(optimizer, FP16_UnfusedOptimizer):
        return
    optimizer.optimizer.state.clear()
    for master, weights in zip(optimizer.fp32_groups, optimizer.fp16_groups, strict=True):
        for own, given in zip(master, weights, strict=True):
            own.data.copy_(given.data)  # weight decay has touched it
