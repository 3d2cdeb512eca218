"""Reasoning in training: what has loss by `train.thinking`, `train.loss_on` and the recipe's `chat_template_kwargs`."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import DataError, RecipeError
from pipelines.models.tokenizer import control_tokens, with_template_arguments
from pipelines.recipe.train import Train
from pipelines.train.chats import chat_of
from pipelines.train.loss_mask import IGNORE_INDEX, encode, has_loss
from pipelines.train.proof import unknown_thinking
from pipelines.train.truncation import TokenLimits, encode_within
from tests.pipelines.train.test_mask_families import ASK, FAMILIES, LAST, scratch, spans_of, tokenizer_of

__all__ = ["scratch"]

Turns = list[dict[str, Any]]
PLAIN: Turns = [ASK, {"role": "assistant", "content": "一二三。"}]
THOUGHT: Turns = [ASK, {**PLAIN[1], "reasoning": "one, two"}]
THINKING = ("qwen3", "qwen3.5-thinking", "qwen3.6", "glm4.5", "deepseek-v3", "r1-distill", "nemotron-3", "gpt-oss")


def section_of(**section: Any) -> Train:
    return Train.model_validate({"model": "x", **section})


def losses(tokenizer: Any, turns: Turns, **section: Any) -> list[str]:
    """What has loss, over all samples."""
    train = section_of(**section)
    encoder = partial(encode, tokenizer, control_tokens(tokenizer), mask_empty=train.thinking == "mask_empty")
    samples = encode_within(TokenLimits(10_000), encoder, tokenizer, chat_of(train, turns)).samples
    return [tokenizer.decode(sample.tokens[low:high]).strip() for sample in samples for low, high in spans_of(sample)]


@pytest.mark.parametrize("name", THINKING)
def test_an_empty_thought_has_no_loss_where_it_is_masked(name: str, scratch: Path) -> None:
    tokenizer, family = tokenizer_of(name, scratch), FAMILIES[name]
    assert losses(tokenizer, PLAIN) == [f"{family.lead}一二三。{family.end}".strip()]
    assert losses(tokenizer, PLAIN, thinking="mask_empty") == [f"一二三。{family.end}"]
    turns = [*PLAIN, ASK, LAST]
    ends = [family.end_before_turns or family.end, family.end]
    assert losses(tokenizer, turns, thinking="mask_empty") == ["一二三。" + ends[0], LAST["content"] + ends[1]]


@pytest.mark.parametrize("name", THINKING)
def test_reasoning_that_a_row_has_keeps_its_loss_where_empty_thoughts_are_masked(name: str, scratch: Path) -> None:
    tokenizer = tokenizer_of(name, scratch)
    (loss,) = losses(tokenizer, THOUGHT, thinking="mask_empty")
    assert loss.index("one, two") < loss.index("一二三。")
    assert [loss] == losses(tokenizer, THOUGHT) == losses(tokenizer, THOUGHT, thinking="keep")


def test_the_labels_of_a_masked_thought_are_ignored_and_the_tokens_stay(scratch: Path) -> None:
    tokenizer = tokenizer_of("qwen3", scratch)
    control = control_tokens(tokenizer)
    bare, masked = (encode(tokenizer, control, PLAIN, mask_empty=mask) for mask in (False, True))
    assert bare.tokens == masked.tokens
    thought = [n for n, token in enumerate(bare.tokens) if tokenizer.decode([token]) in ("<think>", "</think>")]
    assert len(thought) == 2 and all(bare.labels[n] != IGNORE_INDEX for n in thought)
    assert {masked.labels[n] for n in range(thought[0], thought[1] + 1)} == {IGNORE_INDEX}
    assert sum(label != IGNORE_INDEX for label in masked.labels) < sum(label != IGNORE_INDEX for label in bare.labels)


@pytest.mark.parametrize(
    "answer", [THOUGHT[1], {"role": "assistant", "content": "<think>\none, two\n</think>\n\n一二三。"}]
)
def test_reasoning_is_stripped_wherever_it_stands(answer: dict[str, Any], scratch: Path) -> None:
    for name in ("qwen3", "chatml"):
        tokenizer = tokenizer_of(name, scratch)
        assert losses(tokenizer, [ASK, answer], thinking="strip") == losses(tokenizer, PLAIN)


def test_where_reasoning_is_kept_an_answer_without_it_is_refused_with_a_way_out(scratch: Path) -> None:
    tokenizer = tokenizer_of("qwen3", scratch)
    turns = [*PLAIN, ASK, THOUGHT[1]]
    with pytest.raises(DataError, match=r"train.thinking: keep .* turn 2, .*loss_on: last_turn or .*mask_empty"):
        losses(tokenizer, turns, thinking="keep")
    (loss,) = losses(tokenizer, turns, thinking="keep", loss_on="last_turn")
    assert "one, two" in loss
    assert [loss] == losses(tokenizer, [ASK, {**PLAIN[1], "loss": False}, *turns[2:]], thinking="keep")
    inline = [ASK, {"role": "assistant", "content": "<think>one, two</think>一二三。"}]
    assert "one, two" in losses(tokenizer, inline, thinking="keep")[0]


def test_only_the_last_answer_has_loss_where_the_recipe_says_so(scratch: Path) -> None:
    tokenizer = tokenizer_of("chatml", scratch)
    turns = [*PLAIN, ASK, LAST]
    assert losses(tokenizer, turns, loss_on="last_turn") == [LAST["content"] + "<|im_end|>"]
    marked = [*PLAIN, ASK, {**LAST, "loss": False}]  # a row's own mark stays
    assert not any(map(has_loss, chat_of(section_of(loss_on="last_turn"), marked)))
    asked = [*turns, ASK]  # which nobody answers
    assert losses(tokenizer, asked, loss_on="last_turn") == [LAST["content"] + "<|im_end|>"]


def test_a_call_of_a_tool_keeps_its_loss_behind_a_masked_thought(scratch: Path) -> None:
    tokenizer = tokenizer_of("qwen3", scratch)
    call = {"role": "assistant", "content": "", "tool_calls": '[{"function": {"name": "f", "arguments": {}}}]'}
    (loss,) = losses(tokenizer, [ASK, call], thinking="mask_empty")
    assert loss == '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call><|im_end|>'


@pytest.mark.parametrize("thinking", ["mask_empty", "keep"])
def test_a_template_without_a_place_for_reasoning_is_refused(thinking: str, scratch: Path) -> None:
    section = section_of(thinking=thinking)
    for name, family in FAMILIES.items():
        problem = unknown_thinking(section, tokenizer_of(name, scratch))
        if name in THINKING:
            assert problem is None, name
        elif not family.plain:
            assert problem and "no place for reasoning; leave the key out" in problem.message, name
    assert unknown_thinking(section_of(thinking="strip"), tokenizer_of("chatml", scratch)) is None


def rendered(tokenizer: Any, template: str, **given: Any) -> str:
    text: str = tokenizer.apply_chat_template(
        [ASK], chat_template=template, tokenize=False, add_generation_prompt=True, **given
    )
    return text


@pytest.mark.parametrize("name", ["qwen3", "qwen3.5-thinking", "qwen3.6", "glm4.5"])
def test_what_the_recipe_gives_a_template_holds_until_a_request_says_otherwise(name: str, scratch: Path) -> None:
    tokenizer = tokenizer_of(name, scratch)
    own = tokenizer.chat_template
    for value in (True, False):
        template = with_template_arguments(own, {"enable_thinking": value})
        assert rendered(tokenizer, template) == rendered(tokenizer, own, enable_thinking=value)
        for other in (True, False):
            said = rendered(tokenizer, template, enable_thinking=other)
            assert said == rendered(tokenizer, own, enable_thinking=other)
    assert rendered(tokenizer, own, enable_thinking=True) != rendered(tokenizer, own, enable_thinking=False)


def test_values_of_every_kind_reach_the_template_as_they_are(scratch: Path) -> None:
    tokenizer = tokenizer_of("chatml", scratch)
    own = "  {% for m in messages %}\n{{ [a, b, c, d] | tojson }}{% endfor %}\n"
    given = {"a": "中\"'%}}}\\\n{{", "b": ["x", "y"], "c": 1.5, "d": True}
    assert rendered(tokenizer, with_template_arguments(own, given)) == rendered(tokenizer, own, **given)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"enable_thinkin": True}, "did you mean 'enable_thinking'"),
        ({"messages": ["a"]}, "valid: .*enable_thinking"),
        ({"eos_token": "x"}, "valid: .*enable_thinking"),
        ({"namespace": "x"}, "valid: .*enable_thinking"),
    ],
)
def test_what_a_template_does_not_read_is_refused_by_its_name(given: dict[str, Any], told: str, scratch: Path) -> None:
    template = tokenizer_of("qwen3", scratch).chat_template
    with pytest.raises(RecipeError, match=rf"chat_template_kwargs.{next(iter(given))}.*reads no such variable.*{told}"):
        with_template_arguments(template, given)
    with pytest.raises(RecipeError, match="it reads none, so leave the key out"):
        with_template_arguments(tokenizer_of("chatml", scratch).chat_template, {"enable_thinking": False})
    with pytest.raises(RecipeError, match=r"train.model: .*cannot be read"):
        with_template_arguments("{% for %}", {"enable_thinking": False})


def test_where_thinking_is_off_rows_are_trained_after_the_thought_that_a_server_closes(scratch: Path) -> None:
    tokenizer = tokenizer_of("qwen3", scratch)
    before = tokenizer.chat_template
    try:
        tokenizer.chat_template = with_template_arguments(before, {"enable_thinking": False})
        assert losses(tokenizer, [*PLAIN, ASK, LAST]) == ["一二三。<|im_end|>", LAST["content"] + "<|im_end|>"]
        with pytest.raises(DataError, match=r"turn 2 has reasoning, and .* closed the thought.*train.thinking: strip"):
            losses(tokenizer, THOUGHT)
        assert losses(tokenizer, THOUGHT, thinking="strip") == ["一二三。<|im_end|>"]
    finally:
        tokenizer.chat_template = before
