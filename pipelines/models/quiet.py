"""Transformers without its own warnings and bars."""

from typing import Any


def quiet_transformers() -> None:
    """Keep transformers' warnings and bars from the terminal of this process; ours shows progress once."""
    from transformers.utils import logging

    library: Any = logging
    library.set_verbosity_error()
    library.disable_progress_bar()
