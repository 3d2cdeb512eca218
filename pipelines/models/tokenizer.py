"""A model's tokenizer with its control tokens, and a chat template of one's own for a model."""

import hashlib
import re
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.errors import Problem, RecipeError
from pipelines.models.cache import made_once

TEMPLATE = "chat_template.jinja"
"""The file that transformers takes before what tokenizer_config.json says."""


@lru_cache(maxsize=1)
def load_tokenizer(model: Path) -> tuple[Any, "re.Pattern[str]"]:
    """The tokenizer of a model folder, and the pattern of its control tokens."""
    tokenizer = open_tokenizer(model)
    return tokenizer, control_tokens(tokenizer)


def open_tokenizer(model: Path) -> Any:
    """The tokenizer of a model folder, for callers that change its template; RecipeError where it cannot be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError, KeyError) as error:
        message = f"{model}: its tokenizer cannot be read ({error}); copy it from the base model"
        raise RecipeError("the recipe", [Problem("train.model", message)]) from None


def control_tokens(tokenizer: Any) -> "re.Pattern[str]":
    """What matches the tokenizer's control tokens in text, longest first.

    Those that are flagged special, and those that the chat template writes: `<think>` is not flagged in Qwen3, nor is
    `<｜Assistant｜>` in DeepSeek.
    """
    source = template_source(tokenizer)
    added = tokenizer.added_tokens_decoder.values()
    control = {token.content for token in added if token.special or token.content in source}
    names = sorted({*control, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(re.escape(name) for name in names if len(name.strip()) > 1) or r"(?!)")


def template_source(tokenizer: Any) -> str:
    """The source of the tokenizer's chat templates; some have one for each use."""
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


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


def with_merged_system(template: str) -> str:
    """A chat template that puts the system prompt before the first question, with an empty line between them."""
    return _MERGE_SYSTEM + template


_MERGE_SYSTEM = (
    "{%- if messages and messages[0]['role'] == 'system' -%}"
    "{%- set merged_system = messages[0]['content'] -%}{%- set messages = messages[1:] -%}"
    "{%- if merged_system and messages and messages[0]['role'] == 'user' -%}"
    "{%- set first_question = dict(messages[0], content=merged_system + '\\n\\n' + messages[0]['content']) -%}"
    "{%- set messages = [first_question] + messages[1:] -%}"
    "{%- endif -%}{%- endif -%}"
)
