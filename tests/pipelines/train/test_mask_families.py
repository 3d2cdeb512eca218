"""Masks of model families: what the loss is on, and that a server sends the prompts that are trained.

Templates of families that publish them openly are read from the package trl; the others are described here by what they
render, with a template of our own that renders it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import DataError
from pipelines.models.convert import convert
from pipelines.models.convert_tokenizer import _read, _tokenizer
from pipelines.models.tokenizer import control_tokens, with_merged_system
from pipelines.train.loss_mask import IGNORE_INDEX, Encoded, encode
from pipelines.train.truncation import TokenLimits, encode_within
from tests.model_families import (
    CHATML,
    SMOLLM2,
    byte_level_tokenizer,
    sentencepiece_model,
    write_chatglm3,
    write_internlm2,
)

Turns = list[dict[str, Any]]

LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}"
    "{% set first = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + ((first if loop.first else '') + m['content']).strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GLM4 = (
    "[gMASK]<sop>{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
COMMAND_R7B = (
    "{{ bos_token }}{% for m in messages %}<|START_OF_TURN_TOKEN|>"
    "{% if m['role'] == 'system' %}<|SYSTEM_TOKEN|>{{ m['content'] }}"
    "{% elif m['role'] == 'user' %}<|USER_TOKEN|>{{ m['content'] }}"
    "{% else %}<|CHATBOT_TOKEN|><|START_RESPONSE|>{{ m['content'] }}<|END_RESPONSE|>{% endif %}"
    "<|END_OF_TURN_TOKEN|>{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{% endif %}"
)
PHI = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '<|im_sep|>' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)


def published(name: str) -> str:
    """A template that a family publishes."""
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("the package trl has the published templates")
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Family:
    """How a family's answers are rendered, and the tokens it has."""

    template: Callable[[], str]
    special: tuple[str, ...]
    eos: str
    end: str
    """What ends an answer."""
    lead: str = ""
    """What the model writes before its text."""
    end_before_turns: str | None = None
    """What ends an answer that is followed by a question, where that is something else."""
    plain: tuple[str, ...] = ()
    """Control tokens that are not flagged special."""
    system: bool = True
    alternates: bool = True
    sentencepiece: bool = False
    closes_thought: bool = False
    """Whether the prompt opens a thought that the published rendering of an answer does not have."""


def of(name: str) -> Callable[[], str]:
    return partial(published, name)


CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
THINK = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
GLM_TOKENS = ("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
COHERE_TOKENS = (
    *("<BOS_TOKEN>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"),
    *("<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
)
DEEPSEEK = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>")
DEEPSEEK_PLAIN = ("<｜User｜>", "<｜Assistant｜>", "<think>", "</think>")
GPT_OSS_TOKENS = ("<|startoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>")
LLAMA3_TOKENS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>")
PHI3_TOKENS = ("<s>", "<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>", "<|system|>")

FAMILIES = {
    "llama2": Family(lambda: LLAMA2, ("<s>", "</s>", "<unk>"), "</s>", " </s>", sentencepiece=True),
    "mistral": Family(lambda: MISTRAL, ("<s>", "</s>", "<unk>"), "</s>", "</s>", system=False, sentencepiece=True),
    "llama3": Family(of("llama3"), LLAMA3_TOKENS, "<|eot_id|>", "<|eot_id|>"),
    "llama3.1": Family(of("llama3_1"), LLAMA3_TOKENS, "<|eot_id|>", "<|eot_id|>"),
    "llama3.2": Family(of("llama3_2"), LLAMA3_TOKENS, "<|eot_id|>", "<|eot_id|>"),
    "qwen2.5": Family(of("qwen2_5"), CHATML_TOKENS, "<|im_end|>", "<|im_end|>", plain=THINK[2:]),
    "qwen3": Family(of("qwen3"), CHATML_TOKENS, "<|im_end|>", "<|im_end|>", "<think>\n\n</think>\n\n", plain=THINK),
    "qwen3-2507": Family(of("qwen3_instruct_2507"), CHATML_TOKENS, "<|im_end|>", "<|im_end|>", plain=THINK),
    "qwen3.5": Family(of("qwen3_5_nothink"), CHATML_TOKENS, "<|im_end|>", "<|im_end|>", plain=THINK),
    "qwen3.5-thinking": Family(
        of("qwen3_5_think"), CHATML_TOKENS, "<|im_end|>", "<|im_end|>", "\n</think>\n\n", plain=THINK
    ),
    "qwen3.6": Family(of("qwen3_6"), CHATML_TOKENS, "<|im_end|>", "<|im_end|>", "\n</think>\n\n", plain=THINK),
    "nemotron-3": Family(
        of("nemotron_3_nano"),
        CHATML_TOKENS,
        "<|im_end|>",
        "<|im_end|>",
        "\n</think>\n",
        plain=THINK,
        closes_thought=True,
    ),
    "chatml": Family(lambda: CHATML, CHATML_TOKENS, "<|im_end|>", "<|im_end|>"),
    "smollm2": Family(lambda: SMOLLM2, CHATML_TOKENS, "<|im_end|>", "<|im_end|>"),
    "internlm3": Family(
        lambda: "{{ bos_token }}" + CHATML,
        ("<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"),
        "</s>",
        "<|im_end|>",
        sentencepiece=True,
    ),
    "gemma": Family(
        of("gemma"), ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<end_of_turn>", system=False
    ),
    "gemma3": Family(of("gemma3"), ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<eos>", "<end_of_turn>"),
    "phi3": Family(of("phi3"), PHI3_TOKENS, "<|endoftext|>", "<|end|>"),
    "phi3.5": Family(of("phi3_5"), PHI3_TOKENS, "<|endoftext|>", "<|end|>"),
    "phi4": Family(
        lambda: PHI, ("<|endoftext|>", "<|im_start|>", "<|im_sep|>", "<|im_end|>"), "<|im_end|>", "<|im_end|>"
    ),
    "glm4": Family(lambda: GLM4, GLM_TOKENS, "<|endoftext|>", "<|endoftext|>", "\n", "<|user|>"),
    "glm4.5": Family(
        of("glm4moe"), GLM_TOKENS, "<|endoftext|>", "<|endoftext|>", "\n<think></think>\n", "<|user|>", plain=THINK
    ),
    "gpt-oss": Family(of("gptoss"), GPT_OSS_TOKENS, "<|return|>", "<|return|>", "<|channel|>final<|message|>"),
    "command-r7b": Family(
        lambda: COMMAND_R7B,
        COHERE_TOKENS,
        "<|END_OF_TURN_TOKEN|>",
        "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        "<|START_RESPONSE|>",
    ),
    "cohere": Family(of("cohere"), COHERE_TOKENS, "<|END_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>"),
    "cohere2": Family(of("cohere2"), COHERE_TOKENS, "<|END_OF_TURN_TOKEN|>", "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "deepseek-v3": Family(
        of("deepseekv3"),
        DEEPSEEK,
        DEEPSEEK[1],
        DEEPSEEK[1],
        "\n</think>\n\n",
        plain=DEEPSEEK_PLAIN,
        closes_thought=True,
    ),
    "r1-distill": Family(
        of("deepseek_r1_distill"),
        DEEPSEEK,
        DEEPSEEK[1],
        DEEPSEEK[1],
        "\n</think>\n\n",
        plain=DEEPSEEK_PLAIN,
        closes_thought=True,
    ),
    "lfm2": Family(of("lfm2"), ("<|startoftext|>", *CHATML_TOKENS), "<|im_end|>", "<|im_end|>"),
}

SYSTEM = {"role": "system", "content": "你是老师。"}
ASK, ANSWER = {"role": "user", "content": "What is 1 and 2?"}, {"role": "assistant", "content": "一二三。"}
AGAIN, LAST = {"role": "user", "content": "red\n\ngreen"}, {"role": "assistant", "content": "two  spaces;\n\na<b"}
CONVERSATIONS: dict[str, Turns] = {
    "single turn": [ASK, ANSWER],
    "several turns": [ASK, ANSWER, AGAIN, LAST],
    "three turns": [ASK, ANSWER, AGAIN, LAST, ASK, ANSWER],
    "system": [SYSTEM, ASK, ANSWER, AGAIN, LAST],
    "empty system": [{**SYSTEM, "content": ""}, ASK, ANSWER],
}


@cache
def tokenizer_of(name: str, folder: Path) -> Any:
    """A small tokenizer with a family's control tokens, as that family flags them, and its template."""
    family = FAMILIES[name]
    template = family.template()
    if family.sentencepiece:
        from transformers import PreTrainedTokenizerFast

        folder.mkdir(exist_ok=True)
        sentencepiece_model(folder / f"{name}.model", 440)
        inner = _tokenizer(_read(folder / f"{name}.model"), {}, list(family.special), prefix=["<s>"])
        made: Any = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=family.eos)
        made.chat_template = template
    else:
        made = byte_level_tokenizer(list(family.special), family.eos, template)
    made.add_tokens(list(family.plain))
    return made


@pytest.fixture(scope="session")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for tokenizers."""
    return tmp_path_factory.mktemp("tokenizers")


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Tokenizers of the families that are converted."""
    from transformers import AutoTokenizer

    root = tmp_path_factory.mktemp("converted")
    found = {}
    for name, write in (("internlm2", write_internlm2), ("chatglm3", write_chatglm3)):
        write(root / "published" / name)
        (root / name).mkdir()
        convert(root / "published" / name, root / name)
        found[name] = AutoTokenizer.from_pretrained(root / name)
    return found


def samples_of(tokenizer: Any, turns: Turns) -> list[Encoded]:
    control = control_tokens(tokenizer)
    return encode_within(TokenLimits(10_000), partial(encode, tokenizer, control), tokenizer, turns).samples


def spans_of(sample: Encoded) -> list[tuple[int, int]]:
    """Where loss begins and ends."""
    has = [False, *(label != IGNORE_INDEX for label in sample.labels), False]
    begins = [n for n in range(len(has) - 1) if has[n + 1] and not has[n]]
    ends = [n for n in range(len(has) - 1) if has[n] and not has[n + 1]]
    return list(zip(begins, ends, strict=True))


def losses_of(tokenizer: Any, turns: Turns) -> list[str]:
    """The texts that have loss, over all samples."""
    samples = samples_of(tokenizer, turns)
    return [tokenizer.decode(sample.tokens[low:high]) for sample in samples for low, high in spans_of(sample)]


def require_prompts_as_sent(tokenizer: Any, turns: Turns) -> None:
    """Each trained turn stands after the tokens that a server sends for it; each is trained once."""
    asked = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    prompts = [
        tokenizer.apply_chat_template(turns[:place], add_generation_prompt=True, return_dict=True)["input_ids"]
        for place in asked
    ]
    found = [sample.tokens[:low] for sample in samples_of(tokenizer, turns) for low, _ in spans_of(sample)]
    assert sorted(found) == sorted(prompts)


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_is_on_what_the_assistant_writes_after_what_a_server_sends(name: str, kind: str, scratch: Path) -> None:
    family, turns = FAMILIES[name], CONVERSATIONS[kind]
    tokenizer = tokenizer_of(name, scratch)
    if turns[0]["role"] == "system" and not family.system:
        with pytest.raises(DataError, match=r"does not render.*merge_system: true"):
            samples_of(tokenizer, turns)
        return
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    ends = [family.end_before_turns or family.end] * (len(answers) - 1) + [family.end]
    expected = [family.lead + answer + end for answer, end in zip(answers, ends, strict=True)]
    assert [text.strip() for text in losses_of(tokenizer, turns)] == [text.strip() for text in expected]
    require_prompts_as_sent(tokenizer, turns)
    if not family.closes_thought:
        *_, last = samples_of(tokenizer, turns)
        rendered = tokenizer.apply_chat_template(turns, tokenize=False)
        rendered += tokenizer.eos_token if family.end_before_turns else ""
        assert tokenizer.decode(last.tokens) == tokenizer.decode(
            tokenizer(rendered, add_special_tokens=False).input_ids
        )


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("name", ["internlm2", "chatglm3"])
def test_converted_families_are_masked_alike(name: str, kind: str, converted: dict[str, Any]) -> None:
    tokenizer, turns = converted[name], CONVERSATIONS[kind]
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    if name == "internlm2":
        expected = [f"{answer}<|im_end|>" for answer in answers]
    else:
        expected = [f"{answer}<|user|>" for answer in answers[:-1]] + [f"{answers[-1]}</s>"]
    assert [text.strip() for text in losses_of(tokenizer, turns)] == expected
    require_prompts_as_sent(tokenizer, turns)


@pytest.mark.parametrize("name", ["gemma", "mistral"])
def test_a_system_prompt_is_merged_into_the_first_question(name: str, scratch: Path) -> None:
    tokenizer = tokenizer_of(name, scratch)
    before, tokenizer.chat_template = tokenizer.chat_template, with_merged_system(tokenizer.chat_template)
    try:
        for turns in CONVERSATIONS.values():
            end = FAMILIES[name].end
            answers = [turn["content"] + end for turn in turns if turn["role"] == "assistant"]
            assert [text.strip() for text in losses_of(tokenizer, turns)] == answers
            require_prompts_as_sent(tokenizer, turns)
        merged = tokenizer.apply_chat_template([SYSTEM, ASK], tokenize=False)
        text = f"{SYSTEM['content']}\n\n{ASK['content']}"
        assert text in merged
        tokenizer.chat_template = before
        assert merged == tokenizer.apply_chat_template([{**ASK, "content": text}], tokenize=False)
    finally:
        tokenizer.chat_template = before
