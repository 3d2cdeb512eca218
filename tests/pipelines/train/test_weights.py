import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import DataError, Problem
from pipelines.recipe.train import Merge, OwnSampling
from pipelines.train.merge import MergeStage, write_merged
from pipelines.train.weights import check_base, digest_weights
from tests import model_families as families


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter on the tiny model, as peft leaves it."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base: Any = AutoModelForCausalLM.from_pretrained(tiny_model)
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules="all-linear", use_dora=True, task_type="CAUSAL_LM")
    get_peft_model(base, config).save_pretrained(folder)
    return folder


def test_an_adapter_fits_the_base_it_was_made_on(adapter: Path, tiny_model: Path) -> None:
    check_base(adapter, tiny_model)


def base_of(folder: Path, **changes: int) -> Path:
    """A base like the tiny model, except for some sizes."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = {"intermediate_size": 128, "num_hidden_layers": 2, **changes}
    config = Qwen2Config(vocab_size=300, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, **sizes)
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer = families.byte_level_tokenizer(["<|endoftext|>"], "<|endoftext|>", families.CHATML)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_for_another_base_is_refused_by_name_or_by_shape(adapter: Path, tmp_path: Path) -> None:
    wide = base_of(tmp_path / "wide", intermediate_size=96)
    with pytest.raises(DataError, match=r"another base model .* which is 96 wide there, the adapter 128: .*mlp"):
        write_merged(wide, adapter, tmp_path / "merged", Merge())
    short = base_of(tmp_path / "short", num_hidden_layers=1)
    with pytest.raises(DataError, match=r"another base model .* which has no such module: model.layers.1"):
        check_base(adapter, short)


@pytest.mark.parametrize(("temperature", "do_sample"), [(0.0, False), (0.4, True)])
def test_what_a_person_accepts_is_the_merged_models_own_sampling(
    adapter: Path, tiny_model: Path, tmp_path: Path, temperature: float, do_sample: bool
) -> None:
    from transformers import GenerationConfig

    accepted = OwnSampling(temperature=temperature, repetition_penalty=1.2)
    write_merged(tiny_model, adapter, tmp_path / "as-it-was", Merge())
    write_merged(tiny_model, adapter, tmp_path / "accepted", Merge(generation=accepted))
    before, after = (
        json.loads((tmp_path / name / "generation_config.json").read_text()) for name in ("as-it-was", "accepted")
    )
    assert after == {**before, "temperature": temperature, "repetition_penalty": 1.2, "do_sample": do_sample}
    assert GenerationConfig.from_pretrained(tmp_path / "accepted").temperature == temperature
    assert digest_weights(tmp_path / "accepted") == digest_weights(tmp_path / "as-it-was")


def test_going_back_from_four_bits_is_refused_where_there_were_none() -> None:
    told = "dequantized needs train.method: qlora, and it is lora; leave it out"
    assert MergeStage(Merge(base="dequantized"), "lora").preflight() == [Problem("merge.base", told)]
    assert MergeStage(Merge(base="dequantized"), "qlora").preflight() == []
