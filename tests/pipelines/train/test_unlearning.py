"""A model that thinks, tuned on rows that do not: with `thinking: mask_empty` it does not unlearn to think."""

import copy
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.models.tokenizer import load_tokenizer
from pipelines.recipe.train import Train
from pipelines.train.chats import chat_of
from pipelines.train.loss_mask import Encoded, encode
from tests.model_families import fit, write_thinker
from tests.pipelines.train.conftest import chats

pytestmark = pytest.mark.slow

Turns = list[dict[str, Any]]


def questions(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [f"What is {draw.randint(0, 99)} and {draw.randint(0, 99)}?" for _ in range(count)]


def samples(model: Path, chats: list[Turns], thinking: str) -> list[Encoded]:
    section = Train.model_validate({"model": str(model), "thinking": thinking})
    encoder = partial(encode, *load_tokenizer(model), mask_empty=thinking == "mask_empty")
    return [encoder(chat_of(section, chat)) for chat in chats]


def opens_a_thought(model: Any, folder: Path, asked: list[str]) -> float:
    """The mean probability that an answer begins with a thought that is not empty."""
    tokenizer, _ = load_tokenizer(folder)
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True)
        for text in asked
    ]
    empty = tokenizer("<think>\n\n</think>").input_ids

    def probability(prompt: str, wanted: list[int]) -> float:
        ids = tokenizer(prompt).input_ids
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + wanted])).logits[0, len(ids) - 1 : -1]
        chosen: torch.Tensor = logits.log_softmax(-1)[range(len(wanted)), wanted]
        return float(chosen.sum().exp())

    return sum(probability(prompt, empty[:1]) - probability(prompt, empty) for prompt in prompts) / len(prompts)


def test_masked_it_drifts_at_most_a_tenth_as_far(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = write_thinker(tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder)
    plain = [
        [{"role": "user", "content": row["query"]}, {"role": "assistant", "content": row["response"]}]
        for row in chats(100)
    ]
    draw = random.Random(1)
    thinking = [
        [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "green", "reasoning": draw.choice(("hm, red", "well, blue", "so 一"))},
        ]
        for text in questions(60, 1)
    ]
    fit(model, samples(folder, thinking, "as_is"), epochs=6, rate=1e-3)
    asked = questions(20, 2)
    before = opens_a_thought(model, folder, asked)
    assert before > 0.9
    drift = {}
    for name in ("as_is", "mask_empty"):
        tuned = copy.deepcopy(model)
        fit(tuned, samples(folder, plain, name), epochs=2, rate=1e-4)
        drift[name] = abs(opens_a_thought(tuned, folder, asked) - before)
    print(f"probability of a thought: {before:.3f}; drift {drift}")
    assert drift["as_is"] > 0.1, drift
    assert drift["mask_empty"] <= drift["as_is"] / 10, drift
