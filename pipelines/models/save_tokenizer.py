"""Tokenizers beside weights that are left, in a form that transformers 4 and other programs load too."""

import json
import shutil
from pathlib import Path
from typing import Any

from pipelines.models.tokenizer import MORE_TEMPLATES, TEMPLATE

CONFIG = "tokenizer_config.json"
FILES = (
    *("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json", TEMPLATE, "chat_template.json"),
    *("vocab.json", "merges.txt", "tokenizer.model", "spiece.model", "vocab.txt"),
)
"""What a tokenizer consists of, in the families that transformers has."""

ONLY_TRANSFORMERS_5 = "TokenizersBackend"
"""The class that transformers 5 writes for any fast tokenizer; version 4 calls it PreTrainedTokenizerFast."""

OF_THIS_LOADING = ("is_local", "local_files_only", "backend")
"""What transformers 5 writes down of how it read the tokenizer."""


def copy_tokenizer(model: Path, target: Path) -> None:
    """Put a model folder's tokenizer into `target`, byte for byte where it is in the usual form."""
    if not (model / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        save_tokenizer(AutoTokenizer.from_pretrained(model), target)
        return
    for name in FILES:
        if (model / name).is_file():
            shutil.copyfile(model / name, target / name)
    if (model / MORE_TEMPLATES).is_dir():
        shutil.copytree(model / MORE_TEMPLATES, target / MORE_TEMPLATES)
    _make_readable(target / CONFIG)


def save_tokenizer(tokenizer: Any, target: Path) -> None:
    """Write a tokenizer to `target`."""
    tokenizer.save_pretrained(target)
    _make_readable(target / CONFIG)


def _make_readable(path: Path) -> None:
    """Say what transformers 5 alone understands as version 4 says it, which both read."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    extra = config.get("extra_special_tokens")
    wanted = {name: value for name, value in config.items() if name not in OF_THIS_LOADING}
    if config.get("tokenizer_class") == ONLY_TRANSFORMERS_5:
        wanted["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(extra, list):
        del wanted["extra_special_tokens"]
        wanted["additional_special_tokens"] = extra
    if wanted != config:
        path.write_text(json.dumps(wanted, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
