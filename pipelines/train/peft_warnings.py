"""Warnings about peft's own use of transformers, which nobody who trains can mend."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def peft_warnings_off() -> Iterator[None]:
    """While in here peft may read `is_gradient_checkpointing`, which transformers 5 calls by another name."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".is_gradient_checkpointing. is deprecated", category=FutureWarning)
        yield
