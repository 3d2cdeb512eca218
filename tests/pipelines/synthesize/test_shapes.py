"""Answers of every shape: read, mended where nearly valid, refused where not what was asked for."""

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from pydantic import ValidationError

from pipelines.llm.requests import MalformedError
from pipelines.recipe.synthesize import AnswerShape, Synthesize
from pipelines.refine.rules import RULES, Expected
from pipelines.synthesize.grid import Grid
from pipelines.synthesize.passages import StoredTexts
from pipelines.synthesize.shapes import conversations, response_format

CARD = {
    "type": "object",
    "properties": {"wish": {"type": "string"}, "stars": {"type": "integer", "minimum": 1, "maximum": 5}},
    "required": ["wish", "stars"],
    "additionalProperties": False,
}
CELL = {"persona": "爱莉希雅", "partner": "芽衣"}


def read(text: str, **answer: Any) -> list[list[tuple[str, str]]]:
    found = conversations(text, "写一张贺卡", AnswerShape.model_validate(answer), CELL)
    return [[(turn["role"], turn["content"]) for turn in turns] for turns in found]


@pytest.mark.parametrize(
    "text",
    [
        '{"wish": "平安", "stars": 5}',
        '```json\n{"wish": "平安", "stars": 5}\n```',
        '好的，贺卡如下：\n```json\n{"wish": "平安", "stars": 5}\n```\n希望您喜欢！',
        '{"wish": "平安", "stars": 5,}',
        "{'wish': '平安', 'stars': 5}",
        '{"wish": "平安", "stars": 5',
        '{wish: "平安", stars: 5}',
    ],
)
def test_nearly_valid_json_is_mended(text: str) -> None:
    ((asked, said),) = read(text, shape="json", json_schema=CARD)
    assert asked == ("user", "写一张贺卡")
    assert said == ("assistant", '{"wish": "平安", "stars": 5}')


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("平安喜乐", "object"),
        ('{"wish": "平安"}', "'stars' is a required property"),
        ('{"wish": "平安", "stars": 9}', r"\$.stars: 9 is greater than the maximum of 5"),
        ('{"wish": "平安", "stars": 5, "more": 1}', "more"),
        ("", "object"),
        ("[" * 5000 + "]" * 5000, "too deep"),
        ('{"wish": "' + "[" * 5000, "breaks off"),
        ('{"wish": "平\\u0000安", "stars": 5}', "NUL"),
    ],
)
def test_what_does_not_satisfy_the_schema_is_refused(text: str, said: str) -> None:
    with pytest.raises(MalformedError, match=said):
        read(text, shape="json", json_schema=CARD)


def test_pairs_are_a_conversation_each() -> None:
    pairs = [{"question": "谁写的？ ", "answer": "鲁迅。"}, {"question": "何时？", "answer": "一九一八年。"}]
    wanted = [
        [("user", "谁写的？"), ("assistant", "鲁迅。")],
        [("user", "何时？"), ("assistant", "一九一八年。")],
    ]
    assert read(json.dumps(pairs), shape="pairs") == wanted
    assert read(json.dumps({"items": pairs}), shape="pairs") == wanted  # as endpoints that enforce JSON give it
    with pytest.raises(MalformedError, match="answer"):
        read('[{"question": "谁？"}]', shape="pairs")
    with pytest.raises(MalformedError):
        read('[{"question": "谁？", "answer": " "}]', shape="pairs")
    with pytest.raises(MalformedError):
        read("[]", shape="pairs")


def test_a_dialogue_is_one_conversation_in_turns() -> None:
    said = [
        ("芽衣", "早。"),
        ("芽衣", "在吗？"),
        ("爱莉希雅", "嗨，想我了吗？"),
        ("芽衣", "嗯。"),
        ("爱莉希雅", "真乖。"),
    ]
    lines = [{"speaker": speaker, "text": text} for speaker, text in [*said, ("芽衣", "再见。")]]
    roles = {"shape": "dialogue", "user": "{partner}", "assistant": "{persona}"}
    assert read(json.dumps(lines), **roles) == [
        [("user", "早。\n在吗？"), ("assistant", "嗨，想我了吗？"), ("user", "嗯。"), ("assistant", "真乖。")]
    ]
    with pytest.raises(MalformedError, match="'琪亚娜' is neither 芽衣 nor 爱莉希雅"):
        read(json.dumps([{"speaker": "琪亚娜", "text": "早"}]), **roles)
    with pytest.raises(MalformedError, match="does not speak first"):
        read(json.dumps(lines[2:]), **roles)
    with pytest.raises(MalformedError, match="is not answered"):
        read(json.dumps(lines[:2]), **roles)


