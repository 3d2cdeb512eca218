"""The row formats that docs/recipes.md lists, by rows written here: read with every turn, or refused by name."""

import json
import re
from collections import Counter
from typing import Any

import pytest

from pipelines.sources.row_keys import adapter_for, classify, renamed

Row = dict[str, Any]


def turns_of(
    *turns: str, names: tuple[str, str] = ("user", "assistant"), keys: tuple[str, str] = ("role", "content")
) -> list[Row]:
    """Turns of two speakers, in the words of a format."""
    return [{keys[0]: names[number % 2], keys[1]: text} for number, text in enumerate(turns)]


def asked(question: str, answer: str) -> list[Row]:
    return [{"question": question, "answer": answer}]


SHARED: Any = {"names": ("human", "gpt"), "keys": ("from", "value")}
READ: dict[str, tuple[Row, list[str]]] = {
    "LLaMA-Factory, alpaca": (
        {"instruction": "三", "input": "", "output": "四", "system": "S", "history": [["一", "二"]]},
        ["S", "一", "二", "三", "四"],
    ),
    "LLaMA-Factory, sharegpt": (
        {
            "conversations": [
                {"from": "human", "value": "一"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {}}'},
                {"from": "observation", "value": "二"},
                {"from": "gpt", "value": "三"},
            ],
            "system": "S",
            "tools": '[{"name": "f"}]',
        },
        ["S", "一", "", "二", "三"],
    ),
    "ms-swift, messages": (
        {"messages": [*turns_of("一", "二", "三"), {"role": "assistant", "content": "四", "loss": True}]},
        ["一", "二", "三", "四"],
    ),
    "ms-swift, query": (
        {"query": "三", "response": "四", "system": "S", "history": [["一", "二"]]},
        ["S", "一", "二", "三", "四"],
    ),
    "ms-swift, conversation": (
        {"system": "S", "conversation": [{"human": "一", "assistant": "二"}, {"human": "三", "assistant": "四"}]},
        ["S", "一", "二", "三", "四"],
    ),
    "COIG-CQIA": (
        {
            **{"instruction": "一", "input": "", "output": "二", "task_type": {"major": ["问答"]}, "domain": ["百科"]},
            **{"metadata": "无", "answer_from": "human", "human_verified": True, "copyright": "x"},
            "history": [["零", "半"]],
        },
        ["零", "半", "一", "二"],
    ),
    "COIG, conversations": (
        {"instruction": "零", "conversations": [*asked("一", "二"), *asked("三", "四")], "filename": "a.jsonl"},
        ["零\n一", "二", "三", "四"],
    ),
    "COIG, no instruction": (
        {"instruction": "", "conversations": [*asked("一", "二"), *asked("三", "四")]},
        ["一", "二", "三", "四"],
    ),
    "xtuner": (
        {
            "conversation": [
                {"system": "S", "input": "一", "output": "二", "output_with_loss": False},
                {"input": "三", "output": "四"},
            ]
        },
        ["S", "一", "二", "三", "四"],
    ),
    "data-juicer, dialogue": (
        {"system": "S", "instruction": "", "query": "三", "response": "四", "history": [["一", "二"]]},
        ["S", "一", "二", "三", "四"],
    ),
    "axolotl, chat_template": (
        {"messages": [*turns_of("一", "二", "三"), {"role": "assistant", "content": "四", "training": False}]},
        ["一", "二", "三", "四"],
    ),
    "OpenAI": (
        {"messages": [*turns_of("一", "二", "三"), {"role": "assistant", "content": "四", "weight": 0}]},
        ["一", "二", "三", "四"],
    ),
    "TRL": (
        {"prompt": turns_of("一", "二", "三"), "completion": turns_of("四", names=("assistant", ""))},
        list("一二三四"),
    ),
    "Belle": ({"id": "b1", "conversations": turns_of("一", "二", "三", "四", **SHARED)}, ["一", "二", "三", "四"]),
    "MOSS": (
        {
            "conversation_id": "1",
            "meta_instruction": "S",
            "chat": {f"turn_{n}": {"Human": a, "MOSS": b} for n, (a, b) in enumerate(["一二", "三四"])},
        },
        ["S", "一", "二", "三", "四"],
    ),
}
PAIRS: dict[str, tuple[Row, str, str]] = {
    "COIG-PC": (
        {
            **{
                "instruction": "一",
                "input": "二",
                "output": "三",
                "split": "train",
                "task_name_in_eng": "a",
                "other": "",
            },
            **{"task_type": {"major": ["问答"], "minor": ["百科"]}, "domain": ["百科"]},
        },
        "一\n二",
        "三",
    ),
    "COIG, exam": (
        {
            **{
                "textbox_q_instruction": "选一项",
                "textbox_q_context": "文",
                "textbox_question": "问",
                "subject": "生物",
            },
            **{"textbox_answer": "A", "textbox_answer_analysis": "因为甲"},
        },
        "选一项\n文\n问",
        "因为甲\nA",
    ),
    "COIG, human values": (
        {
            **{"textbox_q_instruction": "答", "textbox_question": "问"},
            **{"textbox_answer": "甲", "textbox_answer_analysis": "甲"},
        },
        "答\n问",
        "甲",
    ),
    "COIG, translated": (
        {
            **{"instruction": "say", "input": "cat", "output": "a cat"},
            **{"trans_instruction": "说", "trans_input": "猫", "trans_output": "一只猫"},
        },
        "说\n猫",
        "一只猫",
    ),
    "COIG, leetcode": ({"instruction": "一", "input": "", "output": "二"}, "一", "二"),
}
REFUSED: dict[str, tuple[Row, str]] = {
    "LLaMA-Factory, preferences": ({"conversations": turns_of("一", **SHARED), "chosen": {"from": "gpt"}}, "chosen"),
    "LLaMA-Factory, kto": ({"messages": turns_of("一", "二"), "label": False}, "label"),
    "LLaMA-Factory, media": ({"messages": turns_of("一", "二"), "videos": ["a.mp4"]}, "videos"),
    "ms-swift, preferences": ({"messages": turns_of("一", "二"), "rejected_response": "三"}, "rejected_response"),
    "ms-swift, media": ({"query": "一", "response": "二", "objects": {"ref": ["猫"]}}, "objects"),
    "data-juicer, dialogue": ({"instruction": "译", "query": "一", "response": "二"}, "instruction"),
    "axolotl, chat_template": (
        {"messages": [*turns_of("一"), {"role": "assistant", "content": "二", "train_detail": [{"train": True}]}]},
        "train_detail",
    ),
    **{
        f"column {name!r}": ({"messages": turns_of("一", "二"), name: value}, name)
        for name, value in {
            **{
                "mask": [0, 1],
                "loss_mask": [1],
                "loss_scale": [1.0, 0.5],
                "Completion-Mask": "01",
                "sample_weight": 0.5,
            },
            **{"is_preferred": True, "chosen_response": "三", "response_rejected": "三", "Score Rejected": 1},
            **{"label": 0, "Label": "1", "System": "S", "history ": [["一", "二"]], "Images": ["a.jpg"], "Weight": 0},
        }.items()
    },
    "COIG, turns of other names": ({"instruction": "零", "conversations": turns_of("一", "二", **SHARED)}, "from"),
    "COIG, counterfactual chat": ({"round_0": {"prompt": "一", "response": '{"Q": "问", "A": "答"}'}}, "round_0"),
    "COIG-P": ({"conversations": turns_of("一", **SHARED), "chosen": {"from": "gpt"}, "rejected": {}}, "chosen"),
    "MOSS": (
        {"chat": {"turn_1": {"Human": "一", "Commands": "<|Commands|>: Search(x)<eoc>", "MOSS": "二"}}},
        "Commands",
    ),
}


