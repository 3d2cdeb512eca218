"""SentencePiece tokenizers of InternLM2 and ChatGLM3 as fast tokenizers, with the chat format each was trained on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.errors import Problem, RecipeError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
"""Types of a SentencePiece piece, as far as they matter here."""

BPE = 2
"""SentencePiece's number for a byte-pair model."""

INTERNLM2_RENAMED = {
    "[UNUSED_TOKEN_141]": "<|plugin|>",
    "[UNUSED_TOKEN_142]": "<|interpreter|>",
    "[UNUSED_TOKEN_143]": "<|action_end|>",
    "[UNUSED_TOKEN_144]": "<|action_start|>",
    "[UNUSED_TOKEN_145]": "<|im_end|>",
    "[UNUSED_TOKEN_146]": "<|im_start|>",
}
"""Pieces that InternLM2 uses as control tokens of its chat format."""

INTERNLM2_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

CHATGLM3_ADDED = ("[MASK]", "[gMASK]", "[sMASK]", "<sop>", "<eop>")
CHATGLM3_ROLES = ("<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
"""Numbered on after the pieces, in this order.

ChatGLM3's own code writes `sop` and `eop` and never looks for them in text. A fast tokenizer does, and would find
them in words such as people, so they are written as in GLM-4; the numbers are the same.
"""

CHATGLM3_TEMPLATE = (
    "[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>\n {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""The space stands for the one that SentencePiece puts before each text: role and content are encoded one by one."""


def internlm2_tokenizer(folder: Path) -> Any:
    """InternLM2's tokenizer, its chat template that of the checkpoint where it brings one."""
    config = _tokenizer_config(folder)
    proto = _read(folder / "tokenizer.model")
    pieces = [piece.piece for piece in proto.pieces]
    own = {pieces[int(number)]: entry["content"] for number, entry in config.get("added_tokens_decoder", {}).items()}
    renamed = {**INTERNLM2_RENAMED, **own}
    control = [renamed[piece] for piece in pieces if piece in renamed]
    tokenizer = _tokenizer(proto, renamed, ["<s>", "</s>", "<unk>", *control], prefix=["<s>"])
    return _finished(tokenizer, config.get("chat_template", INTERNLM2_TEMPLATE), control, pad="</s>")


def chatglm3_tokenizer(folder: Path) -> Any:
    """ChatGLM3's tokenizer with its format of roles."""
    proto = _read(folder / "tokenizer.model")
    control = [*CHATGLM3_ADDED, *CHATGLM3_ROLES]
    tokenizer = _tokenizer(proto, {}, ["<s>", "</s>", "<unk>", *control], prefix=["[gMASK]", "<sop>"])
    return _finished(tokenizer, CHATGLM3_TEMPLATE, control, pad="<unk>")


def _tokenizer_config(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return config


def _read(path: Path) -> Any:
    """A SentencePiece model; RecipeError where it is none, or not of the kind these families have."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2

    messages: Any = sentencepiece_model_pb2  # generated, without types
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except (DecodeError, FileNotFoundError):
        raise _refused(f"{path} is not there, or is no SentencePiece model") from None
    if proto.trainer_spec.model_type != BPE or not proto.pieces:
        raise _refused(f"{path} is no byte-pair model of SentencePiece")
    return proto


def _refused(message: str) -> RecipeError:
    return RecipeError("the recipe", [Problem("train.model", f"{message}; use a model that transformers has")])


def _tokenizer(proto: Any, renamed: Mapping[str, str], special: list[str], prefix: list[str]) -> Any:
    """The fast tokenizer with the pieces' numbers; special tokens that are no piece get the numbers after them.

    `prefix` is put before plain text; chats bring their own.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, processors

    vocabulary = {renamed.get(piece.piece, piece.piece): number for number, piece in enumerate(proto.pieces)}
    tokenizer = Tokenizer(
        models.BPE(
            vocabulary,
            _merges(proto, renamed),
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
        )
    )
    tokenizer.normalizer = _normalizer(proto.normalizer_spec)
    back: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    prefixed = proto.normalizer_spec.add_dummy_prefix
    tokenizer.decoder = decoders.Sequence([*back, *([decoders.Strip(" ", 1, 0)] if prefixed else [])])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    plain = [p.piece for p in proto.pieces if p.type == USER_DEFINED and p.piece not in renamed]
    tokenizer.add_tokens([AddedToken(piece, normalized=False, special=False) for piece in plain])
    numbers = [(token, tokenizer.token_to_id(token)) for token in prefix]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[*prefix, "$A"], pair=[*prefix, "$A", "$B"], special_tokens=numbers
    )
    return tokenizer


def _normalizer(spec: Any) -> Any:
    """What SentencePiece does to a text before it is cut: its table of characters, spaces, the space put before it."""
    from tokenizers import Regex, normalizers

    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex("^ +| +$"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend("▁"))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])


def _merges(proto: Any, renamed: Mapping[str, str]) -> list[tuple[str, str]]:
    """The pairs that make up each piece, best score first: SentencePiece joins what gives the best piece."""
    normal = {p.piece: p.score for p in proto.pieces if p.type == NORMAL and p.piece not in renamed}
    order = sorted(normal, key=lambda piece: -normal[piece])
    return [
        (piece[:cut], piece[cut:])
        for piece in order
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]


def _finished(tokenizer: Any, template: str, control: list[str], pad: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    fast_class: Any = PreTrainedTokenizerFast
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": pad}
    fast = fast_class(tokenizer_object=tokenizer, additional_special_tokens=control, **names)
    fast.chat_template = template
    return fast
