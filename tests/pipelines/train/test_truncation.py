from functools import partial
from pathlib import Path
from typing import Any

import pytest

from pipelines.models.convert_tokenizer import chatglm3_tokenizer
from pipelines.models.tokenizer import control_tokens, load_tokenizer
from pipelines.train.loss_mask import IGNORE_INDEX, Encoded, encode
from pipelines.train.truncation import Fitted, TokenLimits, answer_begin, encode_within
from tests import model_families as families

QUESTION, ANSWER = "abcdefghij一二三", "klmnopqrst"


def chat(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def fitted(tokenizer: Any, messages: list[dict[str, str]], **limits: Any) -> Fitted:
    work = partial(encode, tokenizer, control_tokens(tokenizer))
    return encode_within(TokenLimits(**{"max_length": 512, **limits}), work, tokenizer, messages)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return load_tokenizer(tiny_model)[0]


def test_within_its_limits_a_row_stays_as_it_is(tokenizer: Any) -> None:
    messages = chat(QUESTION, ANSWER)
    whole = encode(tokenizer, control_tokens(tokenizer), messages)
    prompt = answer_begin(whole)
    assert whole.tokens[prompt:-2] == tokenizer.encode(ANSWER)
    result = fitted(tokenizer, messages, max_input_length=prompt, max_output_length=len(whole.tokens) - prompt)
    assert result == Fitted([whole], too_long=False)


def test_a_question_is_cut_at_its_end_and_the_template_stays(tokenizer: Any) -> None:
    whole = encode(tokenizer, control_tokens(tokenizer), chat(QUESTION, ANSWER, system="s"))
    for over in (1, 4, 12):
        limit = answer_begin(whole) - over
        result = fitted(tokenizer, chat(QUESTION, ANSWER, system="s"), max_input_length=limit)
        (sample,) = result.samples
        assert result.too_long and answer_begin(sample) <= limit
        text = tokenizer.decode(sample.tokens)
        head, _, rest = text.partition("<|im_start|>user\n")
        assert head == "<|im_start|>system\ns<|im_end|>\n"
        kept, _, rest = rest.partition("<|im_end|>\n<|im_start|>assistant\n")
        assert QUESTION.startswith(kept) and rest == f"{ANSWER}<|im_end|>\n"
        assert answer_begin(sample) > limit - 3  # no more is lost than the bytes of one character
    assert fitted(tokenizer, chat(QUESTION, ANSWER), max_input_length=4) == Fitted([], too_long=True)


def test_the_oldest_exchanges_go_before_the_question_does(tokenizer: Any) -> None:
    messages = chat("one", "first", "two", "second", QUESTION, ANSWER, system="s")
    prompt = answer_begin(encode(tokenizer, control_tokens(tokenizer), [messages[0], *messages[3:]]))
    (sample,) = fitted(tokenizer, messages, max_input_length=prompt).samples
    assert sample == encode(tokenizer, control_tokens(tokenizer), [messages[0], *messages[3:]])


def test_an_answer_is_cut_and_not_taught_to_end_there(tokenizer: Any) -> None:
    (sample,) = fitted(tokenizer, chat(QUESTION, ANSWER), max_output_length=4).samples
    assert tokenizer.decode(sample.tokens).endswith("<|im_start|>assistant\nklmn")
    assert [label for label in sample.labels if label != IGNORE_INDEX] == sample.tokens[-4:]


def test_rows_above_any_limit_are_dropped_where_the_recipe_says_so(tokenizer: Any) -> None:
    for limits in ({"max_input_length": 10}, {"max_output_length": 10}, {"max_length": 30}):
        assert fitted(tokenizer, chat(QUESTION, ANSWER), overlong="drop", **limits) == Fitted([], too_long=True)
    assert len(fitted(tokenizer, chat("a", "b"), overlong="drop", max_input_length=30).samples) == 1


def test_tokenizers_that_put_a_space_before_texts_fit_too(tmp_path: Path) -> None:
    families.write_chatglm3(tmp_path)
    glm = chatglm3_tokenizer(tmp_path)
    question = "你是谁？" * 30
    (sample,) = fitted(glm, chat(question, "red " * 100), max_input_length=24, max_output_length=40).samples
    assert (answer_begin(sample), len(sample.tokens)) == (24, 64)
    expected = glm.convert_tokens_to_ids(["[gMASK]", "<sop>", "<|user|>", "▁", "<0x0A>"])
    assert sample.tokens[:5] == expected and sample.tokens[23] == glm.convert_tokens_to_ids("<|assistant|>")


def test_the_last_answer_begins_after_the_last_question() -> None:
    labels = [IGNORE_INDEX, 5, 6, IGNORE_INDEX, IGNORE_INDEX, 7, 8, IGNORE_INDEX]
    assert answer_begin(Encoded([0] * 8, labels)) == 5
    assert answer_begin(Encoded([0] * 3, [IGNORE_INDEX] * 3)) == 0
