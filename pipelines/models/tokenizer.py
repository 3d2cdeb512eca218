"""A model's tokenizer with its control tokens, and a chat template of one's own for a model."""

import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.models.cache import made_once

TEMPLATE = "chat_template.jinja"
"""The file that transformers takes before what tokenizer_config.json says."""


@lru_cache(maxsize=1)
def load_tokenizer(model: Path) -> tuple[Any, "re.Pattern[str]"]:
    """The tokenizer of a model folder, and the pattern of its control tokens."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return tokenizer, control_tokens(tokenizer)


def control_tokens(tokenizer: Any) -> "re.Pattern[str]":
    """What matches the tokenizer's control tokens in text, longest first."""
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    names = sorted({*special, *tokenizer.all_special_tokens} - {""}, key=len, reverse=True)
    return re.compile("|".join(re.escape(name) for name in names if len(name) > 1) or r"(?!)")


def with_chat_template(folder: Path, template: str, cache: Path) -> Path:
    """A folder in `cache` that is the same model with another chat template: links to its files, and the template."""
    digest = hashlib.sha256(f"{folder.resolve()}\0{template}".encode()).hexdigest()
    target = cache / f"{folder.name}-template-{digest[:8]}"

    def write(scratch: Path) -> None:
        for path in folder.resolve().iterdir():
            if path.name != TEMPLATE:
                (scratch / path.name).symlink_to(path)
        (scratch / TEMPLATE).write_text(template, encoding="utf-8")

    return made_once(target, f"linking {folder.name} with the recipe's chat template", write)
