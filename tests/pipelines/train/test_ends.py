"""What ends a trained answer is among what the model stops at, before anything is trained."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.errors import RecipeError
from pipelines.recipe.train import Train
from pipelines.train.ends import End, describe_end, ends_of, lacking_embedding, stop_tokens, with_end
from pipelines.train.stage import misfits
from tests import model_families as families

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def base_model(tiny_model: Path, folder: Path, template: str, **generation: Any) -> Path:
    """The tiny model, stopping at its <|endoftext|> only, as a base model does."""
    shutil.copytree(tiny_model, folder)
    families.byte_level_tokenizer(SPECIAL, "<|endoftext|>", template).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 0}))
    if generation:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return folder


@pytest.mark.parametrize("generation", [{}, {"eos_token_id": [0], "top_p": 0.8}, {"eos_token_id": 0}])
def test_a_base_model_stops_at_what_ends_its_trained_answers(
    tiny_model: Path, tmp_path: Path, generation: dict[str, Any]
) -> None:
    from transformers import AutoModelForCausalLM, GenerationConfig

    section = Train(model="x")
    folder = base_model(tiny_model, tmp_path / "base", families.CHATML, **generation)
    assert ends_of(section, folder) == [End(2, "<|im_end|>", False)]
    assert "answers end with '<|im_end|>', at which the model does not stop yet" in describe_end(section, folder)
    made = with_end(section, folder, tmp_path / "cache")
    assert stop_tokens(made) == [0, 2] and stop_tokens(folder) == [0]
    assert ends_of(section, made) == [End(2, "<|im_end|>", True)]
    assert with_end(section, made, tmp_path / "cache") == made
    said = GenerationConfig.from_pretrained(made)
    assert said.eos_token_id == [0, 2] and said.top_p == generation.get("top_p", said.top_p)
    model: Any = AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32)
    model.save_pretrained(tmp_path / "merged")
    assert stop_tokens(tmp_path / "merged") == [0, 2]


def test_a_model_stops_at_what_ends_an_answer_before_another_question(tiny_model: Path, tmp_path: Path) -> None:
    roles = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    roles += "{% if add_generation_prompt %}<|assistant|>{% endif %}"  # as GLM's
    folder = base_model(tiny_model, tmp_path / "base", roles, eos_token_id=0)
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>"]
    families.byte_level_tokenizer(special, "<|endoftext|>", roles).save_pretrained(folder)
    section = Train(model="x")
    assert ends_of(section, folder) == [End(0, "<|endoftext|>", True), End(1, "<|user|>", False)]
    assert "answers end with '<|user|>', at which" in describe_end(section, folder)
    assert stop_tokens(with_end(section, folder, tmp_path / "cache")) == [0, 1]


def says_the_end_at_once(folder: Path) -> Path:
    """A base model whose every next token is <|im_end|>, and which stops at <|endoftext|>."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    families.byte_level_tokenizer(SPECIAL, "<|endoftext|>", families.CHATML).save_pretrained(folder)
    sizes = {"vocab_size": 300, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 1}
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, eos_token_id=0))
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.fill_(float("norm" in name))
        model.get_input_embeddings().weight[:, 0] = 1
        model.get_output_embeddings().weight[2, 0] = 1
    model.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_a_server_stops_where_trained_answers_end(tmp_path: Path) -> None:
    pytest.importorskip("vllm")
    base = says_the_end_at_once(tmp_path / "base")
    made = with_end(Train(model="x"), base, tmp_path / "cache")
    result, script = tmp_path / "told.json", Path(__file__).with_name("vllm_ends.py")
    subprocess.run([sys.executable, str(script), str(result), str(base), str(made)], check=True, timeout=800)
    assert json.loads(result.read_text()) == [[[2] * 8, "length"], [[2], "stop"]]


def test_a_generation_configuration_without_an_end_stops_nowhere(tiny_model: Path, tmp_path: Path) -> None:
    folder = base_model(tiny_model, tmp_path / "base", families.CHATML, top_p=0.8)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": 2}))  # which no server reads then
    section = Train(model="x")
    assert ends_of(section, folder) == [End(2, "<|im_end|>", False)]
    assert stop_tokens(with_end(section, folder, tmp_path / "cache")) == [2]


@pytest.mark.parametrize(
    ("said", "told"),
    [("{", "is no JSON"), ("[]", "is no JSON object"), ('{"eos_token_id": "</s>"}', "eos_token_id is '</s>', not num")],
)
def test_a_generation_configuration_that_cannot_be_read_is_refused(
    tiny_model: Path, tmp_path: Path, said: str, told: str
) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "copy"))
    (folder / "generation_config.json").write_text(said)
    (problem,) = misfits(Train(model=str(folder), max_length=64), folder)
    assert re.search(f"generation_config.json.*{told}.*fetch the model again", problem.message)


def test_a_model_that_stops_already_stays_where_it_lies(tiny_model: Path, tmp_path: Path) -> None:
    section = Train(model="x")
    assert with_end(section, tiny_model, tmp_path) == tiny_model
    assert describe_end(section, tiny_model) == ""
    own = base_model(tiny_model, tmp_path / "own", families.CHATML.replace("<|im_end|>", "<|endoftext|>"))
    assert with_end(section, own, tmp_path) == own


def test_a_format_whose_tokens_have_no_embedding_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    section = Train(model="x")
    assert lacking_embedding(section, tiny_model) is None
    folder = Path(shutil.copytree(tiny_model, tmp_path / "more"))
    grown = families.byte_level_tokenizer(SPECIAL, "<|im_end|>", families.CHATML.replace("<|im_end|>", "<|end|>"))
    grown.add_special_tokens({"additional_special_tokens": ["<|end|>"]})
    grown.save_pretrained(folder)
    rows = len(grown) - 1
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": rows}))
    problem = lacking_embedding(section, folder)
    assert problem and problem.on_every_machine
    assert f"embeddings for {rows} tokens, and its tokenizer gives '<|end|>' the number {rows}" in problem.message


def test_a_tokenizer_that_cannot_be_read_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model, tmp_path / "cut"))
    whole = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(whole[:1000])
    with pytest.raises(RecipeError, match=r"its tokenizer cannot be read .*copy it from the base model"):
        lacking_embedding(Train(model="x"), folder)