@pytest.mark.parametrize("name", READ)
def test_read_with_every_turn(name: str) -> None:
    row, texts = READ[name]
    _, adapter = adapter_for(classify(row, "auto"), row)
    assert [turn["content"] for turn in adapter.read(json.loads(json.dumps(row)), Counter())["messages"]] == texts


@pytest.mark.parametrize("name", PAIRS)
def test_read_as_one_question_and_its_answer(name: str) -> None:
    row, query, response = PAIRS[name]
    read = adapter_for(classify(row, "auto"), row)[1].read(row, Counter())
    assert (read["query"], read["response"], read.get("messages")) == (query, response, None)


def test_originals_beside_translations_are_counted() -> None:
    row, counts = PAIRS["COIG, translated"][0], Counter[str]()
    adapter_for(classify(row, "auto"), row)[1].read(row, counts)
    assert counts == {"rows read in translation, whose originals are left out": 1}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_by_name(name: str) -> None:
    row, what = REFUSED[name]
    with pytest.raises(ValueError, match=re.escape(what)):
        adapter_for(classify(row, "auto"), row)[1].read(row, Counter())


@pytest.mark.parametrize(
    "beside",
    [{"label": "positive"}, {"label": 3}, {"label": None, "mask": None, "System": ""}, {"POS": "noun", "Row_ID": 7}],
)
def test_columns_that_do_not_change_what_is_trained_are_carried(beside: Row) -> None:
    row = {"question": "一", "answer": "二", **beside}
    columns = classify(row, "auto")
    name, _ = adapter_for(columns, row)
    assert name == "question_answer" and {n for n, value in beside.items() if value} <= {*columns.carried[name]}


def test_a_text_may_be_one_of_two_kinds_and_a_label_has_a_way_out() -> None:
    assert adapter_for(classify(("text", "label"), "auto"), {"text": "一", "label": 1})[0] == "text"
    row = {"query": "一", "response": "二", "label": 1}
    with pytest.raises(ValueError, match=r"column label: .*ingest.columns={OTHER: 'label'} carries it"):
        adapter_for(classify(row, "auto"), row)
    other = renamed(row, {"OTHER": "label"})
    columns = classify(other, "auto")
    assert adapter_for(columns, other)[0] == "query_response" and columns.carried["query_response"] == ["OTHER"]