def test_speakers_are_read_as_scripts_write_them() -> None:
    said = [
        ("【芽衣】", "芽衣：早。"),
        ("爱莉希雅：", "爱莉希雅: 嗨。"),
        ("芽衣 ", "对芽衣：不，对你说。"),
        ("爱莉希雅", "嗯。"),
    ]
    roles = {"shape": "dialogue", "user": "{partner}", "assistant": "{persona}"}
    assert read(json.dumps([{"speaker": speaker, "text": text} for speaker, text in said]), **roles) == [
        [("user", "早。"), ("assistant", "嗨。"), ("user", "对芽衣：不，对你说。"), ("assistant", "嗯。")]
    ]
    with pytest.raises(MalformedError, match="芽衣 says nothing"):
        read(json.dumps([{"speaker": "芽衣", "text": "芽衣："}]), **roles)


def test_what_the_endpoint_is_told() -> None:
    assert response_format(AnswerShape(shape="pairs")) is None
    assert response_format(AnswerShape(shape="pairs", response_format="json_object")) == {"type": "json_object"}
    whole = response_format(AnswerShape(shape="json", json_schema=CARD, response_format="json_schema"))
    assert whole == {"type": "json_schema", "json_schema": {"name": "json", "schema": CARD}}
    wrapped = response_format(AnswerShape(shape="pairs", response_format="json_schema"))
    assert wrapped and wrapped["json_schema"]["schema"]["properties"]["items"]["type"] == "array"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"shape": "json"}, "needs json_schema"),
        ({"shape": "pairs", "json_schema": CARD}, "have their own"),
        ({"shape": "json", "json_schema": {"type": "objekt"}}, "json_schema.type: 'objekt' is not valid"),
        ({"response_format": "json_object"}, "needs a shape of JSON"),
    ],
)
def test_a_wrong_section_is_named(answer: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        AnswerShape.model_validate(answer)


def test_the_sections_in_the_guide_are_valid() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "synthesize.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```yaml\n(.*?)```", guide, flags=re.DOTALL)
    assert len(blocks) == 4
    cells = []
    for block in blocks:
        section = Synthesize.model_validate({"model": "m", "engine": "vllm", **yaml.safe_load(block)["synthesize"]})
        passages = StoredTexts(pa.chunked_array([["文"]])) if section.passages else None
        made = Grid(section, 42, passages)
        cells.append(len(list(made.positions())))
        prompt = made.request(0).messages[0]["content"]
        is_json = section.answer.shape != "text"
        assert is_json == bool(re.search(r'只回答 JSON：\[\{"(question|speaker)": …, "', prompt))
        assert (section.passages is not None) == prompt.endswith("\n文")
    assert cells == [1, 2, 8, 32]


def test_the_guides_lengths_and_emoji_are_held_to_by_refine() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "synthesize.md").read_text(encoding="utf-8")
    block = next(text for text in re.findall(r"```yaml\n(.*?)```", guide, flags=re.DOTALL) if "length:" in text)
    section = Synthesize.model_validate({"model": "m", "engine": "vllm", **yaml.safe_load(block)["synthesize"]})
    plain, merry = (Expected({}, style, {}) for style in section.styles.values())
    assert RULES["emoji"]("新春快乐🎉", plain) and not RULES["emoji"]("新春快乐🎉", merry)
    verse = "春风入户，\n喜气盈门。"
    assert not RULES["explanation"](verse, plain) and not RULES["explanation"](verse, merry)
    assert plain.style.rules and "length" not in plain.style.rules
