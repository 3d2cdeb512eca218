"""The token that ends a trained answer, and a base model that stops at it.

A base model with a chat template ends its turns with one token, such as <|im_end|>, and stops at another, such as
<|endoftext|>: what is trained would run on. The base gets the token among those that end an answer before training, so
that samples, the adapter on its base, the merged and the fully trained model stop at it.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from pipelines.errors import DataError, Problem
from pipelines.models.cache import made_of_links
from pipelines.models.skeleton import text_config
from pipelines.models.tokenizer import load_tokenizer
from pipelines.models.weight_files import broken_model
from pipelines.recipe.train import Train
from pipelines.train.loss_mask import IGNORE_INDEX, Encoded, encode, encode_text, with_system

GENERATION = "generation_config.json"
PROBE = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]
"""A chat whose end shows how the template ends a turn."""


@dataclass(frozen=True)
class End:
    """What ends a trained answer."""

    token: int
    text: str
    is_known: bool
    """Whether the model stops at it already."""


def ends_of(section: Train, model: Path) -> list[End]:
    """What ends trained answers, by the first of their last control tokens; none where no chat is trained or rendered.

    Before another question an answer may end otherwise than at the end of a chat: GLM's end with the next role.
    """
    if section.objective == "pretrain":
        return []
    tokenizer, control = load_tokenizer(model)
    added = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    known = stop_tokens(model)
    found: dict[int, End] = {}
    for chat in (PROBE, PROBE * 2):
        try:
            labels = encode(tokenizer, control, with_system(chat, section.system)).labels
        except DataError:  # tokenizing the rows says it better, and names the row
            return list(found.values())
        for has_loss, answer in groupby(labels, lambda label: label != IGNORE_INDEX):
            said = list(answer)
            first = len(said)
            while first and said[first - 1] in added:
                first -= 1
            if has_loss and (ends := said[first:]):
                token = next((token for token in ends if token in known), ends[0])
                found[token] = End(token, tokenizer.decode([token]), token in known)
    return list(found.values())


def lacking_embedding(section: Train, model: Path) -> Problem | None:
    """Why no chat can be trained: its format has tokens that the model has no embedding for; None where it has all."""
    rows = embedding_rows(model)
    tokenizer, control = load_tokenizer(model)
    try:
        if section.objective == "pretrain":
            tokens = encode_text(tokenizer, control, PROBE[0]["content"]).tokens
        else:
            tokens = encode(tokenizer, control, with_system(PROBE, section.system)).tokens
    except DataError:  # tokenizing the rows says it better, and names the row
        return None
    if rows is None or max(tokens, default=0) < rows:
        return None
    return Problem("train.model", without_embedding(tokenizer, max(tokens), rows), on_every_machine=True)


def embedding_rows(model: Path) -> int | None:
    """How many tokens the model has embeddings for; None where its configuration does not say."""
    config = _read(model / "config.json")
    rows: int | None = (text_config(config) or config).get("vocab_size")
    return rows


def require_embeddings(tokenizer: Any, samples: Iterable[Encoded], rows: int | None) -> None:
    """DataError where a sample has a token that the model, of `rows` embeddings, has none for."""
    highest = max((token for sample in samples for token in sample.tokens), default=0)
    if rows is not None and highest >= rows:
        raise DataError(f"train.model: {without_embedding(tokenizer, highest, rows)}")


def without_embedding(tokenizer: Any, token: int, rows: int) -> str:
    """What is said of a token that the model has no embedding for."""
    return (
        f"the model has embeddings for {rows} tokens, and its tokenizer gives {tokenizer.decode([token])!r} the number "
        f"{token}; take the tokenizer that the model was made with, or a model whose embeddings were resized"
    )


def stop_tokens(model: Path) -> list[int]:
    """The tokens at which transformers and vLLM stop: by the generation configuration, where there is none by the
    configuration."""
    return _ends_in(model, GENERATION if (model / GENERATION).is_file() else "config.json")


def _ends_in(model: Path, name: str) -> list[int]:
    """What a file says under `eos_token_id`; RecipeError where that is no token."""
    said = _read(model / name).get("eos_token_id")
    tokens = said if isinstance(said, list) else [] if said is None else [said]
    if not all(type(token) is int for token in tokens):
        raise broken_model(f"{model / name}: eos_token_id is {said!r}, not numbers of tokens; fetch the model again")
    return tokens


def with_end(section: Train, model: Path, cache: Path) -> Path:
    """The folder itself where the model stops at what ends its answers; else links to its files, with a list that has
    the token too."""
    lacking = [end for end in ends_of(section, model) if not end.is_known]
    if not lacking:
        return model
    others = stop_tokens(model) or _ends_in(model, "config.json")
    ends = [*others, *(end.token for end in lacking if end.token not in others)]
    wanted = {**_of_model(model), **_read(model / GENERATION), "eos_token_id": ends}
    own = {GENERATION: json.dumps(wanted, indent=2, sort_keys=True) + "\n"}
    return made_of_links(model, cache, "ends", own, f"linking {model.name}, which now also stops at {_texts(lacking)}")


def describe_end(section: Train, model: Path) -> str:
    """What `danlu check` says of it; empty where there is nothing to say."""
    lacking = [end for end in ends_of(section, model) if not end.is_known]
    return (
        f"answers end with {_texts(lacking)}, at which the model does not stop yet; what is trained will"
        if lacking
        else ""
    )


def _texts(ends: list[End]) -> str:
    return " or ".join(repr(end.text) for end in ends)


def _of_model(model: Path) -> dict[str, Any]:
    """What transformers takes from config.json where there is no generation configuration."""
    config = _read(model / "config.json")
    return {name: config[name] for name in ("bos_token_id", "pad_token_id") if config.get(name) is not None}


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise broken_model(f"{path} is no JSON ({error}); fetch the model again") from None
    if not isinstance(found, dict):
        raise broken_model(f"{path} is no JSON object; fetch the model again")
    return found
