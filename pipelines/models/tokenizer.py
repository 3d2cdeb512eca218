"""A model's tokenizer with its control tokens, and a chat template of one's own for a model."""

import json
import re
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from pipelines.errors import Problem, RecipeError, nearest
from pipelines.models.cache import made_of_links
from pipelines.models.weight_files import SAID, broken_model

GIVEN = ("messages", "tools", "documents", "add_generation_prompt", "continue_final_message")
"""Variables of chat templates that whoever renders gives, beside the special tokens."""

TEMPLATE = "chat_template.jinja"
"""The file that transformers takes before what tokenizer_config.json says."""

MORE_TEMPLATES = "additional_chat_templates"
"""The folder of a model's templates for other uses, such as tools."""


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
    except Exception as error:  # what transformers raises over a file depends on the file
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:SAID]}"
        raise broken_model(f"{model}: its tokenizer cannot be read ({told}); copy it from the base model") from None


def control_tokens(tokenizer: Any) -> "re.Pattern[str]":
    """What matches the tokenizer's control tokens in text, longest first.

    Those that are flagged special, and those that the chat template writes: `<think>` is not flagged in Qwen3, nor is
    `<｜Assistant｜>` in DeepSeek. A template may make a name of parts, as `'<|' + role + '|>'`.
    """
    source = template_source(tokenizer) + _written_around(tokenizer)
    added = tokenizer.added_tokens_decoder.values()
    control = {token.content for token in added if token.special or token.content in source}
    names = sorted({*control, *tokenizer.all_special_tokens}, key=len, reverse=True)
    return re.compile("|".join(re.escape(name) for name in names if len(name.strip()) > 1) or r"(?!)")


def _written_around(tokenizer: Any) -> str:
    """What the chat template writes around turns; nothing where it does not render them."""
    turns = [{"role": role, "content": "x"} for role in ("system", "user", "assistant")]
    written = ""
    for chat in (turns, turns[1:]):
        with suppress(Exception):  # what a template raises is its own; a row that it does not render is refused
            written += tokenizer.apply_chat_template(chat, tokenize=False)
            written += tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    return written


def template_source(tokenizer: Any) -> str:
    """The source of the tokenizer's chat templates; some have one for each use."""
    template = tokenizer.chat_template
    return "\n".join(template.values()) if isinstance(template, dict) else template or ""


def default_template(tokenizer: Any) -> str:
    """The tokenizer's chat template for chats without anything special; empty where it has none."""
    template = tokenizer.chat_template
    return template.get("default", "") if isinstance(template, dict) else template or ""


def with_chat_template(folder: Path, template: str, cache: Path) -> Path:
    """A folder in `cache` that is the same model with another chat template: links to its files, and the template."""
    title = f"linking {folder.name} with the recipe's chat template"
    return made_of_links(folder, cache, "template", {TEMPLATE: template}, title, without=[MORE_TEMPLATES])


def with_template_arguments(template: str, arguments: Mapping[str, Any]) -> str:
    """A chat template that takes these values for variables of its own that nobody gives it.

    So every program that renders with the template has them, and a request can still say otherwise. RecipeError for a
    name that the template does not read.
    """
    read = _variables_of(template)
    unknown = [
        Problem(
            f"chat_template_kwargs.{name}", f"the model's chat template reads no such variable; {_hint(name, read)}"
        )
        for name in arguments
        if name not in read
    ]
    if unknown:
        raise RecipeError("the recipe", unknown)
    # a line for each: transformers and vLLM take the line break after a block away
    defaults = [
        f"{{%- if {name} is not defined %}}{{% set {name} = {json.dumps(value, ensure_ascii=False)} %}}{{% endif %}}\n"
        for name, value in arguments.items()
    ]
    return "".join(defaults) + template


def _variables_of(template: str) -> frozenset[str]:
    """What a template reads from outside that nobody else gives it; RecipeError where it cannot be parsed."""
    from jinja2 import TemplateError
    from transformers.utils import chat_template_utils

    library: Any = chat_template_utils
    try:
        found: frozenset[str] = library._get_template_variables(template)
        own = library._compile_jinja_template(template).environment.globals
    except TemplateError as error:
        raise RecipeError(
            "the recipe", [Problem("train.model", f"its chat template cannot be read: {error}")]
        ) from None
    return frozenset(name for name in found - own.keys() if name not in GIVEN and not name.endswith("_token"))


def _hint(name: str, read: frozenset[str]) -> str:
    return nearest(name, read) if read else "it reads none, so leave the key out"


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
