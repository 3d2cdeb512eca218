"""Transformers and what it loads, without their own warnings and bars."""

import logging as standard_logging
from typing import Any


def quiet_transformers() -> None:
    """Keep transformers' warnings and bars from the terminal of this process; ours shows progress once."""
    from transformers.utils import logging

    library: Any = logging
    library.set_verbosity_error()
    library.disable_progress_bar()
    standard_logging.getLogger("bitsandbytes").setLevel(standard_logging.ERROR)  # which peft loads, used or not
