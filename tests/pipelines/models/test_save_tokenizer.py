"""Tokenizers are left in the form that transformers 4 reads too."""

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.models.save_tokenizer import copy_tokenizer, save_tokenizer
from tests import model_families as families

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    return found


@pytest.mark.parametrize("copied", [True, False])
def test_classes_and_keys_of_transformers_5_alone_are_said_as_version_4_says_them(copied: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    made = families.byte_level_tokenizer(SPECIAL, "<|im_end|>", families.CHATML)
    made.add_special_tokens({"additional_special_tokens": ["<|tool|>"]})
    made.save_pretrained(tmp_path / "of-5")
    assert config_of(tmp_path / "of-5")["tokenizer_class"] == "TokenizersBackend"
    (tmp_path / "left").mkdir()
    if copied:
        copy_tokenizer(tmp_path / "of-5", tmp_path / "left")
    else:
        save_tokenizer(made, tmp_path / "left")
    left = config_of(tmp_path / "left")
    assert left["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert "<|tool|>" in left["additional_special_tokens"]
    assert not left.keys() & {"extra_special_tokens", "backend", "is_local", "local_files_only"}
    again = AutoTokenizer.from_pretrained(tmp_path / "left")
    chat = [{"role": "user", "content": "你好<|tool|> x"}]
    assert again.apply_chat_template(chat, tokenize=False) == made.apply_chat_template(chat, tokenize=False)
    text = "<|im_start|>你好<|tool|> x<|im_end|>"
    assert again(text)["input_ids"] == made(text)["input_ids"]
    assert again.eos_token == made.eos_token and again.pad_token == made.pad_token


def test_a_tokenizer_in_the_usual_form_is_copied_byte_for_byte(tmp_path: Path) -> None:
    families.byte_level_tokenizer(SPECIAL, "<|im_end|>", families.CHATML).save_pretrained(tmp_path / "published")
    usual = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|im_end|>", "model_max_length": 512}
    (tmp_path / "published" / "tokenizer_config.json").write_text(json.dumps(usual))
    (tmp_path / "left").mkdir()
    copy_tokenizer(tmp_path / "published", tmp_path / "left")
    for path in (tmp_path / "published").iterdir():
        assert (tmp_path / "left" / path.name).read_bytes() == path.read_bytes()
