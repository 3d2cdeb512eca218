"""jieba's dictionary, read anew by every process.

jieba would keep it in a file of the temporary folder, whose name everybody on the machine knows, and believe what it
finds there. That saves a tenth of a second.
"""

import logging
import tempfile
from typing import Any

from pipelines.owned_folder import owned_folder


def segmenter() -> Any:
    """A `jieba.Tokenizer` with its own dictionary."""
    import jieba

    jieba.setLogLevel(logging.WARNING)
    made = jieba.Tokenizer()
    with owned_folder(tempfile.gettempdir(), "danlu-jieba-") as folder:
        made.tmp_dir = folder
        made.initialize()
    return made
