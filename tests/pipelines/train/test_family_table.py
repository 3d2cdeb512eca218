"""What can be trained of each family's chats; the table of docs/train.md is what is found here.

python -m tests.pipelines.train.test_family_table      prints the table
"""

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from pipelines.errors import DataError
from pipelines.models.tokenizer import control_tokens
from pipelines.train.audit import sent_for
from pipelines.train.loss_mask import IGNORE_INDEX, Encoded, encode, turns_for
from pipelines.train.marked_chat import Turn
from tests.pipelines.train.test_mask_families import (
    ANSWER,
    ASK,
    CONVERSATIONS,
    FAMILIES,
    scratch,
    spans_of,
    tokenizer_of,
)

__all__ = ["scratch"]

PAGE = Path(__file__).parents[3] / "docs" / "train.md"
HEAD = "| family | single turn | several turns | system | reasoning | tools |\n| --- | --- | --- | --- | --- | --- |\n"
TOOLS = json.dumps(
    [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "description": "The weather of a city.",
                "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
            },
        }
    ]
)
CALL = json.dumps(
    [{"id": "call00001", "type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
)
CHATS: dict[str, list[Turn]] = {
    "single turn": CONVERSATIONS["single turn"],
    "several turns": CONVERSATIONS["several turns"],
    "system": CONVERSATIONS["system"],
    "reasoning": [ASK, {**ANSWER, "reasoning": "one, two"}],
    "tools": [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": CALL},
        {"role": "tool", "content": "rain", "tool_call_id": "call00001"},
        {"role": "assistant", "content": "It rains."},
    ],
}
SAID = {"reasoning": ["one, two", "一二三。"], "tools": ["weather", "Oslo", "It rains."]}
"""What has loss, beside the answers of the other chats."""

THINK = ("qwen3", "qwen3.5-thinking", "qwen3.6", "glm4.5", "gpt-oss", "deepseek-v3", "r1-distill", "nemotron-3")
CALL_TOOLS = ("qwen2.5", "qwen3", "qwen3-2507", "qwen3.5", "qwen3.6", "llama3.1", "llama3.2", "glm4.5", "gpt-oss")
"""Families that were made for it, so that refusing them would be wrong."""


def samples_of(tokenizer: Any, turns: list[Turn], tools: str | None) -> list[tuple[list[int], Encoded]]:
    """The samples of a chat, each with the places of the answers that are trained in it."""
    sample = encode(tokenizer, control_tokens(tokenizer), turns, tools)
    before = samples_of(tokenizer, turns_for(turns, sample.apart), tools) if sample.apart else []
    places = [n for n, turn in enumerate(turns) if turn["role"] == "assistant" and turn.get("loss") is not False]
    return [*before, ([n for n in places if n not in sample.apart], sample)]


def found(name: str, kind: str, folder: Path) -> str:
    """What becomes of a chat in a family: `yes`, `one each` where answers are samples of their own, or why not."""
    tokenizer, turns = tokenizer_of(name, folder), CHATS[kind]
    tools = TOOLS if kind == "tools" else None
    try:
        samples = samples_of(tokenizer, turns, tools)
    except DataError as error:
        return "`merge_system`" if "merge_system" in str(error) else "refused"
    texts = ""
    for places, sample in samples:
        spans = spans_of(sample)
        assert len(spans) == len(places)
        for place, (low, high) in zip(places, spans, strict=True):
            assert sample.tokens[:low] == sent_for(tokenizer, turns, place, tools)
            texts += tokenizer.decode(sample.tokens[low:high])
        assert all(sample.labels[n] in (IGNORE_INDEX, token) for n, token in enumerate(sample.tokens))
    answers = [turn["content"] for turn in turns if turn["role"] == "assistant"]
    assert all(text in texts for text in SAID.get(kind, answers)), texts
    assert ASK["content"] not in texts and "rain," not in texts
    return "one each" if len(samples) > 1 else "yes"


def row_of(name: str, folder: Path) -> str:
    return f"| {name} | {' | '.join(found(name, kind, folder) for kind in CHATS)} |\n"


@pytest.mark.parametrize("name", FAMILIES)
def test_the_page_says_what_can_be_trained_of_a_family(name: str, scratch: Path) -> None:
    row = row_of(name, scratch)
    assert row in PAGE.read_text(encoding="utf-8"), row
    cells = dict(zip(CHATS, row.split(" | ")[1:], strict=True))
    assert cells["single turn"] == "yes" and cells["several turns"] in ("yes", "one each")
    assert cells["system"] != "refused"
    assert name not in THINK or cells["reasoning"] == "yes"
    assert name not in CALL_TOOLS or cells["tools"].strip(" |\n") in ("yes", "one each")


def test_the_page_names_no_family_that_is_not_tried() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert HEAD in page
    table = page.split(HEAD)[1].split("\n\n")[0].splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in table] == list(FAMILIES)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        print(HEAD, end="")
        for family in FAMILIES:
            print(row_of(family, Path(folder)), end="")
