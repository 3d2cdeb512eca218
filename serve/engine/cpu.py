"""What is put right in vLLM's CPU build, as a vLLM plugin: LoRA, and rotary positions of latent attention."""

from typing import Any

import vllm

from serve.engine.cpu_lora import RowwisePunicaWrapper
from serve.engine.cpu_rotary import correct_rotary

WRITTEN_FOR = ("0.29.0",)
"""The vLLM versions whose interfaces this was read from and tested with."""


def register() -> None:
    """Correct vLLM where it runs on a CPU; other platforms are left alone.

    Raises RuntimeError on a vLLM version it was not written for, rather than answer with another model's weights.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    if vllm.__version__.split("+")[0] not in WRITTEN_FOR:
        raise RuntimeError(
            f"vLLM {vllm.__version__}: answers on a CPU are known to be correct with {', '.join(WRITTEN_FOR)} only; "
            "install that version"
        )
    wrapper = f"{RowwisePunicaWrapper.__module__}.{RowwisePunicaWrapper.__qualname__}"
    platform: Any = type(current_platform)
    platform.get_punica_wrapper = classmethod(lambda cls: wrapper)
    correct_rotary()


class RequireCorrections:
    """Worker extension: vLLM imports it in the process that computes, or does not start.

    An entry point that is not found is passed over in silence; `--worker-extension-cls` is not.
    """

    register()
