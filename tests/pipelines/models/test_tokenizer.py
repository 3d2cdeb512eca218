import json
import shutil
from pathlib import Path

from transformers import AutoTokenizer

from pipelines.models.resolve import check_folder
from pipelines.models.save_tokenizer import copy_tokenizer
from pipelines.models.tokenizer import MORE_TEMPLATES, control_tokens, load_tokenizer, with_chat_template
from pipelines.models.weight_files import weight_shapes


def test_a_template_of_the_recipe_takes_the_place_of_the_models(tiny_model: Path, tmp_path: Path) -> None:
    template = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    folder = with_chat_template(tiny_model, template, tmp_path)
    check_folder(folder)
    assert weight_shapes(folder) == weight_shapes(tiny_model) != {}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "问"}], tokenize=False) == "<user>问"
    assert AutoTokenizer.from_pretrained(tiny_model).chat_template != template
    assert with_chat_template(tiny_model, template, tmp_path) == folder
    assert with_chat_template(tiny_model, template + " ", tmp_path) != folder
    config = (tiny_model / "tokenizer_config.json").read_text()  # as older models have it
    old = tmp_path / "old"
    shutil.copytree(tiny_model, old)
    (old / "chat_template.jinja").unlink()
    (old / "tokenizer_config.json").write_text(json.dumps({**json.loads(config), "chat_template": "{{ 'old' }}"}))
    assert AutoTokenizer.from_pretrained(old).chat_template == "{{ 'old' }}"
    assert AutoTokenizer.from_pretrained(with_chat_template(old, template, tmp_path)).chat_template == template


def test_a_template_for_tools_goes_with_the_model_and_not_with_another_template(
    tiny_model: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "own"))
    (folder / MORE_TEMPLATES).mkdir()
    (folder / MORE_TEMPLATES / "tool_use.jinja").write_text("{{ tools }}")
    (tmp_path / "left").mkdir()
    copy_tokenizer(folder, tmp_path / "left")
    assert AutoTokenizer.from_pretrained(tmp_path / "left").chat_template["tool_use"] == "{{ tools }}"
    linked = with_chat_template(folder, "{{ 'given' }}", tmp_path / "cache")
    assert AutoTokenizer.from_pretrained(linked).chat_template == "{{ 'given' }}"


def test_longer_control_tokens_match_before_their_beginnings(tiny_model: Path) -> None:
    tokenizer, _ = load_tokenizer(tiny_model)
    assert control_tokens(tokenizer).findall("x<|im_end|><|endoftext|>y") == ["<|im_end|>", "<|endoftext|>"]
