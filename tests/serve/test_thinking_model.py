"""Rows with reasoning and with tools, trained into a tiny model, served with vLLM's parsers: each part comes apart."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

pytest.importorskip("vllm")

from pipelines.evaluate.answers import EvaluationRequest
from pipelines.evaluate.ask import RequestOptions, ask_endpoint
from pipelines.models.served import ServedModel
from pipelines.models.tokenizer import load_tokenizer
from pipelines.recipe.base import Generation
from pipelines.recipe.ingest import Ingest
from pipelines.recipe.serve import Engine, Serve
from pipelines.recipe.train import Train
from pipelines.sources.read import first_rows
from pipelines.train.loss_mask import encode
from pipelines.train.proof import TrainingRow
from pipelines.train.truncation import TokenLimits, encode_within
from serve.app import endpoint
from serve.ui.chat import ChatStart, chat
from tests.model_families import fit, write_thinker

pytestmark = pytest.mark.slow

TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASKED = "What is 1 and 2?"
ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": said, "reasoning": thought}]}
    for text, thought, said in ((ASKED, "red or blue", "green"), ("red?", "not so", "blue"))
]
ROWS.append(
    {
        "messages": [
            {"role": "user", "content": "Oslo?"},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c1", "content": "rain"},
            {"role": "assistant", "content": "It rains."},
        ],
        "tools": [TOOL],
    }
)
"""Two answers with reasoning, and a conversation with a tool."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has learned the rows by heart."""
    from transformers import AutoModelForCausalLM

    folder = write_thinker(tmp_path_factory.mktemp("thinker"))
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    section = Train(model=str(folder))
    tokenizer, control = load_tokenizer(folder)
    samples = []
    for row in (TrainingRow.of(section, found) for found in first_rows(Ingest(source=str(file)), 10)):
        samples += encode_within(
            TokenLimits(512), lambda turns, row=row: encode(tokenizer, control, turns, row.tools), tokenizer, row.chat
        ).samples
    learning: Any = AutoModelForCausalLM.from_pretrained(folder)
    fit(learning, samples, epochs=120, rate=1e-3)
    learning.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(ray_cluster: None, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    engine = Engine(
        max_model_len=512, kv_cache_memory_bytes=64 << 20, reasoning_parser="qwen3", tool_call_parser="hermes"
    )
    with endpoint([ServedModel("base", str(model))], Serve(engine=engine), log_dir=tmp_path_factory.mktemp("l")) as url:
        yield url


def ask(url: str, messages: list[Any], **more: Any) -> Any:
    client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=120)
    answer = client.chat.completions.create(model="base", messages=messages, temperature=0, max_tokens=64, **more)
    return answer.choices[0]


def test_reasoning_comes_apart_from_the_answer(url: str) -> None:
    choice = ask(url, [{"role": "user", "content": ASKED}])
    assert (choice.message.reasoning.strip(), choice.message.content.strip()) == ("red or blue", "green")
    assert choice.finish_reason == "stop"


def test_a_request_may_switch_thinking_off(url: str) -> None:
    off = {"chat_template_kwargs": {"enable_thinking": False}}
    choice = ask(url, [{"role": "user", "content": ASKED}], extra_body=off)
    assert not choice.message.reasoning and choice.message.content


def test_the_terminal_folds_it(url: str) -> None:
    lines, shown = iter([ASKED, "/thought", "/exit"]), []
    start = ChatStart(sampling={"temperature": 0, "max_tokens": 64})
    chat(url, start, read=lambda _: next(lines), write=shown.append)
    text = "".join(shown)
    assert "(thinking … 11 characters; /thought shows them)\ngreen\nred or blue" in text


def test_compare_keeps_it_apart(url: str, tmp_path: Path) -> None:
    asked = [{"role": "user", "content": ASKED}]
    request = EvaluationRequest("k", "base", asked, Generation(max_tokens=64, temperature=0))
    answers = ask_endpoint(RequestOptions(url, "none", 1, 120), [request], tmp_path / "answers.jsonl", "answers")
    assert (answers["k"].reasoning.strip(), answers["k"].answer.strip()) == ("red or blue", "green")


def test_a_tool_is_called_and_what_it_says_is_answered(url: str) -> None:
    asked: list[Any] = [{"role": "user", "content": "Oslo?"}]
    choice = ask(url, asked, tools=[TOOL])
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"city": "Oslo"})
    again = [*asked, {"role": "assistant", "content": "", "tool_calls": [call.model_dump()]}]
    choice = ask(url, [*again, {"role": "tool", "tool_call_id": call.id, "content": "rain"}], tools=[TOOL])
    assert choice.message.content.strip() == "It rains."
