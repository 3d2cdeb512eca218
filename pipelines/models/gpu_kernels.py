"""Packages whose kernels transformers computes recurrent and convolutional layers with."""

import sys

PACKAGES = ("fla", "causal_conv1d", "mamba_ssm")
"""Transformers takes them wherever they can be imported, and they read the memory of GPUs alone."""


def without_gpu_kernels() -> None:
    """Compute by PyTorch alone in this process.

    To be called before transformers imports a model's class, and only in a process that has no model on a GPU.
    """
    for package in PACKAGES:
        sys.modules.setdefault(package, None)  # type: ignore[arg-type]  # importing it is an ImportError from now on
